"""The first launch of decoding: rotate the queries.

For decoding by warps they are brought to the range of float16; when such a step also appends, other
programs of the launch store the new tokens (`store_and_rotate`). For the portable kernel they are float32
(`rotate`).

They wait before they let the next launch start: that has programs that do not wait (`exact`) and need what
was there before this one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..beside import Beside
from ..format import KVFormat
from .bits import TINY, early_launch, hadamard
from .key_means import take_means
from .scores import LOG2_E
from .store import store_arguments, store_kernel

ROWS = 1  # of a program, which is a warp


@triton.jit
def rotate_kernel(
    x_ptr, rotation_ptr, out_ptr, stride_b, stride_h, stride_t, stride_d, rows, heads, tokens,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, H, tokens, D] float32, contiguous = x @ rotation."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch, head = row // tokens // heads, row // tokens % heads
    x_ptr += batch * stride_b + head * stride_h + row % tokens * stride_t
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        dims = start + tl.arange(0, BLOCK_K)
        mask = (row < rows)[:, None] & (dims < DIM)[None, :]
        x = tl.load(x_ptr[:, None] + dims[None, :] * stride_d, mask=mask, other=0.0)
        mask = (dims < DIM)[:, None] & (columns < DIM)[None, :]
        rotation = tl.load(rotation_ptr + dims[:, None] * DIM + columns[None, :], mask=mask, other=0.0)
        out = tl.dot(x.to(tl.float32), rotation, out, input_precision="ieee")
    mask = (row < rows)[:, None] & (columns < DIM)[None, :]
    tl.store(out_ptr + row[:, None] * DIM + columns[None, :], out, mask=mask)


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
    q_ptr, rotation_ptr, out_ptr, scale_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, rows, kv_heads,
    q_len, scale, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rotate_block(
        tl.program_id(0), q_ptr, rotation_ptr, out_ptr, scale_ptr, q_stride_b, q_stride_h, q_stride_t,
        q_stride_d, rows, kv_heads, q_len, scale, DIM, HEADS, BLOCK_M,
    )  # fmt: skip


@triton.jit
def prepare_kernel(
    cache_ptr, k_ptr, v_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr,
    exact_from_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h, k_stride_b,
    k_stride_h, k_stride_t, k_stride_d, v_stride_b, v_stride_h, v_stride_t, v_stride_d, lens_stride,
    from_stride, v_rows_offset, k_scales_offset, v_scales_offset, vectors, kv_heads, new, capacity,
    segments, q_ptr, out_ptr, scale_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, rows, scale,
    HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    K_LO: tl.constexpr, K_HI: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_MAGNITUDES: tl.constexpr,
    V_MAGNITUDES: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`store_kernel` in two rows of the grid, then the queries."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if tl.program_id(1) < 2:
        store_kernel(
            cache_ptr, k_ptr, v_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr,
            exact_from_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h,
            k_stride_b, k_stride_h, k_stride_t, k_stride_d, v_stride_b, v_stride_h, v_stride_t, v_stride_d,
            lens_stride, from_stride, v_rows_offset, k_scales_offset, v_scales_offset, vectors, kv_heads,
            new, capacity, segments, HAS_MEAN, HAS_EXACT, SINKS, RECENT, K_LO, K_HI, K_BITS, V_BITS,
            K_MAGNITUDES, V_MAGNITUDES, K_UNIT, V_UNIT, K_DIM, V_DIM, GROUP, PAGE, BLOCK, BLOCK_K,
        )  # fmt: skip
    else:
        rotate_block(
            (tl.program_id(1) - 2) * tl.num_programs(0) + tl.program_id(0), q_ptr, k_rotation_ptr, out_ptr,
            scale_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, rows, kv_heads, new, scale, K_DIM,
            HEADS, BLOCK_M,
        )  # fmt: skip


class Queries(NamedTuple):
    """Rotated queries; rows are token-major.

    Attributes:
        rows: `[B, Hkv, q * H / Hkv, D]` float16, over their largest magnitudes.
        factors: `[B, Hkv, q * H / Hkv]` float32: a score in base 2 is the factor times the product of a row
            and a rotated key.
    """

    rows: torch.Tensor
    factors: torch.Tensor


def empty_queries(q: torch.Tensor, kv_heads: int) -> Queries:
    """Of q `[B, H, q, D]`, not filled."""
    batch, heads, q_len, dim = q.shape
    group = heads // kv_heads
    rows = torch.empty((batch, kv_heads, q_len * group, dim), dtype=torch.float16, device=q.device)
    return Queries(rows, torch.empty(rows.shape[:-1], dtype=torch.float32, device=q.device))


def rotate_queries(q: torch.Tensor, rotation: torch.Tensor, kv_heads: int, scale: float) -> Queries:
    """Rotate q `[B, H, q, D]`, D a power of two."""
    queries = empty_queries(q, kv_heads)
    rows = queries.factors.numel()
    query_kernel[(triton.cdiv(rows, ROWS),)](
        q, rotation, *queries, *q.stride(), rows, kv_heads, q.shape[2], scale, DIM=q.shape[3],
        HEADS=q.shape[1] // kv_heads, BLOCK_M=ROWS, num_warps=1, **early_launch(q.device),
    )  # fmt: skip
    return queries


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
    block_table: torch.Tensor | None = None,
) -> Queries:
    """`store` and `rotate_queries` in one launch, for dimensions that are powers of two up to 256."""
    queries = empty_queries(q, cache.shape[1])
    take_means(k, seq_lens, beside)
    arguments, constants = store_arguments(
        cache, k, v, seq_lens, k_rotation, v_rotation, fmt, beside, block_table
    )
    rows = queries.factors.numel()
    blocks = triton.cdiv(k[..., 0].numel(), constants["BLOCK"])
    prepare_kernel[(blocks, 2 + triton.cdiv(triton.cdiv(rows, ROWS), blocks))](
        *arguments, q, *queries, *q.stride(), rows, scale, **constants, HEADS=q.shape[1] // k.shape[1],
        BLOCK_M=ROWS, num_warps=1, **early_launch(q.device),
    )  # fmt: skip
    return queries


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """`x @ rotation` for x `[B, H, q, D]`, in float32."""
    batch, heads, tokens, dim = x.shape
    out = torch.empty((batch, heads, tokens, dim), dtype=torch.float32, device=x.device)
    rows = batch * heads * tokens
    block_m, block_d = 16, 32  # small blocks: few rows, many programs
    rotate_kernel[(triton.cdiv(rows, block_m), triton.cdiv(dim, block_d))](
        x, rotation, out, *x.stride(), rows, heads, tokens, DIM=dim, BLOCK_M=block_m, BLOCK_D=block_d,
        BLOCK_K=32, num_warps=4,
    )  # fmt: skip
    return out
