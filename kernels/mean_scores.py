"""The scores of the means of keys, which attention over packed keys adds to those of their codes.

One for each query row and segment of `SEGMENT` positions: `[B, Hkv, segments, rows]` float32, in base 2,
rows token-major as everywhere. A tile of an attention kernel lies in one segment, so that there it is one
number a row. For decoding by warps `decode_query` computes them in a launch that is there anyway.
Bytes: the means and queries once, results 4 bytes for each row and segment.
"""

import torch
import triton
import triton.language as tl

from .scores import LOG2_E
from .segments import MEAN_OF, mean_source

SEGMENTS = 16  # of a program: the least columns of a dot


@triton.jit
def score_means(
    q_ptr, mean_ptr, score_ptr, seq_len, new, group, block, row_from, row_to, stride_b, stride_h, stride_t,
    stride_d, rows, kv_heads, segments, scale, DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Those of block `block` of segments for query rows `row_from` .. `row_to` - 1 of a KV head.

    With the means as a store of the last `new` tokens of `seq_len` leaves them; 0: as they are.
    """
    segment = block * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = (segment * MEAN_OF < seq_len) & (segment < segments)
    _, source = mean_source(segment * MEAN_OF, seq_len - new, new)
    known = exists & (source >= 0)
    same: tl.constexpr = q_ptr.dtype.element_ty == mean_ptr.dtype.element_ty
    OPERAND: tl.constexpr = q_ptr.dtype.element_ty if same else tl.float32
    mean_ptr += group * segments * DIM
    score_ptr += group * segments * rows
    q_ptr += group // kv_heads * stride_b + group % kv_heads * HEADS * stride_h
    for first in range(row_from, row_to, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        q_ptrs = q_ptr + (row % HEADS * stride_h + row // HEADS * stride_t)[:, None]
        scores = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
        for start in range(0, DIM, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            mask = (row < rows)[:, None] & (dims < DIM)[None, :]
            q = tl.load(q_ptrs + dims[None, :] * stride_d, mask=mask, other=0.0).to(OPERAND)
            mask = known[:, None] & (dims < DIM)[None, :]
            mean = tl.load(mean_ptr + source[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(mean.to(OPERAND)), scores, input_precision="ieee")
        ptrs = score_ptr + segment[None, :] * rows + row[:, None]
        tl.store(ptrs, scores * (scale * LOG2_E), mask=(row < rows)[:, None] & exists[None, :])


@triton.jit
def mean_scores_kernel(
    q_ptr, mean_ptr, score_ptr, seq_lens_ptr, lens_stride, stride_b, stride_h, stride_t, stride_d, rows,
    kv_heads, segments, scale, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of segments, batch * KV heads)."""
    group = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + group // kv_heads * lens_stride)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    if tl.program_id(1) * BLOCK_S * MEAN_OF < seq_len:
        score_means(
            q_ptr, mean_ptr, score_ptr, seq_len, 0, group, tl.program_id(1), first, first + 1, stride_b,
            stride_h, stride_t, stride_d, rows, kv_heads, segments, scale, DIM, HEADS, BLOCK_M, BLOCK_S,
            BLOCK_D,
        )  # fmt: skip


def empty_scores(q: torch.Tensor, k_mean: torch.Tensor) -> torch.Tensor:
    """`[B, Hkv, segments, rows]` for q `[B, H, q, D]`, not filled."""
    batch, heads, q_len, _ = q.shape
    kv_heads, segments = k_mean.shape[1:3]
    shape = (batch, kv_heads, segments, q_len * heads // kv_heads)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def mean_scores(
    q: torch.Tensor, k_mean: torch.Tensor | None, seq_lens: torch.Tensor, scale: float
) -> torch.Tensor | None:
    """The scores for q `[B, H, q, D]`, where the row has tokens; None without means."""
    if k_mean is None:
        return None
    batch, heads, _, dim = q.shape
    scores = empty_scores(q, k_mean)
    _, kv_heads, segments, rows = scores.shape
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(rows, block_m), triton.cdiv(segments, SEGMENTS), batch * kv_heads)
    mean_scores_kernel[grid](
        q, k_mean, scores, seq_lens, seq_lens.expand(batch).stride(0), *q.stride(), rows, kv_heads,
        segments, scale, DIM=dim, HEADS=heads // kv_heads, BLOCK_M=block_m, BLOCK_S=SEGMENTS,
        BLOCK_D=min(64, max(16, triton.next_power_of_2(dim))), num_warps=4,
    )  # fmt: skip
    return scores
