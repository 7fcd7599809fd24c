"""`Beside`: what a packed cache keeps beside its bytes, so that they lose less.

**Means of keys**, per batch row and KV head one for each segment of `SEGMENT` positions. Keys are quantised
less the mean of their segment: a few channels of a key may have a mean many times their spread, and the
error of a code grows with the length of what is coded. One mean for all of a context would not do: rotary
embeddings turn it, in slow channels by half within some thousand tokens, and it is then worse than none.
Kernels take `q . (k - mean)` from the codes and add `q . mean` of the segment to the scores.

A store sets the means of the segments whose first position is among its tokens, and changes no other:

- a chunk of more than `DECODE_TOKENS` tokens, of which the segment has at least `LEAST_MEAN_TOKENS`: their
  mean, from up to `MEAN_SAMPLES` of them, evenly spread;
- a chunk with fewer of the segment's tokens: the mean of the segment before;
- at most `DECODE_TOKENS` tokens: the mean of what the segment before decodes to, by every `STRIDE`-th of
  its first `SEGMENT - DECODE_TOKENS` tokens, which are there whichever of these tokens come together; zero
  for the first segment.

So all tokens of a segment are coded less the same mean, however they came and were taken back; and checking
tokens at once in speculative decoding stores what decoding them one by one does.

**Exact tokens**: copies of the first `sink_tokens` tokens, on which attention often leans, and of the last
`recent_tokens`, at which it looks most. Every token is packed too, so that taking tokens back loses none.
Position p has slot p if it is a sink, else `sink_tokens + (p - sink_tokens) % recent_tokens`. A row of
`length` tokens has exact copies of

    p < min(sink_tokens, length)   and   first_recent <= p < length,
    first_recent = max(exact_from, length - recent_tokens, sink_tokens).

A store that makes a row of n tokens one of m sets `exact_from` to max(min(exact_from, n), m -
recent_tokens) and copies those of its tokens that are then exact. Why the copies from `first_recent` on
are right after it, however often tokens were appended and taken back: they were right before it (those
below n), or it wrote them; and what it overwrote was the copy of a position lower by a multiple of
`recent_tokens`, so below m - recent_tokens. Taking tokens back changes `length` only, which leaves fewer
copies to be right. Setting `exact_from` a second time changes nothing, so many programs may set it at once.

**The chunk itself** (`Chunk`) is kept by nobody: its keys and values are there when it is appended, so a
chunk of more than `DECODE_TOKENS` tokens attends to them as they came, and to those before from the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SEGMENT = 256  # positions of one mean: at 4 bits and D = 128 it adds 0.8% to the bytes
MEAN_SAMPLES = 64  # keys at most that a mean is taken from: more would be read for little
STRIDE = 4  # between the tokens that the mean of a segment is taken from once they are stored
LEAST_MEAN_TOKENS = 16  # a mean of fewer may add more error than it removes
# A chunk of at most as many attends to what its own codes decode to: decoding token by token, and checking
# the same tokens at once in speculative decoding, then see the same keys and values.
DECODE_TOKENS = 16

Chunk = tuple[
    torch.Tensor, torch.Tensor
]  # k, v `[B, Hkv, n, D]`: the last n tokens of each row, as they came


class Beside(NamedTuple):
    """The tensors of one layer; `sink_tokens` of the slots of `exact` are sinks, the others recent tokens.

    Attributes:
        k_mean: `[B, Hkv, segments, D]`, contiguous: segment i has positions `SEGMENT * i`.. .
        exact: `[B, Hkv, sink_tokens + recent_tokens, D + Dv]`, a key and its value a slot.
        exact_from: int64, in the shape of the lengths.
    """

    k_mean: torch.Tensor | None = None
    exact: torch.Tensor | None = None
    exact_from: torch.Tensor | None = None
    sink_tokens: int = 0

    @property
    def recent_tokens(self) -> int:
        """Slots of recent tokens."""
        return 0 if self.exact is None else self.exact.shape[2] - self.sink_tokens

    @property
    def segments(self) -> int:
        """Means of a row; 0: there are none."""
        return 0 if self.k_mean is None else self.k_mean.shape[2]


NOTHING = Beside()
