"""Flash attention over ragged batches of 16-bit or float32 keys and values.

Grid (query blocks of the longest sequence x blocks of value dimensions, heads, sequences); a block
past the end of its sequence does nothing. Causal blocks stop at the last key that they see. Bytes:
queries once, keys and values once per query block (from the second-level cache where they fit).
"""

import torch
import triton
import triton.language as tl

from .bits import operand_dtype

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_block(
    x_ptr, stride_t, stride_d, rows, row_count, first, OPERAND: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Coordinates `first`.. of `rows` of one sequence, zero outside; [rows, BLOCK_D]."""
    dims = (first + tl.arange(0, BLOCK_D))[None, :]
    mask = (rows < row_count)[:, None] & (dims < DIM)
    ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_t + dims * stride_d
    return tl.load(ptrs, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def varlen_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, starts_q_ptr, starts_k_ptr,
    q_stride_t, q_stride_h, q_stride_d, k_stride_t, k_stride_h, k_stride_d,
    v_stride_t, v_stride_h, v_stride_d, out_stride_t, out_stride_h, starts_q_stride, starts_k_stride,
    scale, CAUSAL: tl.constexpr, OPERAND: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    DV_BLOCKS: tl.constexpr = (V_DIM + BLOCK_DV - 1) // BLOCK_DV
    dv_start = tl.program_id(0) % DV_BLOCKS * BLOCK_DV
    block_start = tl.program_id(0) // DV_BLOCKS * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    start_q = tl.load(starts_q_ptr + sequence * starts_q_stride).to(tl.int64)
    start_k = tl.load(starts_k_ptr + sequence * starts_k_stride).to(tl.int64)
    q_len = (tl.load(starts_q_ptr + (sequence + 1) * starts_q_stride) - start_q).to(tl.int32)
    k_len = (tl.load(starts_k_ptr + (sequence + 1) * starts_k_stride) - start_k).to(tl.int32)
    if block_start >= q_len:
        return

    q_ptr += start_q * q_stride_t + head * q_stride_h
    k_ptr += start_k * k_stride_t + head // GROUP * k_stride_h
    v_ptr += start_k * v_stride_t + head // GROUP * v_stride_h
    rows = block_start + tl.arange(0, BLOCK_M)
    if CAUSAL:
        limit = rows + 1 + k_len - q_len  # how many keys a row sees, aligned bottom-right
        end = tl.minimum(tl.minimum(block_start + BLOCK_M, q_len) + k_len - q_len, k_len)
    else:
        limit = tl.zeros_like(rows) + k_len
        end = k_len
    q = load_block(q_ptr, q_stride_t, q_stride_d, rows, q_len, 0, OPERAND, K_DIM, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, K_DIM, BLOCK_D):
            if K_DIM > BLOCK_D:
                q = load_block(
                    q_ptr, q_stride_t, q_stride_d, rows, q_len, first, OPERAND, K_DIM, BLOCK_D
                )  # [BLOCK_M, BLOCK_D]
            k = load_block(
                k_ptr, k_stride_t, k_stride_d, keys, k_len, first, OPERAND, K_DIM, BLOCK_D
            )  # [BLOCK_N, BLOCK_D]
            scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        visible = keys[None, :] < limit[:, None]
        scores = tl.where(visible, scores * (scale * LOG2_E), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(peak - origin)
        total = total * decay + tl.sum(weights, axis=1)
        v = load_block(
            v_ptr, v_stride_t, v_stride_d, keys, k_len, dv_start, OPERAND, V_DIM, BLOCK_DV
        )  # [BLOCK_N, BLOCK_DV]
        acc = tl.dot(weights.to(OPERAND), v, acc * decay[:, None], input_precision="ieee")
        peak = new_peak

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    dims = dv_start + tl.arange(0, BLOCK_DV)
    out_ptrs = out_ptr + (start_q + rows)[:, None] * out_stride_t + head * out_stride_h
    mask = (rows < q_len)[:, None] & (dims < V_DIM)[None, :]
    tl.store(out_ptrs + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """Ragged attention: q `[Tq, H, D]`, k `[Tk, Hkv, D]`, v `[Tk, Hkv, Dv]` -> `[Tq, H, Dv]`."""
    _, heads, dim = q.shape
    dv = v.shape[-1]
    out = q.new_zeros((*q.shape[:-1], dv))  # zeros: tokens after the last sequence
    sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or sequences == 0 or max_seqlen_q == 0:
        return out
    operand = operand_dtype(q.dtype, k.dtype, v.dtype)
    wide = operand == tl.float32  # float32 dots run on plain multiply-adds: small tiles
    large = max(dim, dv) > 128
    block_m, block_n = (16, 16) if wide else (64, 32) if large else (64, 64)
    # Up to 256 dimensions of a key at once, larger ones in pieces; values in blocks of the grid.
    largest = 64 if wide else 256
    block_d = max(16, triton.next_power_of_2(dim))
    block_d = block_d if block_d <= largest else largest // 2
    block_dv = min(largest, max(16, triton.next_power_of_2(dv)))
    blocks = triton.cdiv(max_seqlen_q, block_m) * triton.cdiv(dv, block_dv)
    with torch.cuda.device_of(q):
        varlen_kernel[(blocks, heads, sequences)](
            q, k, v, out, cu_seqlens_q, cu_seqlens_k, *q.stride(), *k.stride(), *v.stride(),
            *out.stride()[:2], cu_seqlens_q.stride(0), cu_seqlens_k.stride(0), scale,
            CAUSAL=is_causal, OPERAND=operand, GROUP=heads // k.shape[1], K_DIM=dim, V_DIM=dv,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
            num_warps=8 if large and not wide else 4,  # 64 x 256 accumulators fit the registers
            num_stages=2,
        )  # fmt: skip
    return out
