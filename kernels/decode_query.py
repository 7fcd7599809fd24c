"""The first launch of decoding by warps: rotate the queries and bring them to the range of float16.

When a decode step also appends, the same launch stores the new tokens (`prepare`).
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..beside import Beside
from ..format import KVFormat
from .bits import TINY, early_launch, hadamard
from .store import store_arguments, store_kernel, take_mean

LOG2_E = tl.constexpr(1.4426950408889634)
ROWS = 1  # of a program, which is a warp


@triton.jit
def rotate_block(
    block, q_ptr, rotation_ptr, out_ptr, scale_ptr, stride_b, stride_h, stride_t, stride_d, rows, kv_heads,
    q_len, scale, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rotated query rows [batch, KV head, token, head of the group], over their largest magnitude."""
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group, token = row // HEADS // q_len, row // HEADS % q_len
    head = group % kv_heads * HEADS + row % HEADS
    dims = tl.arange(0, DIM)
    q_ptr += group // kv_heads * stride_b + head * stride_h + token * stride_t
    q = tl.load(q_ptr[:, None] + dims[None, :] * stride_d, mask=(row < rows)[:, None], other=0.0)
    # The rotation is its first column times the Hadamard matrix.
    signs = tl.load(rotation_ptr + dims * DIM) * scale
    y = hadamard(q.to(tl.float32) * signs[None, :])
    peak = tl.maximum(tl.max(tl.abs(y), axis=1), TINY)
    out = (y / peak[:, None]).to(tl.float16)
    tl.store(out_ptr + row[:, None] * DIM + dims[None, :], out, mask=(row < rows)[:, None])
    tl.store(scale_ptr + row, peak * LOG2_E, mask=row < rows)


@triton.jit
def query_kernel(
    q_ptr, rotation_ptr, out_ptr, scale_ptr, stride_b, stride_h, stride_t, stride_d, rows, kv_heads, q_len,
    scale, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rotate_block(
        tl.program_id(0), q_ptr, rotation_ptr, out_ptr, scale_ptr, stride_b, stride_h, stride_t, stride_d,
        rows, kv_heads, q_len, scale, DIM, HEADS, BLOCK_M,
    )  # fmt: skip


@triton.jit
def prepare_kernel(
    cache_ptr, k_ptr, v_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr,
    exact_from_ptr, cache_stride_b, cache_stride_h, k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d, lens_stride, from_stride,
    v_rows_offset, k_scales_offset, v_scales_offset, vectors, kv_heads, new, page_size,
    q_ptr, out_ptr, scale_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, rows, scale,
    HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_MAGNITUDES: tl.constexpr,
    V_MAGNITUDES: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`store_kernel` in the first two rows of the grid, the queries in the others."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if tl.program_id(1) < 2:
        store_kernel(
            cache_ptr, k_ptr, v_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr,
            exact_from_ptr, cache_stride_b, cache_stride_h, k_stride_b, k_stride_h, k_stride_t, k_stride_d,
            v_stride_b, v_stride_h, v_stride_t, v_stride_d, lens_stride, from_stride, v_rows_offset,
            k_scales_offset, v_scales_offset, vectors, kv_heads, new, page_size, HAS_MEAN, HAS_EXACT, SINKS,
            RECENT, K_BITS, V_BITS, K_MAGNITUDES, V_MAGNITUDES, K_UNIT, V_UNIT, K_DIM, V_DIM, GROUP, BLOCK,
            BLOCK_K,
        )  # fmt: skip
    else:
        rotate_block(
            (tl.program_id(1) - 2) * tl.num_programs(0) + tl.program_id(0), q_ptr, k_rotation_ptr, out_ptr,
            scale_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, rows, kv_heads, new, scale, K_DIM,
            HEADS, BLOCK_M,
        )  # fmt: skip


def empty_queries(q: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotate_queries` returns, not filled."""
    batch, heads, q_len, dim = q.shape
    group = heads // kv_heads
    queries = torch.empty((batch, kv_heads, q_len * group, dim), dtype=torch.float16, device=q.device)
    return queries, torch.empty(queries.shape[:-1], dtype=torch.float32, device=q.device)


def rotate_queries(
    q: torch.Tensor, rotation: torch.Tensor, kv_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, q, D] -> rows [B, Hkv, q * H / Hkv, D] float16, token-major, and their factors.

    A score in base 2 is the factor times the product of a row and a rotated key. D is a power of two.
    """
    queries, factors = empty_queries(q, kv_heads)
    rows = factors.numel()
    query_kernel[(triton.cdiv(rows, ROWS),)](
        q, rotation, queries, factors, *q.stride(), rows, kv_heads, q.shape[2], scale,
        DIM=q.shape[3], HEADS=q.shape[1] // kv_heads, BLOCK_M=ROWS,
        num_warps=1, **early_launch(q.device),
    )  # fmt: skip
    return queries, factors


def store_and_rotate(
    cache: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    scale: float,
    beside: Beside,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`store` and `rotate_queries` in one launch, for dimensions that are powers of two up to 256."""
    queries, factors = empty_queries(q, cache.shape[1])
    take_mean(k, seq_lens, beside)
    arguments, constants = store_arguments(cache, k, v, seq_lens, k_rotation, v_rotation, fmt, beside)
    rows = factors.numel()
    blocks = triton.cdiv(k[..., 0].numel(), constants["BLOCK"])
    prepare_kernel[(blocks, 2 + triton.cdiv(triton.cdiv(rows, ROWS), blocks))](
        *arguments, q, queries, factors, *q.stride(), rows, scale, **constants,
        HEADS=q.shape[1] // k.shape[1], BLOCK_M=ROWS, num_warps=1, **early_launch(q.device),
    )  # fmt: skip
    return queries, factors
