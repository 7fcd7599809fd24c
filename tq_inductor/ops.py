"""The ops of namespace `tq_inductor`: schemas, fakes and dispatch.

On a CPU they run the reference implementation, on a GPU the Triton kernels; both are imported when
an op is first called, so that registering the ops needs neither. Defined by `torch.library.Library`
because its calls cost a tenth of a mutating `custom_op` (pytorch/pytorch#139500).

Shapes: `B` batch, `H` query heads, `Hkv` KV heads, `q` new tokens, `D` head dimension.

- `cache`: uint8 `[B, Hkv, page_bytes]`, one page per batch row, laid out as `format` says.
- `block_table`: int32 `[B, n]`: `cache` is then `[pages, Hkv, page_bytes]`, pages of a multiple of 16
  tokens; token p of row b lies in page `block_table[b, p // page_size]`, -1: it has none. Tokens without a
  page, or past the table, are not stored. A query that sees a token without a page gives NaN; `max_len` is
  at most what the table has room for. What lies beside is of batch rows: those that share a page need the
  same mean.
- `seq_lens`: int64 `[]` or `[B]`, tokens in each row, on the device; *after* the append for ops that
  append, which put their tokens at positions `seq_lens - q .. seq_lens - 1` and skip those that fall
  outside the page. A row with more than `max_len` tokens has lost some: it reads as NaN.
- `k_rotation`, `v_rotation`: float32 `[D, D]`, `rotation_matrix(D)` and nothing else (kernels know its
  structure); for a lossless format only their sizes are used.
- `attn_mask`: bool or float, broadcastable to `[B, H, q, max_len]`. It alone decides what is visible;
  slots past `seq_lens` are keys and values of zeros, as in SDPA over what `tq_dequantize` returns.
  For `attend` it may be what `pack_mask` made of a bool one: int32 `[..., ceil(max_len / 32)]`, where bit j
  of word w is key 32 w + j. Many queries read that faster, and one serves all layers.
- `bounds`: int32, broadcastable to `[B, q, 2]`: of the keys that the mask lets through, query i of row b
  sees `bounds[b, i, 0] <= k < bounds[b, i, 1]`. With neither bounds nor mask the queries of `tq_decode`
  are the last `q` tokens and see all before and themselves; those of `attend` see everything. Or
  `[B, q, 4]`: the mask lets all keys `bounds[b, i, 2] <= k < bounds[b, i, 3]` through, and need not be read
  there.
- `sinks`: float `[H]`: a score per head that takes part in the softmax and has no value.
- `softcap`: a positive number: scaled scores s become `softcap * tanh(s / softcap)`, before a mask adds to
  them; sinks are not changed.
- `tq_decode_lse`, `attend_lse`: the result of `tq_decode`, `attend`, and float32 `[B, H, q]`, the natural
  logarithm of the softmax's denominator: -inf for a query without a visible key, NaN in rows of NaN. Sinks
  count in it, as in FlashAttention-3 and FlashInfer: of parts that are merged by it only one may have them.
- `k_mean`, `exact`, `exact_from`, `sink_tokens`: what a packed cache keeps beside its bytes (`beside` says
  what they hold and when a store changes them); absent for a lossless format.
- `own_k`, `own_v` of `tq_dequantize` and `tq_decode`, `[B, Hkv, n, D]`: the last n tokens of each row as
  they came, which are then not read from the cache. `own` of `tq_append_attend`: whether k and v are that.
- `attend`: q `[B, H, q, D]`, k `[B, Hkv, L, D]`, v `[B, Hkv, L, Dv]` in 16 or 32 bits, read only within
  `bounds`; `backend` names the attention backend.
- `dense_attn`: q, k and v as for `attend`, by the attention backend named `backend`. What is visible is
  said by `attn_mask`, or by `alignment` and `window_back`, `window_ahead` (-1: no limit): see
  `AttentionCall`. `alibi_slopes` float `[H]`: a slope times `key - query` is added to a score.
- `varlen_attn`: q `[Tq, H, D]`, k `[Tk, Hkv, D]`, v `[Tk, Hkv, Dv]`; `cu_seqlens` int32
  `[sequences + 1]`, where each sequence starts and the last ends; causal is aligned bottom-right. Tokens
  after the last sequence give zeros. `backend` names the attention backend. `kv_format` "e4m3" or "e5m2": k
  and v are such bytes, and numbers times `k_scale` and `v_scale`. `block_table` int32 `[sequences, n]`: k
  and v are pages `[pages, page_size, Hkv, D]`, and these those of each sequence; for "fa4" and
  "flashinfer", which read pages where they lie, what a page holds behind the end of its sequence has to be
  finite. "flashinfer" reads lengths on the host when they have changed; for CUDA graphs see its `plan`.

A query without a visible key gives zeros.
"""

from __future__ import annotations

import torch

from . import attention_ops, packed_ops

_lib = torch.library.Library("tq_inductor", "DEF")


def _tq_refuse_backward(grad: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(
        "a packed KV cache, and attention over a cache, have no backward: run inference under "
        "torch.no_grad(), or train without a cache."
    )


def _tq_refuse_backward_fake(grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grad)


_REFUSE = ("tq_refuse_backward(Tensor grad) -> Tensor", _tq_refuse_backward, _tq_refuse_backward_fake)

for _schema, _impl, _fake in (*packed_ops.OPS, *attention_ops.OPS, _REFUSE):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _name = _schema.split("(")[0]
    _lib.impl(_name, _impl, "CPU")
    _lib.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"tq_inductor::{_name}", _fake, lib=_lib)


def _backward_refused(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> None:
    torch.ops.tq_inductor.tq_refuse_backward(grads[0])


for _name in ("tq_decode", "tq_decode_lse", "attend", "attend_lse", "dense_attn", "varlen_attn"):
    torch.library.register_autograd(f"tq_inductor::{_name}", _backward_refused, lib=_lib)
