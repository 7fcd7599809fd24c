"""The means of keys, each of a segment of positions: `beside` says which is taken from what.

Those that a prompt's chunk sets have a kernel that runs before the chunk is stored: a program takes the
mean of one segment, or copies that of the segment before. A few tokens seldom start a segment, which only
the device knows: the kernel that stores them then takes its mean from stored keys (`find_means`).
Bytes: up to `MEAN_SAMPLES` keys of every `SEGMENT`, which a prompt's store reads again.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..beside import DECODE_TOKENS, LEAST_MEAN_TOKENS, MEAN_SAMPLES, SEGMENT, STRIDE, Beside
from .bits import FP16_UNIT, early_launch, hadamard, load_centroids
from .pages import find_tokens
from .segments import FEW, MEAN_OF

SAMPLES, LEAST = tl.constexpr(MEAN_SAMPLES), tl.constexpr(LEAST_MEAN_TOKENS)
STORED = tl.constexpr((SEGMENT - DECODE_TOKENS) // STRIDE)  # tokens that are read of a stored segment
APART = tl.constexpr(STRIDE)


@triton.jit
def mean_of_codes(
    cache_ptr, k_scales_offset, where, batch, head, first, wanted, dims, BITS: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Coordinates `dims`, rotated, of the mean [vectors, dims] of the segments from `first` [vectors].

    Of `wanted` ones; tokens without a page are left out, values that are not finite count as 0.
    """
    VECTORS: tl.constexpr = wanted.shape[0]
    TOGETHER: tl.constexpr = 4 if VECTORS == 1 else 1  # few registers: the branch is seldom taken
    table_ptr, table_stride, cache_stride_b, cache_stride_h = where
    total = tl.zeros([VECTORS, dims.shape[0]], tl.float32)
    count = tl.zeros([VECTORS], tl.int32)
    for start in range(0, STORED, TOGETHER):
        sample = start + tl.arange(0, TOGETHER)[None, :]
        position = first[:, None] + sample * APART
        known = wanted[:, None] & (sample < STORED)
        page, slot = batch[:, None] + 0 * position, position
        if PAGE > 0:
            page, slot = find_tokens(table_ptr[:, None], table_stride, position, known, PAGE)
            known &= page >= 0
        page_ptr = cache_ptr + (page * cache_stride_b + head[:, None] * cache_stride_h)
        scale_ptr = (page_ptr + k_scales_offset).to(tl.pointer_type(tl.bfloat16)) + slot
        scale = tl.load(scale_ptr, mask=known, other=0.0).to(tl.float32) * FP16_UNIT
        row_ptr = page_ptr + slot * (DIM * BITS // 8)
        mask = known[:, :, None] & (dims < DIM)[None, None, :]
        x = load_centroids(row_ptr[:, :, None], dims[None, None, :], mask, BITS, DIM, LO, HI, 1)
        x = x.to(tl.float32) * scale[:, :, None]
        total += tl.sum(tl.where(tl.abs(x) < float("inf"), x, 0.0), axis=1)
        count += tl.sum(known.to(tl.int32), axis=1)
    return total / tl.maximum(count, 1)[:, None]


@triton.jit
def find_means(
    mean_ptr, cache_ptr, k_scales_offset, where, rotation_ptr, batch, head, row, position, start, new,
    segments, inside, BITS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Where the means of the segments of vectors at `position` [vectors] are, of a store of `new` tokens.

    Sets those that it starts, if it is of few. Programs that store tokens of the same one set the same.
    """
    segment = tl.minimum(tl.maximum(position, 0) // MEAN_OF, segments - 1)
    ptrs = mean_ptr + (row * segments + segment) * DIM
    starts = inside & (segment * MEAN_OF >= start) & (new + 0 * position <= FEW)
    if tl.max(starts.to(tl.int32), axis=0) > 0:
        dims = tl.arange(0, triton.next_power_of_2(DIM))
        known = starts & (segment > 0)
        first = (segment - 1) * MEAN_OF
        if dims.shape[0] == DIM:  # the rotation is its first column times the Hadamard matrix
            y = mean_of_codes(
                cache_ptr, k_scales_offset, where, batch, head, first, known, dims, BITS, LO, HI, DIM, PAGE
            )
            mean = hadamard(y) * tl.load(rotation_ptr + dims * DIM)[None, :]
        else:
            mean = tl.zeros([position.shape[0], dims.shape[0]], tl.float32)
            for at in range(0, DIM, BLOCK_K):
                columns = at + tl.arange(0, BLOCK_K)
                y = mean_of_codes(
                    cache_ptr, k_scales_offset, where, batch, head, first, known, columns, BITS, LO, HI,
                    DIM, PAGE,
                )  # fmt: skip
                ptr = rotation_ptr + dims[None, :] * DIM + columns[:, None]
                mask = (dims < DIM)[None, :] & (columns < DIM)[:, None]
                mean = tl.dot(y, tl.load(ptr, mask=mask, other=0.0), mean, input_precision="ieee")
        mask = (dims < DIM)[None, :]
        mean += tl.load((ptrs - DIM)[:, None] + dims[None, :], mask=mask & known[:, None], other=0.0)
        mean = tl.where(known[:, None], mean, 0.0).to(mean_ptr.dtype.element_ty)
        tl.store(ptrs[:, None] + dims[None, :], mean, mask=mask & starts[:, None])
        tl.debug_barrier()  # they are read again
    return ptrs


@triton.jit
def mean_kernel(
    k_ptr, seq_lens_ptr, mean_ptr, stride_b, stride_h, stride_t, stride_d, lens_stride, kv_heads, new,
    segments, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (batch * KV heads, segments that a chunk of `new` keys can start, blocks of dims)."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    length = tl.load(seq_lens_ptr + batch * lens_stride)
    start = length - new
    segment = tl.cdiv(tl.maximum(start, 0), MEAN_OF) + tl.program_id(1)
    if (segment * MEAN_OF < length) & (segment < segments):
        dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        count = tl.minimum(length - segment * MEAN_OF, MEAN_OF)
        few = count < LEAST
        source = tl.where(few, segment - 1, segment)
        count = tl.where(few, MEAN_OF, count)
        first = source * MEAN_OF - start  # of the chunk's tokens
        mean = tl.zeros([BLOCK_D], tl.float32)
        if source >= 0:
            if first >= 0:
                step = tl.maximum(count // SAMPLES, 1)
                used = tl.minimum(tl.cdiv(count, step), SAMPLES)
                sample = tl.arange(0, SAMPLES)
                ptrs = k_ptr + batch * stride_b + head * stride_h + dims[None, :] * stride_d
                ptrs += (first + sample * step)[:, None] * stride_t
                x = tl.load(ptrs, mask=(sample < used)[:, None] & (dims < DIM)[None, :], other=0.0)
                x = x.to(tl.float32)
                mean = tl.sum(tl.where(tl.abs(x) < float("inf"), x, 0.0), axis=0) / used
            else:
                before = mean_ptr + (row * segments + source) * DIM + dims
                mean = tl.load(before, mask=dims < DIM, other=0.0).to(tl.float32)
        own = mean_ptr + (row * segments + segment) * DIM + dims
        tl.store(own, mean.to(mean_ptr.dtype.element_ty), mask=dims < DIM)


def take_means(k: torch.Tensor, seq_lens: torch.Tensor, beside: Beside) -> None:
    """Set the means of the segments that k `[B, Hkv, q, D]` starts; those of a few tokens `store` sets."""
    batch, kv_heads, new, dim = k.shape
    if beside.k_mean is not None and new > DECODE_TOKENS:
        block_d = min(128, triton.next_power_of_2(dim))
        grid = (batch * kv_heads, triton.cdiv(new, SEGMENT), triton.cdiv(dim, block_d))
        mean_kernel[grid](
            k, seq_lens, beside.k_mean, *k.stride(), seq_lens.expand(batch).stride(0), kv_heads, new,
            beside.segments, DIM=dim, BLOCK_D=block_d, PDL=early_launch(k.device)["PDL"], num_warps=4,
        )  # fmt: skip
