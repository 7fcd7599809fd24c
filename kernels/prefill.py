"""Attention of many new tokens over the packed tokens before them: what `decode` launches for chunks.

A tile is unpacked once for 64 or 128 query rows, into the float16 operands of two tensor-core dots, so
nothing is dequantized in memory; for more rows `prefill_pieces` does that. Of 16-bit queries and powers of
two; `decode_split_kernel` does the others. The chunk itself, and exact tokens, are `unpacked`'s.

`prefix_kernel` writes normalised partial outputs and the base-2 logarithms of their sums of weights, which
`decode_reduce` joins with `unpacked`'s: these are rotated. Partials are one float32 output, or where a
prefix is split, for at most `PROGRAMS_PER_SM` programs a multiprocessor, a block of rows each.
Bytes: the packed rows of visible slots once per row block, from the second-level cache where they fit.
"""

import torch
import triton
import triton.language as tl

from ..beside import DECODE_TOKENS, Beside
from ..format import PAGE_ALIGNMENT, KVFormat
from .bits import TINY, lookup_words, magnitude_words, sm_count
from .centroids import asm_for, centroids, unit_of
from .decode_query import Queries
from .decode_reduce import reduce_splits
from .exact import Parts
from .mean_scores import mean_scores
from .scores import NO_MASK, has_whole, hide, mask_arguments, soften, squash, visible_slots
from .segments import MEAN_OF

PROGRAMS_PER_SM = 2
DIMS = (64, 128, 256)
# Weights are at most 1: times this, 2 to these bits, small ones too keep their digits in float16.
WEIGHT_UNIT, WEIGHT_BITS = tl.constexpr(2.0**15), tl.constexpr(15.0)


@triton.jit
def load_keys(
    rows_ptr, start, filled, BITS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, TABLE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`centroids` of the packed keys of slots `start`.., [BLOCK_N, DIM] fp16, finite past `filled`."""
    ROW: tl.constexpr = DIM * BITS // 32  # in words
    PLANE: tl.constexpr = DIM * (2 if BITS == 3 else BITS) // 32
    slot, word = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, PLANE)[None, :]
    rows_ptr += tl.cast(start, tl.int64) * ROW + slot * ROW
    mask = start + slot < filled
    words = tl.load(rows_ptr + word, mask=mask, other=0)
    signs = words
    if BITS == 3:
        SIGNS: tl.constexpr = DIM // 32
        signs = tl.load(rows_ptr + PLANE + word % SIGNS, mask=mask, other=0) >> word // SIGNS
    x = centroids(words, signs, BITS, LO, HI, TABLE, ASM)
    return tl.reshape(tl.permute(x, [0, 3, 1, 2]), [BLOCK_N, DIM])


@triton.jit
def load_values(
    rows_ptr, start, filled, BITS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, TABLE: tl.constexpr,
    DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `load_keys`, of packed values: groups of `GROUP` slots, of which a word has a byte of four."""
    QUADS: tl.constexpr = GROUP // 4
    PLANE: tl.constexpr = DIM * (2 if BITS == 3 else BITS) // 8  # in bytes
    quads, byte = tl.arange(0, BLOCK_N // 4)[:, None], tl.arange(0, PLANE)[None, :]
    rows_ptr += (tl.cast(start, tl.int64) // 4 + quads // QUADS * QUADS) * (DIM * BITS // 8) + quads % QUADS
    # A mask per group, for loads that are as wide as a group.
    mask = start + quads // QUADS * GROUP < filled
    words = tl.load(rows_ptr + byte * QUADS, mask=mask, other=0)
    signs = words
    if BITS == 3:
        SIGNS: tl.constexpr = DIM // 8
        signs = tl.load(rows_ptr + (PLANE + byte % SIGNS) * QUADS, mask=mask, other=0) >> byte // SIGNS
    x = centroids(words, signs, BITS, LO, HI, TABLE, ASM)
    return tl.reshape(tl.permute(x, [0, 2, 3, 1]), [BLOCK_N, DIM])


@triton.jit
def visible_prefix(
    bounds_ptr, stride_t, exact_from_ptr, token, valid, seq_len, q_len, own, max_len, SINKS: tl.constexpr,
    RECENT: tl.constexpr, HAS_BOUNDS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """`visible_slots`, of packed tokens before the `own` last ones and not exact."""
    low, high = visible_slots(bounds_ptr, stride_t, token, valid, seq_len, q_len, max_len, HAS_BOUNDS, MASK)
    high = tl.minimum(high, tl.minimum(seq_len - own, max_len).to(tl.int32))
    if SINKS + RECENT > 0:
        first_recent = tl.maximum(tl.load(exact_from_ptr), seq_len - RECENT)
        low = tl.maximum(low, SINKS)
        high = tl.minimum(high, tl.minimum(first_recent, max_len).to(tl.int32))
    return low, high


@triton.jit
def whole_slots(
    bounds_ptr, stride_t, token, valid, low, high, max_len, HAS_WHOLE: tl.constexpr, MASK: tl.constexpr
):
    """(first, end) of the slots that all rows, of slots low .. high - 1, see, where no mask is read."""
    first = tl.max(tl.where(valid, low, 0), axis=0)
    end = tl.min(tl.where(valid, high, max_len), axis=0)
    if HAS_WHOLE:
        whole_ptr = bounds_ptr + token * stride_t + 2
        first = tl.maximum(first, tl.max(tl.load(whole_ptr, mask=valid, other=0), axis=0))
        end = tl.minimum(end, tl.min(tl.load(whole_ptr + 1, mask=valid, other=max_len), axis=0))
    elif MASK != NO_MASK:
        end = end * 0
    return first, end


@triton.jit
def prefix_kernel(
    q_ptr, factor_ptr, mean_score_ptr, cache_ptr, seq_lens_ptr, exact_from_ptr, bounds_ptr, mask_ptr,
    partial_ptr, log_ptr, cache_stride_b, cache_stride_h, v_rows_offset, k_scales_offset, v_scales_offset,
    lens_stride, from_stride, bounds_stride_b, bounds_stride_t, mask_stride_b, mask_stride_h, mask_stride_t,
    mask_stride_n, segments, q_len, own, max_len, splits, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_LO: tl.constexpr, K_HI: tl.constexpr, V_LO: tl.constexpr, V_HI: tl.constexpr, K_TABLE: tl.constexpr,
    V_TABLE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, GROUP: tl.constexpr,
    HEADS: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    HAS_WHOLE: tl.constexpr, MASK: tl.constexpr, HAS_MEAN: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K_ASM: tl.constexpr, V_ASM: tl.constexpr,
):  # fmt: skip
    """Attention over all packed tokens but the `own` last; partials [batch, KV head, row, split, dim]."""
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = q_len * HEADS
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    token, head = row // HEADS, kv_head * HEADS + row % HEADS

    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    bounds_ptr += batch * bounds_stride_b
    exact_from_ptr += batch * from_stride
    filled = tl.minimum(seq_len - own, max_len).to(tl.int32)
    low, high = visible_prefix(
        bounds_ptr, bounds_stride_t, exact_from_ptr, token, valid, seq_len, q_len, own, max_len, SINKS,
        RECENT, HAS_BOUNDS, MASK,
    )  # fmt: skip
    seen = valid & (low < high)
    begin = tl.min(tl.where(seen, low, max_len), axis=0) // BLOCK_N * BLOCK_N
    end = tl.max(tl.where(seen, high, 0), axis=0)
    run = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * run
    end = tl.minimum(begin + run, end)

    group_row = (batch * tl.num_programs(1) + kv_head) * rows + row
    page_ptr = cache_ptr + batch * cache_stride_b + kv_head * cache_stride_h
    k_ptr = page_ptr.to(tl.pointer_type(tl.int32))
    v_ptr = (page_ptr + v_rows_offset).to(tl.pointer_type(tl.int32))
    k_scale_ptr = (page_ptr + k_scales_offset).to(tl.pointer_type(tl.bfloat16))
    v_scale_ptr = (page_ptr + v_scales_offset).to(tl.pointer_type(tl.bfloat16))
    mask_ptr += batch * mask_stride_b + head * mask_stride_h + token.to(tl.int64) * mask_stride_t
    dims = tl.arange(0, K_DIM)
    q = tl.load(q_ptr + group_row[:, None] * K_DIM + dims[None, :], mask=valid[:, None], other=0.0)
    factor = tl.load(factor_ptr + group_row, mask=valid, other=0.0)
    mean_ptrs = mean_score_ptr + (batch * tl.num_programs(1) + kv_head) * segments * rows + row

    acc = tl.zeros([BLOCK_M, V_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    largest = tl.min(total, axis=0) + TINY  # of the value scales so far: `acc` is in units of it
    whole_from, whole_to = whole_slots(
        bounds_ptr, bounds_stride_t, token, valid, low, high, max_len, HAS_WHOLE, MASK
    )
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        known = slot < filled
        k = load_keys(k_ptr, start, filled, K_BITS, K_LO, K_HI, K_TABLE, K_DIM, BLOCK_N, K_ASM)
        k_scale = tl.load(k_scale_ptr + slot, mask=known, other=0.0).to(tl.float32) * unit_of(K_ASM)
        scores = tl.dot(q, tl.trans(k)) * k_scale[None, :] * factor[:, None]
        if HAS_MEAN:
            scores += tl.load(mean_ptrs + start // MEAN_OF * rows, mask=valid, other=0.0)[:, None]
        scores = squash(scores, SOFTCAP)
        if (start < whole_from) | (start + BLOCK_N > whole_to):
            visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
            scores = hide(scores, visible, mask_ptr, slot, mask_stride_n, valid, MASK)
        weights, decay, total, peak = soften(scores, total, peak)
        v = load_values(v_ptr, start, filled, V_BITS, V_LO, V_HI, V_TABLE, V_DIM, GROUP, BLOCK_N, V_ASM)
        v_scale = tl.load(v_scale_ptr + slot, mask=known, other=0.0).to(tl.float32)
        # The weights carry the value scales, divided by the largest for the range of float16.
        new_largest = tl.maximum(largest, tl.max(tl.abs(v_scale), axis=0))
        unit = 1.0 / new_largest
        weights *= (v_scale * unit * WEIGHT_UNIT)[None, :]
        acc = tl.dot(weights.to(tl.float16), v, acc * (decay * (largest * unit))[:, None])
        largest = new_largest

    part = group_row * splits + split
    columns = tl.arange(0, V_DIM)
    share = largest * (unit_of(V_ASM) / WEIGHT_UNIT) / tl.where(total == 0.0, 1.0, total)
    out = acc * share[:, None]
    tl.store(partial_ptr + part[:, None] * V_DIM + columns[None, :], out, mask=valid[:, None])
    tl.store(log_ptr + part, peak + tl.log2(total), mask=valid)


def takes_prefix(q: torch.Tensor, fmt: KVFormat, page: int) -> bool:
    """Whether `attend_to_prefix` attends for q `[B, H, q, D]`; not over pages (`page` tokens)."""
    takes_format = not fmt.is_lossless and {fmt.head_dim, fmt.v_head_dim} <= {*DIMS}
    sixteen_bits = q.dtype in (torch.float16, torch.bfloat16)
    return page == 0 and takes_format and sixteen_bits and q.shape[2] > DECODE_TOKENS


def empty_partials(queries: torch.Tensor, splits: int, v_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and logarithms for queries `[B, Hkv, rows, D]`, not filled."""
    shape = (*queries.shape[:-1], splits)
    outputs = torch.empty((*shape, v_dim), dtype=torch.float32, device=queries.device)
    return outputs, torch.empty(shape, dtype=torch.float32, device=queries.device)


def attend_to_prefix(
    out: torch.Tensor, q: torch.Tensor, rotated: Queries, cache: torch.Tensor, seq_lens: torch.Tensor,
    v_rotation: torch.Tensor, attn_mask: torch.Tensor | None, bounds: torch.Tensor | None,
    sinks: torch.Tensor | None, max_len: int, scale: float, softcap: float | None,
    lse: torch.Tensor | None, fmt: KVFormat, beside: Beside, own: int, parts: Parts | None,
) -> None:  # fmt: skip
    """Fill `out` `[B, H, q, Dv]`, and `lse` if given, joining `parts`, which have the `own` last tokens.

    `rotated` is `rotate_queries` of q `[B, H, q, D]`; `bounds` has a row for each row of the batch and each
    query.
    """
    queries, factors = rotated
    scores = mean_scores(q, beside.k_mean, seq_lens, scale)
    batch, kv_heads, rows, _ = queries.shape
    q_len, group = q.shape[2], rows // q.shape[2]
    large = max(fmt.head_dim, fmt.v_head_dim) > 128
    block_m = 64 if large or rows <= 64 else 128
    block_n = 32 if large else 64
    blocks, tiles = triton.cdiv(rows, block_m), triton.cdiv(max_len, block_n)
    room = PROGRAMS_PER_SM * sm_count(queries.device)
    splits = max(1, min(tiles, room // (blocks * kv_heads * batch)))
    _, v_rows, k_scales, v_scales = fmt.planes(fmt.page_size(cache.shape[-1]))
    partial, logs = empty_partials(queries, splits, fmt.v_head_dim)
    mask_kind, mask, mask_strides = mask_arguments(attn_mask, q, max_len)
    (k_lo, k_hi), (v_lo, v_hi) = magnitude_words(fmt.k_bits), magnitude_words(fmt.v_bits)
    exact_from = beside.exact_from
    prefix_kernel[(splits * blocks, kv_heads, batch)](
        queries, factors, factors if scores is None else scores, cache, seq_lens,
        seq_lens if exact_from is None else exact_from, seq_lens if bounds is None else bounds, mask,
        partial, logs, *cache.stride()[:2], v_rows.offset, k_scales.offset, v_scales.offset,
        seq_lens.expand(batch).stride(0), 0 if exact_from is None else exact_from.expand(batch).stride(0),
        *((0, 0) if bounds is None else bounds.stride()[:2]), *mask_strides, beside.segments,
        q_len, own, max_len, splits, K_BITS=fmt.k_bits, V_BITS=fmt.v_bits, K_LO=k_lo,
        K_HI=k_hi, V_LO=v_lo, V_HI=v_hi, K_TABLE=lookup_words(fmt.k_bits)[0],
        V_TABLE=lookup_words(fmt.v_bits)[0], K_DIM=fmt.head_dim, V_DIM=fmt.v_head_dim, GROUP=PAGE_ALIGNMENT,
        HEADS=group, SINKS=beside.sink_tokens, RECENT=beside.recent_tokens, HAS_BOUNDS=bounds is not None,
        HAS_WHOLE=has_whole(bounds, mask_kind), MASK=mask_kind, HAS_MEAN=scores is not None,
        SOFTCAP=softcap or 0.0, BLOCK_M=block_m, BLOCK_N=block_n, K_ASM=asm_for(fmt.k_bits, q.device),
        # Stale bytes of 8 bits would become NaN there, which no weight of zero hides.
        V_ASM="" if fmt.v_bits == 8 else asm_for(fmt.v_bits, q.device),
        num_warps=8 if block_m == 128 or large else 4, num_stages=2,
    )  # fmt: skip
    reduce_splits(
        out, partial, logs, seq_lens, v_rotation, attn_mask, bounds, sinks, group, max_len, lse, parts
    )
