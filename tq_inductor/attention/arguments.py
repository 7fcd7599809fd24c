"""What the ops `dense_attn` and `varlen_attn` hand to an attention backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .call import Window


@dataclass(frozen=True)
class DenseArguments:
    """Attention over whole tensors; see `AttentionCall` for `alignment` and `window`.

    Attributes:
        q, k, v: `[B, H, Lq, D]`, `[B, Hkv, Lk, D]`, `[B, Hkv, Lk, Dv]`.
        attn_mask: bool or float, broadcastable to `[B, H, Lq, Lk]`; only where `alignment` is "".
        alibi_slopes: `[H]`, or None: a slope times `key - query` is added to a score.
        sinks: `[H]`, or None: one more score per head, which has no value.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attn_mask: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    alignment: str
    window: Window
    softcap: float | None
    scale: float

    @property
    def causal(self) -> bool:
        """Whether a query sees nothing behind its own place, and everything before it."""
        return self.window == (None, 0)

    def window_or(self, unlimited: int | None) -> Window:
        """The window, with another sign for "no limit"."""
        back, ahead = self.window
        return unlimited if back is None else back, unlimited if ahead is None else ahead

    def tokens_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as `[B, L, heads, D]`, as FlashAttention takes them."""
        return tokens_first(self.q), tokens_first(self.k), tokens_first(self.v)


@dataclass(frozen=True)
class VarlenArguments:
    """Attention over sequences of any lengths, one behind the other; causal is aligned bottom-right.

    Attributes:
        q, k, v: `[Tq, H, D]`, `[Tk, Hkv, D]`, `[Tk, Hkv, Dv]`; k and v may be of an fp8 dtype for a backend
            that has `formats`.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]`, on the device.
        block_table: int32 `[sequences, n]`, the pages of each sequence, of k and v
            `[pages, page_size, Hkv, D or Dv]`; always None for a backend that takes no `pages`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    scale: float
    block_table: torch.Tensor | None = None

    def zeros(self) -> torch.Tensor:
        """`[Tq, H, Dv]`: what tokens after the last sequence give."""
        return self.q.new_zeros((*self.q.shape[:-1], self.v.shape[-1]))

    def zeroed_behind(self, out: torch.Tensor) -> torch.Tensor:
        """`out` `[Tq, H, Dv]` with zeros for tokens after the last sequence, which kernels leave unset."""
        token = torch.arange(out.shape[0], device=out.device)
        return torch.where((token < self.cu_seqlens_q[-1])[:, None, None], out, 0)


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """`[B, heads, L, D]` as `[B, L, heads, D]`, `aligned`."""
    return aligned(x.transpose(1, 2))


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if kernels could not load it as it lies.

    They load 16 bytes at a time: heads lie in one piece, and all begin at a multiple of 16 bytes.
    """
    unit = 16 // x.element_size()
    steps = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s and s % unit == 0 for s in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)
