"""The ops of namespace `tq_inductor`: schemas, fakes and dispatch.

On a CPU they run the reference implementation, on a GPU the Triton kernels; both are imported when
an op is first called, so that registering the ops needs neither. Defined by `torch.library.Library`
because its calls cost a tenth of a mutating `custom_op` (pytorch/pytorch#139500).

Shapes: `B` batch, `H` query heads, `Hkv` KV heads, `q` new tokens, `D` head dimension.

- `cache`: uint8 `[B, Hkv, page_bytes]`, one page per batch row, laid out as `format` says.
- `seq_lens`: int64 `[]` or `[B]`, tokens in each row, on the device; *after* the append for ops that
  append, which put their tokens at positions `seq_lens - q .. seq_lens - 1` and skip those that fall
  outside the page. A row with more than `max_len` tokens has lost some: it reads as NaN.
- `k_rotation`, `v_rotation`: float32 `[D, D]`, `rotation_matrix(D)` and nothing else (kernels know its
  structure); for a lossless format only their sizes are used.
- `attn_mask`: bool or float, broadcastable to `[B, H, q, max_len]`. It alone decides what is visible;
  slots past `seq_lens` are keys and values of zeros, as in SDPA over what `tq_dequantize` returns.
- `bounds`: int32, broadcastable to `[B, q, 2]`: of the keys that the mask lets through, query i of row b
  sees `bounds[b, i, 0] <= k < bounds[b, i, 1]`. With neither bounds nor mask the queries of `tq_decode`
  are the last `q` tokens and see all before and themselves; those of `attend` see everything.
- `sinks`: float `[H]`: a score per head that takes part in the softmax and has no value.
- `k_mean`, `exact`, `exact_from`, `sink_tokens`: what a packed cache keeps beside its bytes (`beside` says
  what they hold and when a store changes them); absent for a lossless format.
- `attend`: q `[B, H, q, D]`, k `[B, Hkv, L, D]`, v `[B, Hkv, L, Dv]` in 16 or 32 bits, read only within
  `bounds`; `backend` names the attention backend.
- `dense_attn`: q, k and v as for `attend`, by the attention backend named `backend`. What is visible is
  said by `attn_mask`, or by `alignment` and `window_back`, `window_ahead` (-1: no limit): see
  `AttentionCall`. `alibi_slopes` float `[H]`: a slope times `key - query` is added to a score.
- `varlen_attn`: q `[Tq, H, D]`, k `[Tk, Hkv, D]`, v `[Tk, Hkv, Dv]`; `cu_seqlens` int32
  `[sequences + 1]`, where each sequence starts and the last ends; causal is aligned bottom-right. Tokens
  after the last sequence give zeros. `backend` names the attention backend. `kv_format` "e4m3" or "e5m2": k
  and v are such bytes, and numbers times `k_scale` and `v_scale`. `block_table` int32 `[sequences, n]`: k
  and v are pages `[pages, page_size, Hkv, D]`, and these those of each sequence.

A query without a visible key gives zeros.
"""

from __future__ import annotations

import torch

from .attention.arguments import DenseArguments, VarlenArguments
from .attention.select import BY_NAME
from .beside import Beside
from .foreign_kv import plain_tokens
from .format import KVFormat

_lib = torch.library.Library("tq_inductor", "DEF")

_CACHE_ARGS = "Tensor seq_lens, Tensor k_rotation, Tensor v_rotation"
_BESIDE = "Tensor? k_mean=None, Tensor? exact=None, Tensor? exact_from=None, int sink_tokens=0"
_BESIDE_WRITTEN = (
    "Tensor(b!)? k_mean=None, Tensor(c!)? exact=None, Tensor(d!)? exact_from=None, int sink_tokens=0"
)

for _schema in (
    f"tq_store(Tensor(a!) cache, Tensor k, Tensor v, {_CACHE_ARGS}, str kv_format, {_BESIDE_WRITTEN})"
    " -> ()",
    f"tq_dequantize(Tensor cache, {_CACHE_ARGS}, str kv_format, SymInt max_len, ScalarType dtype,"
    f" {_BESIDE}) -> (Tensor, Tensor)",
    f"tq_decode(Tensor q, Tensor cache, {_CACHE_ARGS}, Tensor? attn_mask,"
    f" Tensor? bounds, Tensor? sinks, str kv_format, SymInt max_len, float scale, {_BESIDE}) -> Tensor",
    f"tq_append_attend(Tensor(a!) cache, Tensor q, Tensor k, Tensor v, {_CACHE_ARGS},"
    " Tensor? attn_mask, Tensor? bounds, Tensor? sinks, str kv_format, SymInt max_len, float scale,"
    f" {_BESIDE_WRITTEN}) -> Tensor",
    "attend(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? bounds, Tensor? sinks, float scale,"
    " str backend) -> Tensor",
    "dense_attn(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks,"
    " str alignment, int window_back, int window_ahead, float? softcap, float scale, str backend)"
    " -> Tensor",
    "varlen_attn(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    ' int max_seqlen_q, int max_seqlen_k, bool is_causal, float scale, str backend="triton",'
    " str? kv_format=None, float k_scale=1., float v_scale=1., Tensor? block_table=None) -> Tensor",
    "tq_refuse_backward(Tensor grad) -> Tensor",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _tq_store(
    cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    kv_format: str,
    k_mean: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    exact_from: torch.Tensor | None = None,
    sink_tokens: int = 0,
) -> None:
    if cache.is_cuda:
        from .kernels.store import store
    else:
        from .reference import store
    fmt = KVFormat(kv_format, k_rotation.shape[0], v_rotation.shape[0])
    beside = Beside(k_mean, exact, exact_from, sink_tokens)
    store(cache, k, v, seq_lens, k_rotation, v_rotation, fmt, beside)


def _tq_store_fake(
    cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    kv_format: str,
    k_mean: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    exact_from: torch.Tensor | None = None,
    sink_tokens: int = 0,
) -> None:
    return None


def _tq_dequantize(
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    kv_format: str,
    max_len: int,
    dtype: torch.dtype,
    k_mean: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    exact_from: torch.Tensor | None = None,
    sink_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    if cache.is_cuda:
        from .kernels.dequantize import dequantize
    else:
        from .reference import dequantize
    fmt = KVFormat(kv_format, k_rotation.shape[0], v_rotation.shape[0])
    beside = Beside(k_mean, exact, exact_from, sink_tokens)
    return dequantize(cache, seq_lens, k_rotation, v_rotation, fmt, max_len, dtype, beside)


def _tq_dequantize_fake(
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    kv_format: str,
    max_len: int,
    dtype: torch.dtype,
    k_mean: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    exact_from: torch.Tensor | None = None,
    sink_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, _ = cache.shape
    return (
        cache.new_empty((batch, heads, max_len, k_rotation.shape[0]), dtype=dtype),
        cache.new_empty((batch, heads, max_len, v_rotation.shape[0]), dtype=dtype),
    )


def _tq_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_format: str,
    max_len: int,
    scale: float,
    k_mean: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    exact_from: torch.Tensor | None = None,
    sink_tokens: int = 0,
) -> torch.Tensor:
    if cache.is_cuda:
        from .kernels.decode import decode
    else:
        from .reference import decode
    fmt = KVFormat(kv_format, k_rotation.shape[0], v_rotation.shape[0])
    beside = Beside(k_mean, exact, exact_from, sink_tokens)
    return decode(
        q, cache, seq_lens, k_rotation, v_rotation, attn_mask, bounds, sinks, fmt, max_len, scale, beside
    )


def _tq_decode_fake(
    q: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_format: str,
    max_len: int,
    scale: float,
    k_mean: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    exact_from: torch.Tensor | None = None,
    sink_tokens: int = 0,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v_rotation.shape[0]))


def _tq_append_attend(
    cache: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_format: str,
    max_len: int,
    scale: float,
    k_mean: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    exact_from: torch.Tensor | None = None,
    sink_tokens: int = 0,
) -> torch.Tensor:
    if cache.is_cuda:
        from .kernels.append import append_and_attend

        fmt = KVFormat(kv_format, k_rotation.shape[0], v_rotation.shape[0])
        return append_and_attend(
            cache, q, k, v, seq_lens, k_rotation, v_rotation, attn_mask, bounds, sinks, fmt, max_len, scale,
            Beside(k_mean, exact, exact_from, sink_tokens),
        )  # fmt: skip
    beside = (k_mean, exact, exact_from, sink_tokens)
    _tq_store(cache, k, v, seq_lens, k_rotation, v_rotation, kv_format, *beside)
    return _tq_decode(
        q, cache, seq_lens, k_rotation, v_rotation, attn_mask, bounds, sinks, kv_format, max_len, scale,
        *beside,
    )  # fmt: skip


def _tq_append_attend_fake(
    cache: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_format: str,
    max_len: int,
    scale: float,
    k_mean: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    exact_from: torch.Tensor | None = None,
    sink_tokens: int = 0,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v_rotation.shape[0]))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    if q.is_cuda:
        from .kernels.decode import attend
    else:
        from .reference import attend
    return attend(q, k, v, attn_mask, bounds, sinks, scale)


def _attend_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _dense_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alignment: str,
    window_back: int,
    window_ahead: int,
    softcap: float | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    window = tuple(None if side < 0 else side for side in (window_back, window_ahead))
    x = DenseArguments(q, k, v, attn_mask, alibi_slopes, sinks, alignment, window, softcap, scale)  # type: ignore[arg-type]
    attend = BY_NAME[backend].attend
    if not q.is_cuda:
        from .reference_attention import dense_attention as attend
    if attend is None:
        raise ValueError(f"attention backend {backend!r} has another op")
    return attend(x).contiguous().transpose(1, 2)


def _dense_attn_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object, **named: object
) -> torch.Tensor:
    batch, heads, q_len, _ = q.shape
    return q.new_empty((batch, q_len, heads, v.shape[-1])).transpose(1, 2)


def _varlen_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    backend: str = "triton",
    kv_format: str | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    stored = (q.dtype, kv_format, cu_seqlens_k, block_table, max_seqlen_k)
    k, v = plain_tokens(k, *stored), plain_tokens(v, *stored)
    sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    x = VarlenArguments(q, k, v, *sizes, is_causal, scale * k_scale)
    if q.is_cuda and backend != "triton":
        varlen = BY_NAME[backend].varlen
        if varlen is None:
            raise ValueError(f"attention backend {backend!r} takes no ragged sequences")
        out = varlen(x)
    else:
        if q.is_cuda:
            from .kernels.varlen import varlen_attention
        else:
            from .reference_attention import varlen_attention
        out = varlen_attention(q, k, v, *sizes, is_causal, scale * k_scale)
    return out if v_scale == 1.0 else out * v_scale


def _varlen_attn_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object, **named: object
) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _tq_refuse_backward(grad: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(
        "a packed KV cache, and attention over a cache, have no backward: run inference under "
        "torch.no_grad(), or train without a cache."
    )


def _tq_refuse_backward_fake(grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grad)


for _name, _impl, _fake in (
    ("tq_store", _tq_store, _tq_store_fake),
    ("tq_dequantize", _tq_dequantize, _tq_dequantize_fake),
    ("tq_decode", _tq_decode, _tq_decode_fake),
    ("tq_append_attend", _tq_append_attend, _tq_append_attend_fake),
    ("attend", _attend, _attend_fake),
    ("dense_attn", _dense_attn, _dense_attn_fake),
    ("varlen_attn", _varlen_attn, _varlen_attn_fake),
    ("tq_refuse_backward", _tq_refuse_backward, _tq_refuse_backward_fake),
):
    _lib.impl(_name, _impl, "CPU")
    _lib.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"tq_inductor::{_name}", _fake, lib=_lib)


def _backward_refused(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> None:
    torch.ops.tq_inductor.tq_refuse_backward(grad)


for _name in ("tq_decode", "attend", "dense_attn", "varlen_attn"):
    torch.library.register_autograd(f"tq_inductor::{_name}", _backward_refused, lib=_lib)
