"""Unpack a cache into 16-bit or float32 keys and values, rotated back.

Grid (batch rows x KV heads, tiles of 32 tokens, 2), the last axis keys and values. A tile decodes its
rows and multiplies them by the transposed rotation, block by block; keys get their mean back, and exact
tokens are read as they came. Without a page a key is NaN and a value zero. A tile past the length writes
zeros without reading. The last tokens, if they are given as they came, are written over it. Bytes: reads
the packed cache up to the length, writes max_len vectors.
"""

import torch
import triton
import triton.language as tl

from ..beside import NOTHING, Beside, Chunk
from ..format import PAGE_ALIGNMENT, KVFormat
from .bits import FP16_UNIT, load_centroids, magnitude_words, nan_if_overfull
from .pages import find_tokens, table_arguments, tokens_of_page


@triton.jit
def locate_tile(table_ptr, stride_b, stride_n, batch, tokens, filled, PAGE: tl.constexpr):
    """The page of these tokens of a row, -1 if they have none, and their slots in it."""
    if PAGE > 0:
        return find_tokens(table_ptr + batch * stride_b, stride_n, tokens, tokens < filled, PAGE)
    else:
        return batch, tokens


@triton.jit
def dequantize_tile(
    row_ptr, scale_ptr, rotation_ptr, mean_ptr, exact_ptr, out_ptr, tokens, missing, is_exact, seq_len,
    max_len, MISSING: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, BITS: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, DIM: tl.constexpr, BYTE_STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Decode the rows at `row_ptr` [tokens] and write them to the rows at `out_ptr` [tokens]."""
    BLOCK_N: tl.constexpr = tokens.shape[0]
    filled = tl.minimum(seq_len, max_len)
    known = (tokens < filled) & (missing == 0)
    scale = tl.load(scale_ptr, mask=known, other=0.0).to(tl.float32) * FP16_UNIT
    scale = tl.where((tokens < filled) & (missing != 0), MISSING, scale)
    dropped = nan_if_overfull(seq_len, max_len)
    for first in range(0, DIM, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if tl.min(tokens, axis=0) < filled:
            for start in range(0, DIM, BLOCK_K):
                dims = start + tl.arange(0, BLOCK_K)
                mask = known[:, None] & (dims < DIM)[None, :]
                codes = load_centroids(
                    row_ptr[:, None], dims[None, :], mask, BITS, DIM, LO, HI, BYTE_STRIDE
                )  # [BLOCK_N, BLOCK_K]
                mask = (dims < DIM)[:, None] & (columns < DIM)[None, :]
                rotation_ptrs = rotation_ptr + columns[None, :] * DIM + dims[:, None]
                rotation = tl.load(rotation_ptrs, mask=mask, other=0.0)
                x = tl.dot(codes.to(tl.float32), rotation, x, input_precision="ieee")
        x *= scale[:, None]
        if HAS_MEAN:
            mean = tl.load(mean_ptr + columns, mask=columns < DIM, other=0.0).to(tl.float32)
            x += tl.where(known[:, None], mean[None, :], 0.0)
        if HAS_EXACT:
            mask = is_exact[:, None] & (columns < DIM)[None, :]
            exact = tl.load(exact_ptr[:, None] + columns[None, :], mask=mask, other=0.0)
            x = tl.where(is_exact[:, None], exact.to(tl.float32), x)
        mask = (tokens < max_len)[:, None] & (columns < DIM)[None, :]
        x = (x + dropped).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr[:, None] + columns[None, :], x, mask=mask)


@triton.jit
def dequantize_kernel(
    cache_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr, exact_from_ptr, k_ptr,
    v_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h, lens_stride,
    from_stride, v_rows_offset, k_scales_offset, v_scales_offset, kv_heads, max_len,
    HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_LO: tl.constexpr, K_HI: tl.constexpr,
    V_LO: tl.constexpr, V_HI: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // kv_heads
    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    page, slots = locate_tile(
        table_ptr, table_stride_b, table_stride_n, batch, tokens, tl.minimum(seq_len, max_len), PAGE
    )
    page_ptr = cache_ptr + page * cache_stride_b + row % kv_heads * cache_stride_h
    missing = page + 0 * tokens < 0  # a mask for each token: Triton 3.9 interprets no other
    is_exact = tokens < 0
    if HAS_EXACT:
        first = tl.maximum(tl.load(exact_from_ptr + batch * from_stride), seq_len - RECENT)
        first = tl.maximum(first, SINKS)
        is_exact = (tokens < tl.minimum(seq_len, max_len)) & ((tokens < SINKS) | (tokens >= first))
        recent = SINKS + (tokens - SINKS) % max(RECENT, 1)
        slot = tl.where(tokens < SINKS, tokens, recent)
        exact_ptr += (row * (SINKS + RECENT) + slot) * (K_DIM + V_DIM)
    else:
        exact_ptr += tokens
    if tl.program_id(2) == 0:
        scale_ptr = (page_ptr + k_scales_offset).to(tl.pointer_type(tl.bfloat16)) + slots
        dequantize_tile(
            page_ptr + slots * (K_DIM * K_BITS // 8), scale_ptr, k_rotation_ptr, mean_ptr + row * K_DIM,
            exact_ptr, k_ptr + (row * max_len + tokens) * K_DIM, tokens, missing, is_exact, seq_len,
            max_len, float("nan"), HAS_MEAN, HAS_EXACT, K_BITS, K_LO, K_HI, K_DIM, 1, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    else:
        row_ptr = page_ptr + v_rows_offset + slots // GROUP * GROUP * (V_DIM * V_BITS // 8)
        scale_ptr = (page_ptr + v_scales_offset).to(tl.pointer_type(tl.bfloat16)) + slots
        dequantize_tile(
            row_ptr + slots % GROUP, scale_ptr, v_rotation_ptr, mean_ptr,
            exact_ptr + K_DIM, v_ptr + (row * max_len + tokens) * V_DIM, tokens, missing, is_exact, seq_len,
            max_len, 0.0, False, HAS_EXACT, V_BITS, V_LO, V_HI, V_DIM, GROUP, BLOCK_D, BLOCK_K,
        )  # fmt: skip


@triton.jit
def copy_tile(
    row_ptr, out_ptr, tokens, missing, seq_len, max_len, MISSING: tl.constexpr, DIM: tl.constexpr
):
    """Convert the rows at `row_ptr` [tokens] to the type of, and write them to, `out_ptr`."""
    dims = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    known = tokens < tl.minimum(seq_len, max_len)
    mask = (known & (missing == 0))[:, None] & (dims < DIM)
    x = tl.load(row_ptr[:, None] + dims, mask=mask, other=0.0)
    x = tl.where((known & (missing != 0))[:, None], MISSING, x)
    x += nan_if_overfull(seq_len, max_len)
    mask = (tokens < max_len)[:, None] & (dims < DIM)
    tl.store(out_ptr[:, None] + dims, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_lossless_kernel(
    cache_ptr, seq_lens_ptr, k_ptr, v_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b,
    cache_stride_h, lens_stride, v_rows_offset, kv_heads, max_len, ROW_DTYPE: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // kv_heads
    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    page, slots = locate_tile(
        table_ptr, table_stride_b, table_stride_n, batch, tokens, tl.minimum(seq_len, max_len), PAGE
    )
    page_ptr = cache_ptr + page * cache_stride_b + row % kv_heads * cache_stride_h
    missing = page + 0 * tokens < 0  # a mask for each token: Triton 3.9 interprets no other
    if tl.program_id(2) == 0:
        row_ptr = page_ptr.to(tl.pointer_type(ROW_DTYPE)) + slots * K_DIM
        out_ptr = k_ptr + (row * max_len + tokens) * K_DIM
        copy_tile(row_ptr, out_ptr, tokens, missing, seq_len, max_len, float("nan"), K_DIM)
    else:
        row_ptr = (page_ptr + v_rows_offset).to(tl.pointer_type(ROW_DTYPE)) + slots * V_DIM
        out_ptr = v_ptr + (row * max_len + tokens) * V_DIM
        copy_tile(row_ptr, out_ptr, tokens, missing, seq_len, max_len, 0.0, V_DIM)


@triton.jit
def copy_own_kernel(
    own_ptr, seq_lens_ptr, out_ptr, stride_b, stride_h, stride_t, stride_d, lens_stride, heads, own,
    max_len, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The last `own` tokens of each row to their slots of `out` [B, H, max_len, DIM]; no overfull row."""
    row = tl.program_id(0).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + row // heads * lens_stride)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    slots = seq_len - own + tokens
    exists = (tokens < own) & (slots >= 0) & (seq_len + 0 * tokens <= max_len)
    mask = exists[:, None] & (dims < DIM)
    own_ptr += row // heads * stride_b + row % heads * stride_h
    x = tl.load(own_ptr + tokens[:, None] * stride_t + dims * stride_d, mask=mask, other=0.0)
    out_ptr += (row * max_len + slots[:, None]) * DIM + dims
    tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize(
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    max_len: int,
    dtype: torch.dtype,
    beside: Beside = NOTHING,
    block_table: torch.Tensor | None = None,
    own: Chunk | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[B, Hkv, max_len, D]` of `dtype`; zero past `seq_lens`.

    `own`: the last tokens of each row as they came, which are then returned so.
    """
    k, v = dequantize_stored(
        cache, seq_lens, k_rotation, v_rotation, fmt, max_len, dtype, beside, block_table
    )
    lens_stride = seq_lens.expand(k.shape[0]).stride(0)
    for x, new in zip((k, v), own or (), strict=False):
        batch, heads, tokens, dim = new.shape
        if x.numel() and tokens:
            with torch.cuda.device_of(x):
                copy_own_kernel[(batch * heads, triton.cdiv(tokens, 32))](
                    new, seq_lens, x, *new.stride(), lens_stride, heads, tokens, max_len,
                    DIM=dim, BLOCK_N=32,
                )  # fmt: skip
    return k, v


def dequantize_stored(
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    max_len: int,
    dtype: torch.dtype,
    beside: Beside,
    block_table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the packed bytes and what lies beside them say; see `dequantize`."""
    batch, kv_heads, page_bytes = cache.shape
    if block_table is not None:
        batch = block_table.shape[0]
    k = cache.new_empty((batch, kv_heads, max_len, fmt.head_dim), dtype=dtype)
    v = cache.new_empty((batch, kv_heads, max_len, fmt.v_head_dim), dtype=dtype)
    if batch * kv_heads * max_len == 0:
        return k, v
    _, v_rows, k_scales, v_scales = fmt.planes(fmt.page_size(page_bytes))
    lens_stride = seq_lens.expand(batch).stride(0)
    strides = (*table_arguments(block_table, seq_lens), *cache.stride()[:2], lens_stride)
    page = tokens_of_page(cache, fmt, block_table)
    block_n = 32  # 32 x 128 float32 accumulators are 32 registers of 128 threads
    grid = (batch * kv_heads, triton.cdiv(max_len, block_n), 2)
    with torch.cuda.device_of(cache):
        if fmt.is_lossless:
            dequantize_lossless_kernel[grid](
                cache, seq_lens, k, v, *strides, v_rows.offset, kv_heads, max_len,
                ROW_DTYPE=tl.bfloat16 if fmt.dtype == torch.bfloat16 else tl.float16,
                K_DIM=fmt.head_dim, V_DIM=fmt.v_head_dim, PAGE=page, BLOCK_N=block_n,
            )  # fmt: skip
            return k, v
        k_lo, k_hi = magnitude_words(fmt.k_bits)
        v_lo, v_hi = magnitude_words(fmt.v_bits)
        k_mean, exact, exact_from, sink_tokens = beside
        from_stride = 0 if exact_from is None else exact_from.expand(batch).stride(0)
        block_d = min(128, triton.next_power_of_2(max(fmt.head_dim, fmt.v_head_dim)))
        dequantize_kernel[grid](
            cache, seq_lens, k_rotation, v_rotation, k if k_mean is None else k_mean,
            k if exact is None else exact, seq_lens if exact_from is None else exact_from, k, v, *strides,
            from_stride, v_rows.offset, k_scales.offset, v_scales.offset, kv_heads, max_len,
            HAS_MEAN=k_mean is not None, HAS_EXACT=exact is not None, SINKS=sink_tokens,
            RECENT=beside.recent_tokens,
            K_BITS=fmt.k_bits, V_BITS=fmt.v_bits, K_LO=k_lo, K_HI=k_hi, V_LO=v_lo, V_HI=v_hi,
            K_DIM=fmt.head_dim, V_DIM=fmt.v_head_dim, GROUP=PAGE_ALIGNMENT,
            PAGE=page, BLOCK_N=block_n, BLOCK_D=max(16, block_d), BLOCK_K=32, num_warps=4, num_stages=1,
        )  # fmt: skip
    return k, v
