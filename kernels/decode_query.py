"""The first step of decoding by warps: rotate the queries and bring them to the range of float16."""

import torch
import triton
import triton.language as tl

from .bits import TINY, hadamard

LOG2_E = tl.constexpr(1.4426950408889634)
ROWS = 2  # of a program, which is a warp


@triton.jit
def query_kernel(
    q_ptr, rotation_ptr, out_ptr, scale_ptr, stride_b, stride_h, stride_t, stride_d, rows, kv_heads, q_len,
    scale, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rotated query rows [batch, KV head, token, head of the group], over their largest magnitude."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
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


def rotate_queries(
    q: torch.Tensor, rotation: torch.Tensor, kv_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, q, D] -> rows [B, Hkv, q * H / Hkv, D] float16, token-major, and their factors.

    A score in base 2 is the factor times the product of a row and a rotated key. D is a power of two.
    """
    batch, heads, q_len, dim = q.shape
    group = heads // kv_heads
    queries = torch.empty((batch, kv_heads, q_len * group, dim), dtype=torch.float16, device=q.device)
    factors = torch.empty((batch, kv_heads, q_len * group), dtype=torch.float32, device=q.device)
    rows = factors.numel()
    query_kernel[(triton.cdiv(rows, ROWS),)](
        q, rotation, queries, factors, *q.stride(), rows, kv_heads, q_len, scale,
        DIM=dim, HEADS=group, BLOCK_M=ROWS, num_warps=1,
    )  # fmt: skip
    return queries, factors
