"""From products to weights: softcap, masks, intervals of visible slots. Scores are in base 2.

A query row sees the slots low .. high - 1 (`bounds`, else the queries are the last tokens), of those that a
mask lets through.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)
NO_MASK, BOOL_MASK, FLOAT_MASK, KEY_MASK, BIT_MASK = (tl.constexpr(i) for i in range(5))


@triton.jit
def squash(scores, SOFTCAP: tl.constexpr):
    """Scores in base 2 after a softcap of natural ones, `SOFTCAP * tanh(s / SOFTCAP)`; 0: none."""
    if SOFTCAP == 0:
        return scores
    else:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / SOFTCAP)))
        return tanh * (SOFTCAP * LOG2_E)


@triton.jit
def load_mask(ptrs, inside, MASK: tl.constexpr):
    """What a mask lets through, and what it adds to scores."""
    if MASK != FLOAT_MASK:
        visible = tl.load(ptrs, mask=inside, other=0) != 0
        bias = 0.0
    else:
        bias = tl.load(ptrs, mask=inside, other=float("-inf")).to(tl.float32)
        visible = bias != float("-inf")
        bias = tl.maximum(bias * LOG2_E, LOWEST)  # finfo.min stays finite: such a row still attends
    return visible, bias


@triton.jit
def load_bits(row_ptrs, stride_n, start, valid, max_len, N: tl.constexpr):
    """What the bits of a mask let through of `N` keys from `start`, a multiple of `N`: [rows, N]."""
    key = tl.arange(0, N)[None, :]
    row_ptrs += start // 32 * stride_n
    words = tl.load(row_ptrs, mask=valid, other=0)[:, None]
    if N <= 32:
        place = key + start % 32
    else:
        tl.static_assert(N == 64)
        # A tensor is compared, not a number: Triton 3.9's interpreter wants it so.
        exists = valid & (start + 32 + 0 * valid.to(tl.int32) < max_len)
        second = tl.load(row_ptrs + stride_n, mask=exists, other=0)
        words = tl.where(key < 32, words, second[:, None])
        place = key % 32
    return (words >> place & 1) != 0


@triton.jit
def hide(scores, visible, mask_ptr, position, stride_n, valid, MASK: tl.constexpr):
    """Scores [rows, positions] with what a mask adds, -inf where not `visible` or not let through.

    `mask_ptr` has a pointer for each row; rows that are not `valid` read nothing.
    """
    tl.static_assert(MASK != BIT_MASK)
    if MASK != NO_MASK:
        ptrs = mask_ptr[:, None] + position.to(tl.int64)[None, :] * stride_n
        let_through, bias = load_mask(ptrs, visible & valid[:, None], MASK)
        visible &= let_through
        scores += bias
    return tl.where(visible, scores, float("-inf"))


def expand_bounds(bounds: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """`bounds` with a row for each row of the batch and token of q `[B, H, q, D]`."""
    return None if bounds is None else bounds.expand(q.shape[0], q.shape[2], bounds.shape[2])


def is_key_mask(attn_mask: torch.Tensor) -> bool:
    """Whether a mask is bool and the same for all heads and queries."""
    return attn_mask.dtype == torch.bool and attn_mask.shape[-3:-1].numel() == 1


def has_whole(bounds: torch.Tensor | None, mask_kind: int) -> bool:
    """Whether `bounds` say where a mask that only hides need not be read."""
    hides = mask_kind not in (NO_MASK.value, FLOAT_MASK.value)
    return hides and bounds is not None and bounds.shape[2] == 4


def mask_arguments(
    attn_mask: torch.Tensor | None, q: torch.Tensor, max_len: int
) -> tuple[int, torch.Tensor, tuple[int, ...]]:
    """(kind, tensor, its strides over `[B, H, q, max_len or its words]`) for a kernel; without a mask any
    tensor."""
    if attn_mask is None:
        return NO_MASK.value, q, (0, 0, 0, 0)
    if attn_mask.dtype == torch.int32:
        return BIT_MASK.value, attn_mask, attn_mask.expand(*q.shape[:3], -1).stride()
    strides = attn_mask.expand(*q.shape[:3], max_len).stride()
    if attn_mask.dtype != torch.bool:
        return FLOAT_MASK.value, attn_mask, strides
    kind = KEY_MASK if is_key_mask(attn_mask) else BOOL_MASK
    return kind.value, attn_mask.view(torch.uint8), strides


@triton.jit
def visible_slots(
    bounds_ptr, stride_t, token, valid, seq_len, q_len, max_len, HAS_BOUNDS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """(low, high): each row sees slots low .. high - 1, of those that the mask lets through."""
    low = token * 0
    high = low + max_len
    if HAS_BOUNDS:
        bounds_ptr += token * stride_t
        low = tl.maximum(tl.load(bounds_ptr, mask=valid, other=0), 0)
        high = tl.minimum(tl.load(bounds_ptr + 1, mask=valid, other=0), max_len)
    elif MASK == NO_MASK:  # the queries are the last tokens
        high = tl.maximum(tl.minimum(seq_len - q_len + token + 1, max_len), 0).to(tl.int32)
    return low, high


@triton.jit
def soften(scores, total, peak):
    """A tile of the online softmax, base 2: (weights, decay of what was summed before, total, peak)."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - origin[:, None])
    decay = tl.exp2(peak - origin)
    return weights, decay, total * decay + tl.sum(weights, axis=1), new_peak
