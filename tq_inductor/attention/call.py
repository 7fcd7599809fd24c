"""`AttentionCall`: the facts of one attention call, on which the choice of a backend depends."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_DECODE_QUERIES = 16  # tokens of a decode step, speculative ones included
Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class AttentionCall:
    """Facts, never tensors: a choice can be tested for a machine that one does not have.

    A size that is not known at compile time is None, never guessed and never guarded on.

    Attributes:
        batch_size, q_len, kv_len, num_heads, num_kv_heads, head_dim, v_head_dim: sizes of
            q `[B, H, q, D]`, k `[B, Hkv, L, D]` and v `[B, Hkv, L, Dv]`, repeated heads removed.
        dtype: of q and of the result.
        device: "cpu", "cuda", ...
        capability: compute capability of a CUDA device, e.g. (9, 0).
        mask: "none", "bool" or "float": what `attn_mask` is.
        visible: what the mask says, in words, e.g. "causal + padding".
        bounded: whether keys at either end may be hidden from all queries, as the empty slots of a
            static cache are, by an amount that only the device knows.
        interval: whether the mask is wholly an interval of keys per query and a mask over keys, and more
            than plain causal.
        bits: whether the mask is bool, of many queries and no interval, and can be packed where it is made.
        is_causal: SDPA's flag, which aligns query 0 with key 0 (top-left).
        alignment: if `window` says all of the mask, or all but ALiBi: where query i stands among the keys,
            "top-left" (at key i), "bottom-right" (at key `i + kv_len - q_len`), or "equal" where these are
            the same; otherwise "".
        padding: "full" or "causal" (as many queries as keys) if the mask is that and a mask over keys, and
            all sizes are known; otherwise "".
        window: how many keys before and after its own place a query sees; None: no limit on that side.
            `(None, 0)` is causal, `(255, 0)` causal with a sliding window of 256 keys.
        dropout: probability.
        sinks: whether one more score per head, without a value, takes part in the softmax.
        softcap: scores s become `softcap * tanh(s / softcap)` before the mask, if not None.
        alibi: whether a float mask is ALiBi, slopes of which are known, beside `alignment` and `window`.
        needs_grad: whether a backward may follow.
        deterministic: whether PyTorch's deterministic algorithms are asked for.
        varlen: whether the sequences are ragged, one behind the other, with `cu_seqlens`.
        page_size: tokens of a page, where k and v are pages behind a block table; None if they are not.
        kv_bytes: the format of k and v where that is not `dtype`: "e4m3", "e5m2", "nvfp4", a format of
            ours, or "undeclared" for bytes of which nobody said what they are.
        rocm: architecture of a ROCm device, e.g. "gfx942".
        kv_format: the format of the packed cache that k and v are read from; None if they are not.
        kv_source: where k and v come from, in words.
        cached: whether k and v hold tokens of earlier steps; False if all is computed in this graph.
        obstacles: what in the graph stands against replacing the call by anything.
        packed_obstacles: what in the graph stands against reading the packed cache directly.
    """

    batch_size: int | None
    q_len: int | None
    kv_len: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    v_head_dim: int | None
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None = None
    mask: str = "none"
    visible: str = "none"
    bounded: bool = False
    interval: bool = False
    bits: bool = False
    is_causal: bool = False
    alignment: str = ""
    padding: str = ""
    window: Window = (None, None)
    dropout: float = 0.0
    sinks: bool = False
    softcap: float | None = None
    alibi: bool = False
    needs_grad: bool = False
    deterministic: bool = False
    varlen: bool = False
    page_size: int | None = None
    kv_bytes: str = ""
    rocm: str | None = None
    kv_format: str | None = None
    kv_source: str = "computed here"
    cached: bool = True
    obstacles: tuple[str, ...] = ()
    packed_obstacles: tuple[str, ...] = ()

    @property
    def phase(self) -> str:
        """ "decode": a few queries over more keys than that, of earlier steps; else "prefill"."""
        few = self.q_len is not None and self.q_len <= MAX_DECODE_QUERIES
        return "decode" if few and self.cached and self.kv_len != self.q_len else "prefill"

    @property
    def plain(self) -> bool:
        """Whether `alignment` and `window` say which keys are visible, so that no mask is needed."""
        flags = bool(self.alignment) and not self.alibi
        return flags or (self.mask == "none" and not self.is_causal)

    @property
    def architecture(self) -> str:
        """E.g. "sm90" or "gfx942"; "" on a device that has none."""
        return "sm{}{}".format(*self.capability) if self.capability else self.rocm or ""

    def describe(self) -> str:
        """Shapes and dtype in one line."""

        def sizes(*values: int | None) -> str:
            return "[" + ", ".join("?" if v is None else str(v) for v in values) + "]"

        query = sizes(self.batch_size, self.num_heads, self.q_len, self.head_dim)
        key = sizes(self.batch_size, self.num_kv_heads, self.kv_len, self.head_dim)
        where = f"{self.device} {self.architecture}".rstrip()
        return f"q={query} kv={key} {str(self.dtype).removeprefix('torch.')} {where}"
