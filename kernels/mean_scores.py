"""The scores of the means of keys, which attention over packed keys adds to those of their codes.

One for each query row and segment of `SEGMENT` positions: `[B, Hkv, segments, rows]` float32, in base 2,
rows token-major as everywhere. A tile of an attention kernel lies in one segment, so that there it is one
number a row. `decode_warp` computes its own.
Bytes: the means and queries once, results 4 bytes for each row and segment.
"""

import torch
import triton
import triton.language as tl

from .scores import LOG2_E
from .segments import MEAN_OF

SEGMENTS = 16  # of a program: the least columns of a dot


@triton.jit
def mean_scores_kernel(
    q_ptr, mean_ptr, score_ptr, seq_lens_ptr, lens_stride, stride_b, stride_h, stride_t, stride_d, rows,
    kv_heads, held, first, segments, scale, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of segments, batch * KV heads)."""
    group = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + group // kv_heads * lens_stride)
    place = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    segment = first + place
    if (first + tl.program_id(1) * BLOCK_S) * MEAN_OF < seq_len:
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = (segment * MEAN_OF < seq_len) & (segment < held) & (place < segments)
        same: tl.constexpr = q_ptr.dtype.element_ty == mean_ptr.dtype.element_ty
        OPERAND: tl.constexpr = q_ptr.dtype.element_ty if same else tl.float32
        mean_ptr += group * held * DIM
        q_ptr += group // kv_heads * stride_b + group % kv_heads * HEADS * stride_h
        q_ptrs = q_ptr + (row % HEADS * stride_h + (row // HEADS).to(tl.int64) * stride_t)[:, None]
        scores = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
        for start in range(0, DIM, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            mask = (row < rows)[:, None] & (dims < DIM)[None, :]
            q = tl.load(q_ptrs + dims[None, :] * stride_d, mask=mask, other=0.0).to(OPERAND)
            mask = exists[:, None] & (dims < DIM)[None, :]
            mean = tl.load(mean_ptr + segment[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(mean.to(OPERAND)), scores, input_precision="ieee")
        ptrs = score_ptr + (group * segments + place)[None, :] * rows + row[:, None]
        tl.store(ptrs, scores * (scale * LOG2_E), mask=(row < rows)[:, None] & exists[None, :])


def mean_scores(
    q: torch.Tensor,
    k_mean: torch.Tensor | None,
    seq_lens: torch.Tensor,
    scale: float,
    first: int = 0,
    segments: int | None = None,
) -> torch.Tensor | None:
    """The scores for q `[B, H, q, D]`, where the row has tokens; None without means.

    Of `segments` segments from the `first`; all of them unless given.
    """
    if k_mean is None:
        return None
    batch, heads, _, dim = q.shape
    kv_heads, held = k_mean.shape[1:3]
    segments = held if segments is None else segments
    rows = q.shape[2] * heads // kv_heads
    scores = torch.empty((batch, kv_heads, segments, rows), dtype=torch.float32, device=q.device)
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(rows, block_m), triton.cdiv(segments, SEGMENTS), batch * kv_heads)
    mean_scores_kernel[grid](
        q, k_mean, scores, seq_lens, seq_lens.expand(batch).stride(0), *q.stride(), rows, kv_heads,
        held, first, segments, scale, DIM=dim, HEADS=heads // kv_heads, BLOCK_M=block_m, BLOCK_S=SEGMENTS,
        BLOCK_D=min(64, max(16, triton.next_power_of_2(dim))), num_warps=4,
    )  # fmt: skip
    return scores
