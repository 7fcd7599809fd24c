"""One tile of `decode`: what its rows see of it, and a step of the online softmax."""

import triton
import triton.language as tl

from .bits import FP16_UNIT, TINY
from .decode_rows import load_query, load_rows
from .pages import TOGETHER, find_tokens
from .scores import BIT_MASK, KEY_MASK, NO_MASK, load_bits, load_mask, squash
from .segments import MEAN_OF


@triton.jit
def apply_mask(
    scores, start, low, high, mask_ptr, mask_stride_n, valid, max_len, MASK: tl.constexpr
):  # fmt: skip
    """Scores of the slots from `start`, -inf where a row does not see them; the mask's bias added."""
    slots = start + tl.arange(0, scores.shape[1])
    visible = (slots[None, :] >= low[:, None]) & (slots[None, :] < high[:, None])
    if MASK == KEY_MASK:
        let_through, _ = load_mask(mask_ptr + slots.to(tl.int64) * mask_stride_n, slots < max_len, MASK)
        visible &= let_through[None, :]
    elif MASK == BIT_MASK:
        visible &= load_bits(mask_ptr, mask_stride_n, start, valid, max_len, scores.shape[1])
    elif MASK != NO_MASK:
        ptrs = mask_ptr[:, None] + slots.to(tl.int64)[None, :] * mask_stride_n
        let_through, bias = load_mask(ptrs, valid[:, None] & (slots < max_len)[None, :], MASK)
        visible &= let_through
        scores += bias
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def hide_in_part(
    scores, start, low, high, whole_from, whole_to, mask_ptr, mask_stride_n, valid, max_len,
    HAS_WHOLE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """`apply_mask`, but for tiles that all rows see."""
    if MASK != NO_MASK and not HAS_WHOLE:  # without a branch the mask is loaded early
        return apply_mask(scores, start, low, high, mask_ptr, mask_stride_n, valid, max_len, MASK)
    if (start < whole_from) | (start + scores.shape[1] > whole_to):
        scores = apply_mask(scores, start, low, high, mask_ptr, mask_stride_n, valid, max_len, MASK)
    return scores


@triton.jit
def attend_tile(
    acc, total, peak, q, q_ptr, q_stride_d, valid, inv_peak, q_scale, mean_ptrs, mean_stride, table_ptr,
    table_stride, k_ptr, v_ptr, k_stride_b, k_stride_n, v_stride_b, v_stride_n, k_scale_ptr, v_scale_ptr,
    scale_stride_b, start, filled, dv_start, low, high, whole_from, whole_to, mask_ptr, mask_stride_n,
    max_len, HAS_WHOLE: tl.constexpr, MASK: tl.constexpr, HAS_MEAN: tl.constexpr, SOFTCAP: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_LO: tl.constexpr, K_HI: tl.constexpr,
    V_LO: tl.constexpr, V_HI: tl.constexpr, OPERAND: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, COPIES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of slots from `start`: the online softmax of flash attention, base 2."""
    PACKED: tl.constexpr = K_BITS != 16
    BLOCK_M: tl.constexpr = q.shape[0]
    slots = tl.arange(0, BLOCK_N)
    known, scale_at, page = start + slots < filled, start + slots, 0
    if PAGE > 0:
        wanted = start + slots // TOGETHER * TOGETHER < filled
        page, slot = find_tokens(table_ptr, table_stride, start + slots, wanted, PAGE)
        page = tl.max_constancy(page, TOGETHER)  # for loads of values that are as wide as a group
        known, scale_at = known & (page >= 0), page * scale_stride_b + slot
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K_DIM, BLOCK_D):
        if K_DIM > BLOCK_D:
            q = load_query(q_ptr, q_stride_d, valid, first, inv_peak, OPERAND, K_DIM, BLOCK_D)
        k = load_rows(
            k_ptr, k_stride_b, k_stride_n, slots, start, filled, page, first, K_BITS, K_LO, K_HI, OPERAND,
            K_DIM, 1, PAGE, BLOCK_D,
        )  # [BLOCK_N, BLOCK_D] # fmt: skip
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    if PACKED:
        k_scale = tl.load(k_scale_ptr + scale_at, mask=known, other=0.0).to(tl.float32)
        scores *= (k_scale * FP16_UNIT)[None, :]
    scores *= q_scale[:, None]
    if HAS_MEAN:
        mean_score = tl.load(mean_ptrs + start // MEAN_OF * mean_stride, mask=valid, other=0.0)
        scores += mean_score[:, None]
    scores = squash(scores, SOFTCAP)
    if PAGE > 0:  # a token without a page was dropped: a query that sees it gives NaN
        scores = tl.where((page < 0)[None, :], float("nan"), scores)
    scores = hide_in_part(
        scores, start, low, high, whole_from, whole_to, mask_ptr, mask_stride_n, valid, max_len, HAS_WHOLE,
        MASK,
    )  # fmt: skip

    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - origin[:, None])  # [BLOCK_M, BLOCK_N]
    decay = tl.exp2(peak - origin)
    total = total * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    v = load_rows(
        v_ptr, v_stride_b, v_stride_n, slots, start, filled, page, dv_start, V_BITS, V_LO, V_HI, OPERAND,
        V_DIM, GROUP, PAGE, BLOCK_DV,
    )  # [BLOCK_N, BLOCK_DV] # fmt: skip
    if PACKED:
        v_scale = tl.load(v_scale_ptr + scale_at, mask=known, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(v_scale, axis=0), TINY)
        weights *= (v_scale / largest)[None, :]
        acc += tl.dot(weights.to(OPERAND), v, input_precision="ieee") * (largest * FP16_UNIT)
    else:
        rounded = weights.to(OPERAND)
        if COPIES == 2:  # the second copy of the rows has what rounding leaves of their weights
            rest = (weights - rounded.to(tl.float32)).to(OPERAND)
            rounded = tl.where(tl.arange(0, BLOCK_M)[:, None] < BLOCK_M // COPIES, rounded, rest)
        acc = tl.dot(rounded, v, acc, input_precision="ieee")
    return acc, total, new_peak
