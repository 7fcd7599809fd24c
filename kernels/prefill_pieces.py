"""Attention of many query rows over packed tokens that are unpacked first, a piece of the cache at a time.

For each piece there are two launches. `unpack_kernel` writes its keys and values in float16, rotated as
they lie, to a workspace of at most `WORKSPACE` bytes, so that a tile is unpacked once and not once for
every 128 query rows. `piece_kernel` attends to them, going on from where the pieces before left its
partials, which are `prefill`'s. Pieces past the length of all rows do nothing.

float16 holds a centroid times its scale within 2**-12 if that is in range: the unit of a piece, one for
keys and one for values of each KV head, is its largest scale.
Bytes: the packed rows once, the workspace once written and once read for each block of rows (both in the
second-level cache where they fit), partials read and written once a piece.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..beside import SEGMENT, Beside
from ..format import PAGE_ALIGNMENT, KVFormat
from .bits import TINY, lookup_words, magnitude_words, sm_count, whole_waves
from .centroids import asm_for, unit_of
from .decode_query import Queries
from .decode_reduce import reduce_splits
from .exact import Parts
from .mean_scores import mean_scores
from .prefill import (
    WEIGHT_BITS,
    WEIGHT_UNIT,
    empty_partials,
    load_keys,
    load_values,
    visible_prefix,
    whole_slots,
)
from .prefill_wgmma import WGMMA_TILE, describe, wgmma_piece_kernel
from .scores import FLOAT_MASK, KEY_MASK, NO_MASK, has_whole, hide, mask_arguments, squash
from .segments import MEAN_OF
from .wgmma_tiles import has_wgmma

WORKSPACE = 64 << 20  # bytes, whatever the context is
LEAST_ROWS = 256  # query rows of a KV head: for fewer `prefill`, which unpacks a tile for 128, is faster
LEAST_PIECE = 4096  # tokens, as long as one row of the batch has the workspace alone
ALIGNMENT = tl.constexpr(128)  # of pieces, in tokens: whole tiles of both kernels
UNPACK_TILE = 64  # tokens
UNPACK_PROGRAMS_PER_SM = 6  # each reads all scales of the piece first
RANGE = tl.constexpr(64.0)  # times the largest centroid, 448: near the end of float16


@triton.jit
def largest_scale(scale_ptr, count, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest finite magnitude of `count` scales; 1 if all are zero."""
    largest = 0.0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        # A mask per group of tokens, for wide loads.
        scale = tl.load(scale_ptr + place, mask=place // GROUP * GROUP < count, other=0.0).to(tl.float32)
        counts = (place < count) & (tl.abs(scale) < float("inf"))
        largest = tl.maximum(largest, tl.max(tl.where(counts, tl.abs(scale), 0.0), axis=0))
    return tl.where(largest > 0.0, tl.maximum(largest, TINY * 2.0**60), 1.0)


@triton.jit
def unpack_side(
    rows_ptr, scale_ptr, out_ptr, unit_ptr, begin, end, first, filled, piece, VALUES: tl.constexpr,
    BITS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, TABLE: tl.constexpr, DIM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Places `begin` .. `end` - 1 of the piece that starts at slot `first`, and the piece's unit."""
    scale_ptr = scale_ptr.to(tl.pointer_type(tl.bfloat16)) + first
    rows_ptr = rows_ptr.to(tl.pointer_type(tl.int32))
    count = tl.minimum(filled - first, piece)
    unit = largest_scale(scale_ptr, count, GROUP, 4096) / RANGE
    if begin == 0:
        tl.store(unit_ptr, unit)
    dims = tl.arange(0, DIM)
    end = tl.minimum(end, tl.cdiv(count, ALIGNMENT) * ALIGNMENT)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        known = place < count
        scale = tl.load(scale_ptr + place, mask=known, other=0.0).to(tl.float32) * (unit_of(ASM) / unit)
        if VALUES:
            x = load_values(rows_ptr, first + start, filled, BITS, LO, HI, TABLE, DIM, GROUP, BLOCK_N, ASM)
        else:
            x = load_keys(rows_ptr, first + start, filled, BITS, LO, HI, TABLE, DIM, BLOCK_N, ASM)
        x = x.to(tl.float32) * scale[:, None]
        if BITS == 8:  # stale bytes may be NaN, which no scale of zero hides
            x = tl.where(known[:, None], x, 0.0)
        tl.store(out_ptr + place[:, None] * DIM + dims[None, :], x.to(tl.float16))


@triton.jit(do_not_specialize=["batch_from"])
def unpack_kernel(
    cache_ptr, seq_lens_ptr, k_ptr, v_ptr, unit_ptr, cache_stride_b, cache_stride_h, lens_stride,
    v_rows_offset, k_scales_offset, v_scales_offset, kv_heads, batch_from, own, max_len, first, piece, run,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_LO: tl.constexpr, K_HI: tl.constexpr,
    V_LO: tl.constexpr, V_HI: tl.constexpr, K_TABLE: tl.constexpr, V_TABLE: tl.constexpr,
    K_ASM: tl.constexpr, V_ASM: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys or values of a run of slots `first` .. `first + piece - 1`, but the `own` last tokens."""
    side, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch = batch_from + row // kv_heads
    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    filled = tl.minimum(seq_len - own, max_len).to(tl.int32)
    begin = tl.program_id(0) * run
    if first + begin >= filled:
        return
    head_ptr = cache_ptr + batch * cache_stride_b + row % kv_heads * cache_stride_h
    unit_ptr += row * 2
    end = tl.minimum(begin + run, piece)
    if side == 0:
        unpack_side(
            head_ptr, head_ptr + k_scales_offset, k_ptr + row * piece * K_DIM, unit_ptr, begin, end, first,
            filled, piece, False, K_BITS, K_LO, K_HI, K_TABLE, K_DIM, GROUP, BLOCK_N, K_ASM,
        )  # fmt: skip
    else:
        unpack_side(
            head_ptr + v_rows_offset, head_ptr + v_scales_offset, v_ptr + row * piece * V_DIM, unit_ptr + 1,
            begin, end, first, filled, piece, True, V_BITS, V_LO, V_HI, V_TABLE, V_DIM, GROUP, BLOCK_N,
            V_ASM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch_from"])
def piece_kernel(
    q_ptr, factor_ptr, k_tiles, v_tiles, unit_ptr, seq_lens_ptr, exact_from_ptr, bounds_ptr, partial_ptr,
    log_ptr, lens_stride, from_stride, bounds_stride_b, bounds_stride_t, q_len, own, max_len, batch_from,
    first, piece, splits, mean_score_ptr, segments, mask_ptr, mask_stride_b, mask_stride_h, mask_stride_t,
    mask_stride_n, K_DIM: tl.constexpr, V_DIM: tl.constexpr, HEADS: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_WHOLE: tl.constexpr, HAS_MEAN: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention over slots `first` .. `first + piece - 1`; partials [batch, KV head, row, split, dim].

    A split goes on from its partials, unless this is the first piece.
    """
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64) + batch_from
    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    if (first > 0) & (first >= seq_len - own):
        return
    rows = q_len * HEADS
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    token, head = row // HEADS, kv_head * HEADS + row % HEADS
    bounds_ptr += batch * bounds_stride_b
    low, high = visible_prefix(
        bounds_ptr, bounds_stride_t, exact_from_ptr + batch * from_stride, token, valid, seq_len, q_len,
        own, max_len, SINKS, RECENT, HAS_BOUNDS, MASK,
    )  # fmt: skip
    low, high = tl.maximum(low, first), tl.minimum(high, first + piece)
    seen = valid & (low < high)
    begin = tl.min(tl.where(seen, low, first + piece), axis=0) // BLOCK_N * BLOCK_N
    end = tl.max(tl.where(seen, high, 0), axis=0)
    run = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * run
    end = tl.minimum(begin + run, end)
    if (first > 0) & (begin >= end):
        return

    group_row = (batch * tl.num_programs(1) + kv_head) * rows + row
    dims, columns = tl.arange(0, K_DIM), tl.arange(0, V_DIM)
    kv_row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)  # of the workspace
    place = kv_row * piece - first
    q = tl.load(q_ptr + group_row[:, None] * K_DIM + dims[None, :], mask=valid[:, None], other=0.0)
    unit = tl.load(unit_ptr + kv_row * 2)
    factor = tl.maximum(tl.load(factor_ptr + group_row, mask=valid, other=0.0) * unit, TINY)
    mean_ptrs = mean_score_ptr + kv_row.to(tl.int64) * segments * rows + row
    mask_ptr += batch * mask_stride_b + head * mask_stride_h + token.to(tl.int64) * mask_stride_t
    whole_from, whole_to = whole_slots(
        bounds_ptr, bounds_stride_t, token, valid, low, high, max_len, HAS_WHOLE, MASK
    )

    part = group_row * splits + split
    resumed = valid & (first + 0 * row > 0)
    peak = tl.load(log_ptr + part, mask=resumed, other=float("-inf"))
    total = tl.where(peak == float("-inf"), 0.0, WEIGHT_UNIT)
    partial_ptrs = partial_ptr + part[:, None] * V_DIM + columns[None, :]
    v_unit = tl.load(unit_ptr + kv_row * 2 + 1)
    acc = tl.load(partial_ptrs, mask=(total > 0.0)[:, None], other=0.0) * (WEIGHT_UNIT / v_unit)
    # Factors are positive, so a maximum need not wait for them, nor for the mean of a tile's keys.
    EARLY: tl.constexpr = SOFTCAP == 0 and MASK != FLOAT_MASK
    slope = factor if EARLY else factor * 0.0 + 1.0
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        k = k_tiles.load([place + start, 0])
        scores = tl.dot(q, tl.trans(k))
        mean_score = tl.zeros([BLOCK_M], tl.float32)
        if HAS_MEAN:
            mean_score = tl.load(
                mean_ptrs + (start // MEAN_OF - first // MEAN_OF) * rows, mask=valid, other=0.0
            )
        if not EARLY:
            scores = squash(scores * factor[:, None] + mean_score[:, None], SOFTCAP)
            mean_score = tl.zeros([BLOCK_M], tl.float32)
        if (start < whole_from) | (start + BLOCK_N > whole_to):
            visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
            scores = hide(scores, visible, mask_ptr, slot, mask_stride_n, valid, MASK)
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * slope + mean_score)
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * slope[:, None] - (origin - mean_score - WEIGHT_BITS)[:, None])
        decay = tl.exp2(peak - origin)
        total = total * decay + tl.sum(weights, axis=1)
        v = v_tiles.load([place + start, 0])
        acc = tl.dot(weights.to(tl.float16), v, acc * decay[:, None])
        peak = new_peak

    out = acc * (v_unit / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(partial_ptrs, out, mask=valid[:, None])
    tl.store(log_ptr + part, peak + (tl.log2(total) - WEIGHT_BITS), mask=valid)


def takes_pieces(q: torch.Tensor, kv_heads: int) -> bool:
    """Whether q `[B, H, q, D]`, which `prefill` takes, has so many rows that unpacking first is faster."""
    return q.shape[2] * q.shape[1] // kv_heads >= LEAST_ROWS


def split_workspace(fmt: KVFormat, batch: int, kv_heads: int, max_len: int) -> tuple[int, int]:
    """(rows of the batch, tokens of each) that the workspace has at once."""
    align = ALIGNMENT.value
    all_tokens = triton.cdiv(max_len, align) * align
    room = WORKSPACE // (2 * (fmt.head_dim + fmt.v_head_dim) * kv_heads)
    together = max(1, min(batch, room // min(all_tokens, LEAST_PIECE)))
    return together, min(all_tokens, max(align, room // together // align * align))


def tile_of(dim: int, roomy: bool, masked: bool) -> tuple[int, int]:
    """`(BLOCK_M, BLOCK_N)` of `piece_kernel`; `roomy`: it may have more than 99 KiB of shared memory."""
    large = dim > 128
    if not roomy:
        return (64, 32) if large else (128, 64)
    block_n = 64 if large else 128
    return 128, block_n // 2 if masked else block_n  # with a mask there are too few registers


def is_roomy(device: torch.device) -> bool:
    """Whether a block may have 227 KiB of shared memory."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] in (9, 10)


def attend_by_pieces(
    out: torch.Tensor, q: torch.Tensor, rotated: Queries, cache: torch.Tensor, seq_lens: torch.Tensor,
    v_rotation: torch.Tensor, attn_mask: torch.Tensor | None, bounds: torch.Tensor | None,
    sinks: torch.Tensor | None, max_len: int, scale: float, softcap: float | None,
    lse: torch.Tensor | None, fmt: KVFormat, beside: Beside, own: int, parts: Parts | None,
) -> None:  # fmt: skip
    """`prefill.attend_to_prefix`, with at most `WORKSPACE` bytes more for keys and values."""
    queries, factors = rotated
    batch, kv_heads, rows, _ = queries.shape
    dims, group = (fmt.head_dim, fmt.v_head_dim), rows // q.shape[2]
    together, piece = split_workspace(fmt, batch, kv_heads, max_len)
    k, v = (queries.new_empty((together * kv_heads * piece, dim)) for dim in dims)
    units = factors.new_empty((together, kv_heads, 2))
    lens_stride, exact_from = seq_lens.expand(batch).stride(0), beside.exact_from
    _, v_rows, k_scales, v_scales = fmt.planes(fmt.page_size(cache.shape[-1]))
    (k_lo, k_hi), (v_lo, v_hi) = magnitude_words(fmt.k_bits), magnitude_words(fmt.v_bits)
    codes = dict(
        K_BITS=fmt.k_bits, V_BITS=fmt.v_bits, K_LO=k_lo, K_HI=k_hi, V_LO=v_lo, V_HI=v_hi,
        K_TABLE=lookup_words(fmt.k_bits)[0], V_TABLE=lookup_words(fmt.v_bits)[0],
        K_ASM=asm_for(fmt.k_bits, q.device), V_ASM=asm_for(fmt.v_bits, q.device), K_DIM=fmt.head_dim,
        V_DIM=fmt.v_head_dim, GROUP=PAGE_ALIGNMENT, BLOCK_N=UNPACK_TILE, num_warps=4,
    )  # fmt: skip
    sms = sm_count(queries.device)
    aligned = 2 * together * kv_heads * piece // ALIGNMENT.value  # so that a run ends with zeros
    run = ALIGNMENT.value * triton.cdiv(aligned, UNPACK_PROGRAMS_PER_SM * sms)
    kind, mask, mask_strides = mask_arguments(attn_mask, q, max_len)
    visible = dict(
        K_DIM=fmt.head_dim, V_DIM=fmt.v_head_dim, HEADS=group, SINKS=beside.sink_tokens,
        RECENT=beside.recent_tokens, HAS_BOUNDS=bounds is not None, HAS_WHOLE=has_whole(bounds, kind),
        HAS_MEAN=beside.k_mean is not None,
    )  # fmt: skip
    kernel: Any = piece_kernel
    if has_wgmma(q.device) and max(dims) <= 128 and kind in (NO_MASK.value, KEY_MASK.value) and not softcap:
        kernel, (block_m, block_n) = wgmma_piece_kernel, WGMMA_TILE
        tiles, others = [describe(x) for x in (k, v)], (mask, mask_strides[0], mask_strides[3])
        constants = dict(MASK=kind, num_warps=8)
    else:
        block_m, block_n = tile_of(max(dims), is_roomy(q.device), attn_mask is not None)
        tiles = [TensorDescriptor.from_tensor(x, [block_n, x.shape[1]]) for x in (k, v)]
        others = (mask, *mask_strides)
        constants = dict(
            MASK=kind, SOFTCAP=softcap or 0.0, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8, num_stages=2
        )
    segments = piece // SEGMENT + 2  # that a piece may lie in
    blocks = triton.cdiv(rows, block_m)
    splits = whole_waves(together * kv_heads * blocks, piece // block_n, sms)
    partial, logs = empty_partials(queries, splits, fmt.v_head_dim)
    for batch_from in range(0, batch, together):
        count = min(together, batch - batch_from)
        these = slice(batch_from, batch_from + count)
        k_mean = None if beside.k_mean is None else beside.k_mean[these]
        for first in range(0, max(1, max_len - own), piece):
            scores = mean_scores(
                q[these], k_mean, seq_lens.expand(batch)[these], scale, first // SEGMENT, segments
            )
            unpack_kernel[(triton.cdiv(piece, run), 2, count * kv_heads)](
                cache, seq_lens, k, v, units, *cache.stride()[:2], lens_stride, v_rows.offset,
                k_scales.offset, v_scales.offset, kv_heads, batch_from, own, max_len, first, piece, run,
                **codes,
            )  # fmt: skip
            kernel[(splits * blocks, kv_heads, count)](
                queries, factors, *tiles, units, seq_lens, seq_lens if exact_from is None else exact_from,
                seq_lens if bounds is None else bounds, partial, logs, lens_stride,
                0 if exact_from is None else exact_from.expand(batch).stride(0),
                *((0, 0) if bounds is None else bounds.stride()[:2]), q.shape[2], own, max_len, batch_from,
                first, piece, splits, factors if scores is None else scores, segments, *others, **visible,
                **constants,
            )  # fmt: skip
    reduce_splits(
        out, partial, logs, seq_lens, v_rotation, attn_mask, bounds, sinks, group, max_len, lse, parts
    )
