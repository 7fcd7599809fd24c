"""The ops over plain keys and values, as `ops` registers them: schema, dispatch by device, fake."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .attention.arguments import DenseArguments, VarlenArguments
from .attention.select import BY_NAME, AttentionBackend
from .foreign_kv import FP8, check_stored, plain_tokens
from .op_checks import check_bool_mask, check_sizes, check_softcap
from .results import as_result, empty_result


def _backend(name: str) -> AttentionBackend:
    if name not in BY_NAME:
        raise ValueError(f"unknown attention backend {name!r}. Allowed: {', '.join(BY_NAME)}.")
    return BY_NAME[name]


def _pack_mask(attn_mask: torch.Tensor) -> torch.Tensor:
    check_bool_mask(attn_mask)
    if attn_mask.is_cuda:
        from .kernels.pack_mask import pack_mask
    else:
        from .reference_masks import pack_mask
    return pack_mask(attn_mask)


def _pack_mask_fake(attn_mask: torch.Tensor) -> torch.Tensor:
    return attn_mask.new_empty((*attn_mask.shape[:-1], (attn_mask.shape[-1] + 31) // 32), dtype=torch.int32)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    backend: str,
    softcap: float | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    check_softcap(softcap)
    check_sizes(q, k, v, heads=1)
    if q.is_cuda:
        from .kernels.decode import attend
    else:
        from .reference import attend
    out = attend(q, k, v, attn_mask, bounds, sinks, scale, softcap, lse)
    return out if q.is_cuda else as_result(out)


def _attend_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object, **named: object
) -> torch.Tensor:
    return empty_result(q, v.shape[-1])


def _attend_lse(q: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    attend: Callable[..., torch.Tensor] = partial(_attend, lse=lse)
    return attend(q, *rest, **named), lse


def _attend_lse_fake(q: torch.Tensor, *rest: Any, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _attend_fake(q, *rest), q.new_empty(q.shape[:-1], dtype=torch.float32)


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
    check_sizes(q, k, v, heads=1)
    attend = _backend(backend).attend
    if not q.is_cuda:
        from .reference_attention import dense_attention as attend
    if attend is None:
        raise ValueError(f"attention backend {backend!r} has another op")
    return attend(x).contiguous().transpose(1, 2)


def _dense_attn_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object, **named: object
) -> torch.Tensor:
    return empty_result(q, v.shape[-1])


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
    for stored in (k, v):
        check_stored(stored, q.dtype, kv_format, block_table)
    check_sizes(q, k, v, heads=-2)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        lengths = f"{list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k have shapes {lengths}: needs as many sequences")
    chosen = _backend(backend)
    if kv_format is not None and q.is_cuda and kv_format in chosen.formats(q.device, q.shape[-1]):
        k, v, kv_format = k.view(FP8[kv_format]), v.view(FP8[kv_format]), None
    if kv_format is not None or not (q.is_cuda and chosen.pages(q.device)):
        how = (q.dtype, kv_format, cu_seqlens_k, block_table, max_seqlen_k)
        k, v, block_table = plain_tokens(k, *how), plain_tokens(v, *how), None
    sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    x = VarlenArguments(q, k, v, *sizes, is_causal, scale * k_scale, block_table)
    if q.is_cuda and backend != "triton":
        varlen = chosen.varlen
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


_ATTEND_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? bounds, Tensor? sinks, float scale,"
    " str backend, float? softcap=None"
)

OPS = (
    ("pack_mask(Tensor attn_mask) -> Tensor", _pack_mask, _pack_mask_fake),
    (f"attend({_ATTEND_ARGS}) -> Tensor", _attend, _attend_fake),
    (f"attend_lse({_ATTEND_ARGS}) -> (Tensor, Tensor)", _attend_lse, _attend_lse_fake),
    (
        "dense_attn(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks,"
        " str alignment, int window_back, int window_ahead, float? softcap, float scale, str backend)"
        " -> Tensor",
        _dense_attn,
        _dense_attn_fake,
    ),
    (
        "varlen_attn(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
        ' int max_seqlen_q, int max_seqlen_k, bool is_causal, float scale, str backend="triton",'
        " str? kv_format=None, float k_scale=1., float v_scale=1., Tensor? block_table=None) -> Tensor",
        _varlen_attn,
        _varlen_attn_fake,
    ),
)
