"""The means of keys that a prompt's chunk sets, before it is stored: `beside` says which.

A program takes the mean of one segment, or copies that of the segment before. A chunk that `store` takes by
itself (a few tokens) sets its mean there.
Bytes: reads up to `MEAN_SAMPLES` keys of every `SEGMENT`, which a prompt's store reads again.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..beside import DECODE_TOKENS, LEAST_MEAN_TOKENS, MEAN_SAMPLES, SEGMENT, Beside
from .bits import early_launch
from .segments import MEAN_OF

SAMPLES, LEAST = tl.constexpr(MEAN_SAMPLES), tl.constexpr(LEAST_MEAN_TOKENS)


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
