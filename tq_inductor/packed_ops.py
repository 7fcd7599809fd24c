"""The ops over packed caches, as `ops` registers them: schema, dispatch by device, fake."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .beside import Beside, Chunk
from .format import KVFormat
from .op_checks import check_append, check_block_table, check_means, check_softcap
from .results import as_result, empty_result

_CACHE_ARGS = "Tensor seq_lens, Tensor k_rotation, Tensor v_rotation"
_BESIDE = "Tensor? k_mean=None, Tensor? exact=None, Tensor? exact_from=None, int sink_tokens=0"
_BESIDE_WRITTEN = (
    "Tensor(b!)? k_mean=None, Tensor(c!)? exact=None, Tensor(d!)? exact_from=None, int sink_tokens=0"
)
_LAST = "float? softcap=None, Tensor? block_table=None"
_OWN = "Tensor? own_k=None, Tensor? own_v=None"


def _own(k: torch.Tensor | None, v: torch.Tensor | None) -> Chunk | None:
    return None if k is None or v is None else (k, v)


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
    block_table: torch.Tensor | None = None,
) -> None:
    fmt = KVFormat(kv_format, k_rotation.shape[0], v_rotation.shape[0])
    check_append(cache, k, v, fmt, block_table is not None)
    check_block_table(block_table, cache, fmt, k.shape[0])
    check_means(k_mean, k.shape[0], k.shape[1], fmt.head_dim)
    if cache.is_cuda:
        from .kernels.store import store
    else:
        from .reference import store
    beside = Beside(k_mean, exact, exact_from, sink_tokens)
    store(cache, k, v, seq_lens, k_rotation, v_rotation, fmt, beside, block_table)


def _tq_store_fake(*arguments: object, **named: object) -> None:
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
    block_table: torch.Tensor | None = None,
    own_k: torch.Tensor | None = None,
    own_v: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    fmt = KVFormat(kv_format, k_rotation.shape[0], v_rotation.shape[0])
    if block_table is not None:
        check_block_table(block_table, cache, fmt, block_table.shape[0], max_len)
    batch = (cache if block_table is None else block_table).shape[0]
    check_means(k_mean, batch, cache.shape[1], fmt.head_dim, max_len)
    if cache.is_cuda:
        from .kernels.dequantize import dequantize
    else:
        from .reference import dequantize
    last = (Beside(k_mean, exact, exact_from, sink_tokens), block_table, _own(own_k, own_v))
    return dequantize(cache, seq_lens, k_rotation, v_rotation, fmt, max_len, dtype, *last)


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
    block_table: torch.Tensor | None = None,
    own_k: torch.Tensor | None = None,
    own_v: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads = (cache if block_table is None else block_table).shape[0], cache.shape[1]
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
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
    own_k: torch.Tensor | None = None,
    own_v: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    check_softcap(softcap)
    fmt = KVFormat(kv_format, k_rotation.shape[0], v_rotation.shape[0])
    check_block_table(block_table, cache, fmt, q.shape[0], max_len)
    check_means(k_mean, q.shape[0], cache.shape[1], fmt.head_dim, max_len)
    if cache.is_cuda:
        from .kernels.decode import decode
    else:
        from .reference import decode
    beside = Beside(k_mean, exact, exact_from, sink_tokens)
    out = decode(
        q, cache, seq_lens, k_rotation, v_rotation, attn_mask, bounds, sinks, fmt, max_len, scale, beside,
        softcap, block_table, lse, _own(own_k, own_v),
    )  # fmt: skip
    return out if cache.is_cuda else as_result(out)


def _tq_decode_lse(
    q: torch.Tensor, cache: torch.Tensor, *rest: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    decode: Callable[..., torch.Tensor] = partial(_tq_decode, lse=lse)
    return decode(q, cache, *rest, **named), lse


def _tq_decode_fake(
    q: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    *rest: object,
    **named: object,
) -> torch.Tensor:
    return empty_result(q, v_rotation.shape[0])


def _tq_decode_lse_fake(q: torch.Tensor, *rest: Any, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _tq_decode_fake(q, *rest), q.new_empty(q.shape[:-1], dtype=torch.float32)


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
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
    own: bool = False,
) -> torch.Tensor:
    check_softcap(softcap)
    fmt = KVFormat(kv_format, k_rotation.shape[0], v_rotation.shape[0])
    check_append(cache, k, v, fmt, block_table is not None)
    check_block_table(block_table, cache, fmt, q.shape[0], max_len)
    check_means(k_mean, q.shape[0], cache.shape[1], fmt.head_dim, max_len)
    if cache.is_cuda:
        from .kernels.append import append_and_attend

        return append_and_attend(
            cache, q, k, v, seq_lens, k_rotation, v_rotation, attn_mask, bounds, sinks, fmt, max_len, scale,
            Beside(k_mean, exact, exact_from, sink_tokens), softcap, block_table, own,
        )  # fmt: skip
    beside = (k_mean, exact, exact_from, sink_tokens)
    _tq_store(cache, k, v, seq_lens, k_rotation, v_rotation, kv_format, *beside, block_table)
    return _tq_decode(
        q, cache, seq_lens, k_rotation, v_rotation, attn_mask, bounds, sinks, kv_format, max_len, scale,
        *beside, softcap, block_table, *((k, v) if own else ()),
    )  # fmt: skip


def _tq_append_attend_fake(
    cache: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    *rest: object,
    **named: object,
) -> torch.Tensor:
    return empty_result(q, v_rotation.shape[0])


_DECODE_ARGS = (
    f"Tensor q, Tensor cache, {_CACHE_ARGS}, Tensor? attn_mask, Tensor? bounds, Tensor? sinks,"
    f" str kv_format, SymInt max_len, float scale, {_BESIDE}, {_LAST}, {_OWN}"
)

OPS = (
    (
        f"tq_store(Tensor(a!) cache, Tensor k, Tensor v, {_CACHE_ARGS}, str kv_format, {_BESIDE_WRITTEN},"
        " Tensor? block_table=None) -> ()",
        _tq_store,
        _tq_store_fake,
    ),
    (
        f"tq_dequantize(Tensor cache, {_CACHE_ARGS}, str kv_format, SymInt max_len, ScalarType dtype,"
        f" {_BESIDE}, Tensor? block_table=None, {_OWN}) -> (Tensor, Tensor)",
        _tq_dequantize,
        _tq_dequantize_fake,
    ),
    (f"tq_decode({_DECODE_ARGS}) -> Tensor", _tq_decode, _tq_decode_fake),
    (f"tq_decode_lse({_DECODE_ARGS}) -> (Tensor, Tensor)", _tq_decode_lse, _tq_decode_lse_fake),
    (
        f"tq_append_attend(Tensor(a!) cache, Tensor q, Tensor k, Tensor v, {_CACHE_ARGS},"
        " Tensor? attn_mask, Tensor? bounds, Tensor? sinks, str kv_format, SymInt max_len, float scale,"
        f" {_BESIDE_WRITTEN}, {_LAST}, bool own=False) -> Tensor",
        _tq_append_attend,
        _tq_append_attend_fake,
    ),
)
