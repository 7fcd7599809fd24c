"""The first launch of decoding: rotate the queries.

For decoding by warps they are brought to the range of float16, and other programs of the launch attend to
exact tokens (`exact`); when such a step also appends, others store the new tokens (`store_and_rotate`). For
the portable kernel they are float32 (`rotate`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..beside import Beside
from ..format import KVFormat
from .bits import TINY, early_launch, hadamard
from .exact import ExactWork, attend_to_exact, exact_work
from .scores import LOG2_E
from .store import store_arguments, store_kernel, take_mean

ROWS = 1  # of a program, which is a warp


@triton.jit
def rotate_kernel(
    x_ptr, rotation_ptr, mean_ptr, out_ptr, mean_score_ptr, stride_b, stride_h, stride_t, stride_d, rows,
    heads, tokens, scale, HAS_MEAN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, H, tokens, D] float32, contiguous = x @ rotation; the scores of the means in base 2."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch, head = row // tokens // heads, row // tokens % heads
    x_ptr += batch * stride_b + head * stride_h + row % tokens * stride_t
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    score = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        dims = start + tl.arange(0, BLOCK_K)
        mask = (row < rows)[:, None] & (dims < DIM)[None, :]
        x = tl.load(x_ptr[:, None] + dims[None, :] * stride_d, mask=mask, other=0.0)
        if HAS_MEAN:
            mean_ptrs = mean_ptr + (row // tokens // HEADS * DIM)[:, None] + dims[None, :]
            mean = tl.load(mean_ptrs, mask=mask, other=0.0)
            score += tl.sum(x.to(tl.float32) * mean.to(tl.float32), axis=1)
        mask = (dims < DIM)[:, None] & (columns < DIM)[None, :]
        rotation = tl.load(rotation_ptr + dims[:, None] * DIM + columns[None, :], mask=mask, other=0.0)
        out = tl.dot(x.to(tl.float32), rotation, out, input_precision="ieee")
    mask = (row < rows)[:, None] & (columns < DIM)[None, :]
    tl.store(out_ptr + row[:, None] * DIM + columns[None, :], out, mask=mask)
    if HAS_MEAN:
        mask = (row < rows) & (tl.program_id(1) == row * 0)  # one shape, as in `decode`
        tl.store(mean_score_ptr + row, score * (scale * LOG2_E), mask=mask)


@triton.jit
def rotate_block(
    block, q_ptr, rotation_ptr, mean_ptr, out_ptr, scale_ptr, mean_score_ptr, stride_b, stride_h, stride_t,
    stride_d, rows, kv_heads, q_len, scale, MEAN_SCORES: tl.constexpr, DIM: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rotated query rows [batch, KV head, token, head of the group], over their largest magnitude.

    And, if asked for, the scores of the means.
    """
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group, token = row // HEADS // q_len, row // HEADS % q_len
    head = group % kv_heads * HEADS + row % HEADS
    dims = tl.arange(0, DIM)
    q_ptr += group // kv_heads * stride_b + head * stride_h + token * stride_t
    q = tl.load(q_ptr[:, None] + dims[None, :] * stride_d, mask=(row < rows)[:, None], other=0.0)
    if MEAN_SCORES:
        mean_ptrs = mean_ptr + group[:, None] * DIM + dims[None, :]
        mean = tl.load(mean_ptrs, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
        score = tl.sum(q.to(tl.float32) * mean, axis=1) * (scale * LOG2_E)
        tl.store(mean_score_ptr + row, score, mask=row < rows)
    # The rotation is its first column times the Hadamard matrix.
    signs = tl.load(rotation_ptr + dims * DIM) * scale
    y = hadamard(q.to(tl.float32) * signs[None, :])
    peak = tl.maximum(tl.max(tl.abs(y), axis=1), TINY)
    out = (y / peak[:, None]).to(tl.float16)
    tl.store(out_ptr + row[:, None] * DIM + dims[None, :], out, mask=(row < rows)[:, None])
    tl.store(scale_ptr + row, peak * LOG2_E, mask=row < rows)


@triton.jit
def query_kernel(
    q_ptr, rotation_ptr, mean_ptr, out_ptr, scale_ptr, mean_score_ptr, exact_ptr, exact_from_ptr,
    seq_lens_ptr, from_stride, lens_stride, bounds_ptr, mask_ptr, part_ptr, log_ptr, bounds_stride_b,
    bounds_stride_t, mask_stride_b, mask_stride_n, max_len, q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    rows, kv_rows, kv_heads, q_len, scale, exact_programs, MEAN_SCORES: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, EXACT_ROWS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Exact tokens in the first programs, the queries in the others."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if tl.program_id(0) < exact_programs:
        if EXACT_ROWS > 0:
            attend_to_exact(
                tl.program_id(0), q_ptr, q_ptr, q_ptr, exact_ptr, exact_from_ptr, seq_lens_ptr, bounds_ptr,
                mask_ptr, part_ptr, log_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, 0, 0, 0,
                0, 0, 0, lens_stride, from_stride, bounds_stride_b, bounds_stride_t, mask_stride_b,
                mask_stride_n, kv_rows, kv_heads, q_len, max_len, scale, False, HAS_BOUNDS, MASK, SOFTCAP,
                SINKS, RECENT, DIM, V_DIM, HEADS, EXACT_ROWS, TOKENS,
            )  # fmt: skip
    else:
        rotate_block(
            tl.program_id(0) - exact_programs, q_ptr, rotation_ptr, mean_ptr, out_ptr, scale_ptr,
            mean_score_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, rows, kv_heads, q_len, scale,
            MEAN_SCORES, DIM, HEADS, BLOCK_M,
        )  # fmt: skip


@triton.jit
def prepare_kernel(
    cache_ptr, k_ptr, v_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr,
    exact_from_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h, k_stride_b,
    k_stride_h, k_stride_t, k_stride_d, v_stride_b, v_stride_h, v_stride_t, v_stride_d, lens_stride,
    from_stride, v_rows_offset, k_scales_offset, v_scales_offset, vectors, kv_heads, new, capacity,
    q_ptr, out_ptr, scale_ptr, mean_score_ptr, bounds_ptr, mask_ptr, part_ptr, log_ptr, bounds_stride_b,
    bounds_stride_t, mask_stride_b, mask_stride_n, max_len, q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    rows, kv_rows, scale, exact_blocks,
    HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_MAGNITUDES: tl.constexpr,
    V_MAGNITUDES: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, MEAN_SCORES: tl.constexpr, HAS_BOUNDS: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT_ROWS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`store_kernel` in two rows of the grid, exact tokens in `exact_blocks` more, then the queries."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = (tl.program_id(1) - 2) * tl.num_programs(0) + tl.program_id(0)
    if tl.program_id(1) < 2:
        store_kernel(
            cache_ptr, k_ptr, v_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr,
            exact_from_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h,
            k_stride_b, k_stride_h, k_stride_t, k_stride_d, v_stride_b, v_stride_h, v_stride_t, v_stride_d,
            lens_stride, from_stride, v_rows_offset, k_scales_offset, v_scales_offset, vectors, kv_heads,
            new, capacity, HAS_MEAN, HAS_EXACT, SINKS,
            RECENT, K_BITS, V_BITS, K_MAGNITUDES, V_MAGNITUDES, K_UNIT, V_UNIT, K_DIM, V_DIM, GROUP, PAGE,
            BLOCK, BLOCK_K,
        )  # fmt: skip
    elif tl.program_id(1) < 2 + exact_blocks:
        if EXACT_ROWS > 0:
            attend_to_exact(
                program, q_ptr, k_ptr, v_ptr, exact_ptr, exact_from_ptr, seq_lens_ptr, bounds_ptr, mask_ptr,
                part_ptr, log_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, k_stride_b, k_stride_h,
                k_stride_t, v_stride_b, v_stride_h, v_stride_t, lens_stride,
                from_stride, bounds_stride_b, bounds_stride_t, mask_stride_b, mask_stride_n, kv_rows,
                kv_heads, new, max_len, scale, True, HAS_BOUNDS, MASK, SOFTCAP, SINKS, RECENT, K_DIM, V_DIM,
                HEADS, EXACT_ROWS, TOKENS,
            )  # fmt: skip
    else:
        rotate_block(
            program - exact_blocks * tl.num_programs(0), q_ptr, k_rotation_ptr, mean_ptr, out_ptr,
            scale_ptr, mean_score_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, rows, kv_heads, new,
            scale, MEAN_SCORES, K_DIM, HEADS, BLOCK_M,
        )  # fmt: skip


class Queries(NamedTuple):
    """Rotated queries; rows are token-major.

    Attributes:
        rows: `[B, Hkv, q * H / Hkv, D]` float16, over their largest magnitudes.
        factors: `[B, Hkv, q * H / Hkv]` float32: a score in base 2 is the factor times the product of a row
            and a rotated key.
        mean_scores: like the factors, the scores of the mean of keys in base 2; None if not asked for.
    """

    rows: torch.Tensor
    factors: torch.Tensor
    mean_scores: torch.Tensor | None


def empty_queries(q: torch.Tensor, kv_heads: int, mean_scores: bool) -> Queries:
    """Of q `[B, H, q, D]`, not filled."""
    batch, heads, q_len, dim = q.shape
    group = heads // kv_heads
    rows = torch.empty((batch, kv_heads, q_len * group, dim), dtype=torch.float16, device=q.device)
    factors = torch.empty(rows.shape[:-1], dtype=torch.float32, device=q.device)
    return Queries(rows, factors, torch.empty_like(factors) if mean_scores else None)


def rotate_queries(
    q: torch.Tensor,
    rotation: torch.Tensor,
    kv_heads: int,
    scale: float,
    k_mean: torch.Tensor | None,
    work: ExactWork | None = None,
) -> Queries:
    """Rotate q `[B, H, q, D]`, D a power of two; with a mean, take its scores; do `exact_work`."""
    work = work or exact_work(q, kv_heads, q.shape[3])
    queries = empty_queries(q, kv_heads, k_mean is not None)
    rows = queries.factors.numel()
    query_kernel[(work.programs + triton.cdiv(rows, ROWS),)](
        q, rotation, q if k_mean is None else k_mean, *filled(queries), *work.kept, *work.arguments,
        *q.stride(), rows, q.shape[0] * kv_heads, kv_heads, q.shape[2], scale, work.programs,
        **work.constants, MEAN_SCORES=k_mean is not None, DIM=q.shape[3], HEADS=q.shape[1] // kv_heads,
        BLOCK_M=ROWS, num_warps=1, **early_launch(q.device),
    )  # fmt: skip
    return queries


def filled(queries: Queries) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a kernel fills; any tensor in the place of one that it does not."""
    rows, factors, mean_scores = queries
    return rows, factors, factors if mean_scores is None else mean_scores


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
    work: ExactWork,
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
) -> Queries:
    """`store` and `rotate_queries` in one launch, for dimensions that are powers of two up to 256.

    A softcap needs the scores of the means.
    """
    mean_scores = softcap is not None and beside.k_mean is not None
    queries = empty_queries(q, cache.shape[1], mean_scores)
    take_mean(k, seq_lens, beside)
    arguments, constants = store_arguments(
        cache, k, v, seq_lens, k_rotation, v_rotation, fmt, beside, block_table
    )
    rows = queries.factors.numel()
    blocks = triton.cdiv(k[..., 0].numel(), constants["BLOCK"])
    exact_blocks = triton.cdiv(work.programs, blocks)
    prepare_kernel[(blocks, 2 + exact_blocks + triton.cdiv(triton.cdiv(rows, ROWS), blocks))](
        *arguments, q, *filled(queries), *work.arguments, *q.stride(), rows, k.shape[0] * k.shape[1], scale,
        exact_blocks, **constants | work.constants, MEAN_SCORES=mean_scores, HEADS=q.shape[1] // k.shape[1],
        BLOCK_M=ROWS, num_warps=1, **early_launch(q.device),
    )  # fmt: skip
    return queries


def rotate(
    x: torch.Tensor, rotation: torch.Tensor, scale: float, k_mean: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x @ rotation` for x `[B, H, q, D]`, in float32; with a mean its scores `[B, H, q]` in base 2."""
    batch, heads, tokens, dim = x.shape
    out = torch.empty((batch, heads, tokens, dim), dtype=torch.float32, device=x.device)
    mean_scores = None if k_mean is None else torch.empty_like(out[..., 0])
    rows = batch * heads * tokens
    block_m, block_d = 16, 32  # small blocks: few rows, many programs
    grid = (triton.cdiv(rows, block_m), triton.cdiv(dim, block_d))
    rotate_kernel[grid](
        x, rotation, x if k_mean is None else k_mean, out, out if mean_scores is None else mean_scores,
        *x.stride(), rows, heads, tokens, scale, HAS_MEAN=k_mean is not None,
        HEADS=1 if k_mean is None else heads // k_mean.shape[1], DIM=dim, BLOCK_M=block_m,
        BLOCK_D=block_d, BLOCK_K=32, num_warps=4,
    )  # fmt: skip
    return out, mean_scores
