"""Attention over all tokens that are there as they came: exact ones, and those of a chunk of a prompt.

For any number of query rows, any dtype and head dimension: flash attention by row blocks, first over the
slots of exact tokens before the chunk, then over the chunk, up to the last token that a block sees. One
partial output a row (`Parts`): memory does not grow with the tokens. Few rows over exact tokens are
`exact`'s, in a launch that is there anyway.
"""

import torch
import triton
import triton.language as tl

from ..beside import Beside, Chunk
from .bits import operand_dtype
from .exact import Parts, empty_parts, exact_positions
from .scores import LOG2_E, hide, mask_arguments, soften, squash, visible_slots
from .varlen import load_block


@triton.jit
def load_tokens(
    ptr, stride_d, known, first, OPERAND: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Coordinates `first`.. of the `known` tokens at `ptr` [tokens], zero for others."""
    dims = (first + tl.arange(0, BLOCK_D))[None, :]
    mask = known[:, None] & (dims < DIM)
    return tl.load(ptr[:, None] + dims * stride_d, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def attend_tile(
    acc, total, peak, q, q_ptr, q_stride_t, q_stride_d, token, q_len, valid, low, high, mask_ptr, stride_n,
    k_ptr, k_stride_d, v_ptr, v_stride_d, position, known, dv_start, scale, TWO_WEIGHTS: tl.constexpr,
    OPERAND: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A tile of tokens, keys and values at `k_ptr` and `v_ptr` [tokens]: online softmax, base 2."""
    scores = tl.zeros([token.shape[0], position.shape[0]], tl.float32)
    for first in range(0, K_DIM, BLOCK_D):
        if K_DIM > BLOCK_D:
            q = load_block(q_ptr, q_stride_t, q_stride_d, token, q_len, first, OPERAND, K_DIM, BLOCK_D)
        k = load_tokens(k_ptr, k_stride_d, known, first, OPERAND, K_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    scores = squash(scores * (scale * LOG2_E), SOFTCAP)
    visible = known[None, :] & (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
    scores = hide(scores, visible, mask_ptr, position, stride_n, valid, MASK)
    weights, decay, total, peak = soften(scores, total, peak)
    v = load_tokens(v_ptr, v_stride_d, known, dv_start, OPERAND, V_DIM, BLOCK_DV)
    rounded = weights.to(OPERAND)
    acc = tl.dot(rounded, v, acc * decay[:, None], input_precision="ieee")
    if TWO_WEIGHTS:
        acc = tl.dot((weights - rounded.to(tl.float32)).to(OPERAND), v, acc)
    return acc, total, peak


@triton.jit
def unpacked_kernel(
    q_ptr, k_ptr, v_ptr, exact_ptr, exact_from_ptr, seq_lens_ptr, bounds_ptr, mask_ptr, part_ptr, log_ptr,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d, k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d, lens_stride, from_stride, bounds_stride_b,
    bounds_stride_t, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_n, q_len, own, max_len, scale,
    SINKS: tl.constexpr, RECENT: tl.constexpr, HAS_OWN: tl.constexpr, OPERAND: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, HEADS: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Over the exact tokens before the `own` last tokens of each row, and over these."""
    EXACT: tl.constexpr = SINKS + RECENT
    DV_BLOCKS: tl.constexpr = (V_DIM + BLOCK_DV - 1) // BLOCK_DV
    dv_start = tl.program_id(0) % DV_BLOCKS * BLOCK_DV
    # The last rows, which see most, come first.
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // DV_BLOCKS
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv_row = batch * tl.num_programs(1) + kv_head
    rows = q_len * HEADS  # token-major, the heads of a group fastest
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    token, head = row // HEADS, kv_head * HEADS + row % HEADS

    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    low, high = visible_slots(
        bounds_ptr + batch * bounds_stride_b, bounds_stride_t, token, valid, seq_len, q_len, max_len,
        HAS_BOUNDS, MASK,
    )  # fmt: skip
    low, high = tl.where(valid, low, max_len), tl.where(valid, high, 0)
    before = (seq_len - own).to(tl.int32)  # tokens, and the position of the chunk's first

    q_ptr += batch * q_stride_b + head[:, None] * q_stride_h
    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    v_ptr += batch * v_stride_b + kv_head * v_stride_h
    mask_ptr += batch * mask_stride_b + head * mask_stride_h + token.to(tl.int64) * mask_stride_t
    q = load_block(q_ptr, q_stride_t, q_stride_d, token, q_len, 0, OPERAND, K_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if EXACT > 0:
        length, end = seq_len.to(tl.int32), tl.minimum(before, tl.max(high, axis=0))
        exact_from = tl.load(exact_from_ptr + batch * from_stride).to(tl.int32)
        for start in range(0, EXACT, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            position, held = exact_positions(slot, length, exact_from, 0, end, SINKS, RECENT)
            held &= position >= tl.min(low, axis=0)
            if tl.max(held.to(tl.int32), axis=0) > 0:
                ptr = exact_ptr + (kv_row * EXACT + slot) * (K_DIM + V_DIM)
                acc, total, peak = attend_tile(
                    acc, total, peak, q, q_ptr, q_stride_t, q_stride_d, token, q_len, valid, low, high,
                    mask_ptr, mask_stride_n, ptr, 1, ptr + K_DIM, 1, position, held, dv_start, scale,
                    # What rounding leaves of the weights is a second product, as nowhere in a chunk.
                    not HAS_OWN and tl.bfloat16 == OPERAND, OPERAND, K_DIM, V_DIM, MASK, SOFTCAP, BLOCK_D,
                    BLOCK_DV,
                )  # fmt: skip
    if HAS_OWN:
        seen = low < high
        first = tl.maximum(tl.min(tl.where(seen, low, max_len), axis=0) - before, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(tl.max(tl.where(seen, high, 0), axis=0) - before, own)
        for start in range(first, end, BLOCK_N):
            place = start + tl.arange(0, BLOCK_N)
            acc, total, peak = attend_tile(
                acc, total, peak, q, q_ptr, q_stride_t, q_stride_d, token, q_len, valid, low, high,
                mask_ptr, mask_stride_n, k_ptr + place.to(tl.int64) * k_stride_t, k_stride_d,
                v_ptr + place.to(tl.int64) * v_stride_t, v_stride_d, before + place, place < own, dv_start,
                scale, False, OPERAND, K_DIM, V_DIM, MASK, SOFTCAP, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    part = kv_row * rows + row
    dims = dv_start + tl.arange(0, BLOCK_DV)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    mask = valid[:, None] & (dims < V_DIM)[None, :]
    tl.store(part_ptr + part[:, None] * V_DIM + dims[None, :], out, mask=mask)
    tl.store(log_ptr + part, peak + tl.log2(total), mask=valid & (dv_start == row * 0))


def attend_unpacked(
    q: torch.Tensor, own: Chunk | None, beside: Beside, seq_lens: torch.Tensor,
    attn_mask: torch.Tensor | None, bounds: torch.Tensor | None, max_len: int, scale: float,
    softcap: float | None, kv_heads: int, v_dim: int,
) -> Parts | None:  # fmt: skip
    """q `[B, H, q, D]` over exact tokens and the chunk `own`: one part; None if there is neither.

    Exact tokens of the chunk count as its own. `bounds` has a row for each row of the batch and each query.
    """
    exact = beside.exact
    if own is None and exact is None:
        return None
    batch, heads, q_len, dim = q.shape
    k, v = own or (q, q)
    rows = q_len * heads // kv_heads
    parts = empty_parts(q, kv_heads, 1, v_dim)
    operand = operand_dtype(*(x.dtype for x in (q, k, v, exact) if x is not None))
    wide = operand == tl.float32  # float32 dots run on plain multiply-adds: small tiles
    block_m = 16 if wide else min(64, max(16, triton.next_power_of_2(rows)))
    block_n = 16 if wide else 64 if max(dim, v_dim) <= 128 else 32
    # Up to 256 dimensions of a key at once, larger ones in pieces; values in blocks of the grid.
    largest = 64 if wide else 256
    block_d = max(16, triton.next_power_of_2(dim))
    block_d = block_d if block_d <= largest else largest // 2
    block_dv = min(largest, max(16, triton.next_power_of_2(v_dim)))
    mask_kind, mask, mask_strides = mask_arguments(attn_mask, q, max_len)
    programs = triton.cdiv(rows, block_m) * triton.cdiv(v_dim, block_dv)
    exact_from = beside.exact_from
    unpacked_kernel[(programs, kv_heads, batch)](
        q, k, v, q if exact is None else exact, seq_lens if exact_from is None else exact_from, seq_lens,
        q if bounds is None else bounds, mask, *parts, *q.stride(), *k.stride(), *v.stride(),
        seq_lens.expand(batch).stride(0), 0 if exact_from is None else exact_from.expand(batch).stride(0),
        *((0, 0) if bounds is None else bounds.stride()[:2]), *mask_strides, q_len,
        0 if own is None else k.shape[2], max_len, scale, SINKS=beside.sink_tokens,
        RECENT=beside.recent_tokens, HAS_OWN=own is not None, OPERAND=operand, K_DIM=dim, V_DIM=v_dim,
        HEADS=heads // kv_heads, HAS_BOUNDS=bounds is not None, MASK=mask_kind, SOFTCAP=softcap or 0.0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
        num_warps=4 if block_m * block_dv <= 8192 else 8, num_stages=2,
    )  # fmt: skip
    return parts
