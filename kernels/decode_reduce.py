"""The last step of split-KV decoding: add up the partial outputs of a query row, and what they leave out.

Partials are of packed tokens, in the rotated space of the values, their scores less `q . mean`. Left out
are a sink of the head, visible slots past the length, whose keys and values are zeros, and exact tokens
(`beside` says which), whose partial, behind the others, is not rotated. A program takes one query row.
`exact_kernel` makes that partial where `decode_exact` does not.
"""

import torch
import triton
import triton.language as tl

from ..beside import NOTHING, Beside
from .bits import early_launch, hadamard, nan_if_overfull, start_next, wait_for_previous

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)
# What is left to do of the rotation back.
NONE, HADAMARD, MATRIX, SIGNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NO_MASK, BOOL_MASK, FLOAT_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_mask(ptrs, inside, MASK: tl.constexpr):
    """What a mask lets through, and what it adds to scores."""
    if MASK == BOOL_MASK:
        visible = tl.load(ptrs, mask=inside, other=0) != 0
        bias = 0.0
    else:
        bias = tl.load(ptrs, mask=inside, other=float("-inf")).to(tl.float32)
        visible = bias != float("-inf")
        bias = tl.maximum(bias * LOG2_E, LOWEST)  # finfo.min stays finite: such a row still attends
    return visible, bias


def mask_arguments(
    attn_mask: torch.Tensor | None, q: torch.Tensor, max_len: int
) -> tuple[int, torch.Tensor, tuple[int, ...]]:
    """(kind, tensor, its strides over `[B, H, q, max_len]`) for a kernel; without a mask any tensor."""
    if attn_mask is None:
        return NO_MASK.value, q, (0, 0, 0, 0)
    is_bool = attn_mask.dtype == torch.bool
    mask = attn_mask.view(torch.uint8) if is_bool else attn_mask
    strides = mask.expand(*q.shape[:3], max_len).stride()
    return BOOL_MASK.value if is_bool else FLOAT_MASK.value, mask, strides


@triton.jit
def join(peak, total, scores):
    """(peak, total of weights) with `scores` added, the decay of what was summed before, their weights."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=0))
    origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay, weights = tl.exp2(peak - origin), tl.exp2(scores - origin)
    return new_peak, total * decay + tl.sum(weights, axis=0), decay, weights


@triton.jit
def score_zeros(peak, total, mask_ptr, stride_n, first, high, MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    """(peak, total, decay) with the slots `first` .. `high` - 1 added, whose keys and values are zeros."""
    before = peak
    if MASK == NO_MASK:
        count = tl.maximum(high - first, 0).to(tl.float32)
        log = tl.where(count > 0, tl.log2(tl.maximum(count, 1.0)), float("-inf"))
        peak, total, _, _ = join(peak, total, tl.zeros([1], tl.float32) + log)
    else:
        for start in range(first, high, BLOCK_N):
            slots = start + tl.arange(0, BLOCK_N)
            visible, bias = load_mask(mask_ptr + slots.to(tl.int64) * stride_n, slots < high, MASK)
            scores = tl.where(visible & (slots < high), bias, float("-inf"))
            peak, total, _, _ = join(peak, total, scores)
    return peak, total, tl.exp2(before - tl.where(peak == float("-inf"), 0.0, peak))


@triton.jit
def visible_range(bounds_ptr, seq_len, token, q_len, max_len, HAS_BOUNDS: tl.constexpr, MASK: tl.constexpr):
    """(low, high, filled) of a query: it sees slots `low` .. `high` - 1, of which `filled` hold tokens."""
    filled = tl.minimum(seq_len, max_len).to(tl.int32)
    low, high = filled * 0, filled * 0 + max_len
    if HAS_BOUNDS:
        low = tl.maximum(tl.load(bounds_ptr), 0)
        high = tl.minimum(tl.load(bounds_ptr + 1), max_len)
    elif MASK == NO_MASK:  # the queries are the last tokens
        high = tl.minimum(seq_len - q_len + token + 1, max_len).to(tl.int32)
    return low, high, filled


@triton.jit
def exact_kernel(
    partial_ptr, log_ptr, seq_lens_ptr, q_ptr, exact_ptr, exact_from_ptr, bounds_ptr, mask_ptr,
    lens_stride, from_stride, q_stride_b, q_stride_h, q_stride_t, q_stride_d, bounds_stride_b,
    bounds_stride_t, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_n, heads, splits, q_len,
    max_len, scale, HAS_BOUNDS: tl.constexpr, MASK: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The partial of a query row over exact tokens, not rotated, behind its `splits` others."""
    WIDTH: tl.constexpr = K_DIM + V_DIM
    row = tl.program_id(0).to(tl.int64)  # as in `decode_reduce_kernel`
    group_row = row // HEADS
    kv_row, token = group_row // q_len, group_row % q_len
    batch_head = kv_row * HEADS + row % HEADS
    batch, head = batch_head // heads, batch_head % heads
    dims, k_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    bounds_ptr += batch * bounds_stride_b + token * bounds_stride_t
    low, high, filled = visible_range(bounds_ptr, seq_len, token, q_len, max_len, HAS_BOUNDS, MASK)
    high = tl.minimum(high, filled)
    first_recent = tl.maximum(tl.load(exact_from_ptr + batch * from_stride), seq_len - RECENT)
    first_recent = tl.maximum(tl.minimum(first_recent, max_len), SINKS).to(tl.int32)
    q_ptr += batch * q_stride_b + head * q_stride_h + token * q_stride_t
    q = tl.load(q_ptr + k_dims * q_stride_d, mask=k_dims < K_DIM, other=0.0).to(tl.float32)
    q *= scale * LOG2_E
    mask_ptr += batch * mask_stride_b + head * mask_stride_h + token * mask_stride_t
    exact_ptr += kv_row * ((SINKS + RECENT) * WIDTH)

    peak, total = float("-inf"), 0.0
    out = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, SINKS + RECENT, BLOCK_E):
        i = start + tl.arange(0, BLOCK_E)
        position = tl.where(i < SINKS, i, first_recent + i - SINKS)
        slot = tl.where(i < SINKS, i, SINKS + (position - SINKS) % max(RECENT, 1))
        exists = (i < SINKS + RECENT) & (position >= low) & (position < high)
        ptrs = exact_ptr + slot.to(tl.int64)[:, None] * WIDTH
        mask = exists[:, None] & (k_dims < K_DIM)[None, :]
        k = tl.load(ptrs + k_dims[None, :], mask=mask, other=0.0).to(tl.float32)
        scores = tl.sum(k * q[None, :], axis=1)
        if MASK != NO_MASK:
            visible, bias = load_mask(mask_ptr + position.to(tl.int64) * mask_stride_n, exists, MASK)
            exists, scores = exists & visible, scores + bias
        # By what is visible: a weight of zero hides no NaN.
        mask = exists[:, None] & (dims < V_DIM)[None, :]
        v = tl.load(ptrs + K_DIM + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(exists, scores, float("-inf"))
        peak, total, decay, weights = join(peak, total, scores)
        out = out * decay + tl.sum(v * weights[:, None], axis=0)
    part = row * (splits + 1) + splits
    out /= tl.where(total == 0.0, 1.0, total)
    tl.store(partial_ptr + part * V_DIM + dims, out, mask=dims < V_DIM)
    tl.store(log_ptr + part, peak + tl.log2(total))


def attend_exact(
    partial: torch.Tensor,
    logs: torch.Tensor,
    q: torch.Tensor,
    seq_lens: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    max_len: int,
    scale: float,
    beside: Beside,
) -> None:
    """Fill the last partial of each row `[B, Hkv, row, split + 1, Dv]` with that of exact tokens."""
    batch, heads, q_len, dim = q.shape
    dv = partial.shape[4]
    assert beside.exact is not None
    assert beside.exact_from is not None
    block_k, block_d = triton.next_power_of_2(dim), triton.next_power_of_2(dv)
    slots = triton.next_power_of_2(beside.exact.shape[2])
    mask_kind, mask, mask_strides = mask_arguments(attn_mask, q, max_len)
    exact_kernel[(batch * heads * q_len,)](
        partial, logs, seq_lens, q, beside.exact, beside.exact_from, q if bounds is None else bounds, mask,
        seq_lens.expand(batch).stride(0), beside.exact_from.expand(batch).stride(0), *q.stride(),
        *((0, 0) if bounds is None else bounds.stride()[:2]), *mask_strides, heads, partial.shape[3] - 1,
        q_len, max_len, scale, HAS_BOUNDS=bounds is not None, MASK=mask_kind, SINKS=beside.sink_tokens,
        RECENT=beside.recent_tokens, K_DIM=dim, V_DIM=dv, HEADS=heads // partial.shape[1],
        BLOCK_E=max(1, min(slots, 4096 // max(block_k, block_d))), BLOCK_K=block_k, BLOCK_D=block_d,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def decode_reduce_kernel(
    partial_ptr, log_ptr, seq_lens_ptr, sinks_ptr, rotation_ptr, out_ptr, q_ptr, mean_ptr, bounds_ptr,
    mask_ptr, lens_stride, q_stride_b, q_stride_h, q_stride_t, q_stride_d, bounds_stride_b,
    bounds_stride_t, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_n, heads, splits, q_len,
    max_len, scale, ROTATION: tl.constexpr, HAS_LENS: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, MASK: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_MEAN: tl.constexpr,
    HAS_EXACT: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # [batch, KV head, token, head of the group]
    group_row = row // HEADS
    kv_row, token = group_row // q_len, group_row % q_len  # [batch, KV head], token
    batch_head = kv_row * HEADS + row % HEADS
    batch, head = batch_head // heads, batch_head % heads
    part = row * (splits + HAS_EXACT)
    dims, k_dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)

    missing = 0.0
    if HAS_LENS:
        seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
        missing = nan_if_overfull(seq_len, max_len)
        bounds_ptr += batch * bounds_stride_b + token * bounds_stride_t
        low, high, filled = visible_range(bounds_ptr, seq_len, token, q_len, max_len, HAS_BOUNDS, MASK)
        mask_ptr += batch * mask_stride_b + head * mask_stride_h + token * mask_stride_t
    if HAS_MEAN:
        q_ptr += batch * q_stride_b + head * q_stride_h + token * q_stride_t
        q = tl.load(q_ptr + k_dims * q_stride_d, mask=k_dims < K_DIM, other=0.0).to(tl.float32)
    if ROTATION == HADAMARD or ROTATION == SIGNS:  # noqa: SIM109
        first_column = tl.load(rotation_ptr + dims * V_DIM)
    if PDL:
        wait_for_previous()
        start_next()
    if HAS_MEAN:
        mean = tl.load(mean_ptr + kv_row * K_DIM + k_dims, mask=k_dims < K_DIM, other=0.0)
    extra = tl.zeros([BLOCK_D], tl.float32)  # in the space of the values as they came
    if HAS_EXACT:
        extra = tl.load(partial_ptr + (part + splits) * V_DIM + dims, mask=dims < V_DIM, other=0.0)
        extra_log = tl.load(log_ptr + part + splits + tl.arange(0, 1))

    peak, total = float("-inf"), 0.0
    out = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        log = tl.load(log_ptr + part + split, mask=split < splits, other=float("-inf"))
        mask = (split < splits)[:, None] & (dims < V_DIM)[None, :]
        partial_ptrs = partial_ptr + (part + split)[:, None] * V_DIM + dims[None, :]
        partial = tl.load(partial_ptrs, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        # Not a mask of the load, which would wait for the logarithms.
        partial = tl.where((log == float("-inf"))[:, None], 0.0, partial)
        peak, total, decay, weights = join(peak, total, log)
        out = out * decay + tl.sum(partial * weights[:, None], axis=0)

    if HAS_MEAN:
        peak += tl.sum(q * mean.to(tl.float32), axis=0) * (scale * LOG2_E)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head + tl.arange(0, 1)).to(tl.float32) * LOG2_E
        peak, total, decay, _ = join(peak, total, sink)
        out *= decay
    if HAS_LENS:
        first = tl.maximum(low, filled)
        peak, total, decay = score_zeros(peak, total, mask_ptr, mask_stride_n, first, high, MASK, 1024)
        out *= decay
    if HAS_EXACT:
        peak, total, decay, weight = join(peak, total, extra_log)
        out *= decay
        extra *= weight
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    out = out * share + missing
    extra *= share

    out_ptr += (batch_head * q_len + token) * V_DIM
    if ROTATION == HADAMARD:  # the rotation is its first column times the Hadamard matrix
        rotated = tl.reshape(hadamard(out[None, :]), [BLOCK_D]) * first_column + extra
        tl.store(out_ptr + dims, rotated.to(out_ptr.dtype.element_ty))
    elif ROTATION == MATRIX:
        for start in range(0, V_DIM, BLOCK_OUT):
            columns = start + tl.arange(0, BLOCK_OUT)
            mask = (columns < V_DIM)[:, None] & (dims < V_DIM)[None, :]
            rotation_ptrs = rotation_ptr + columns[:, None] * V_DIM + dims[None, :]
            rotation = tl.load(rotation_ptrs, mask=mask, other=0.0)  # [BLOCK_OUT, BLOCK_D]
            same = columns[:, None] == dims[None, :]
            rotated = tl.sum(rotation * out[None, :] + tl.where(same, extra[None, :], 0.0), axis=1)
            tl.store(out_ptr + columns, rotated.to(out_ptr.dtype.element_ty), mask=columns < V_DIM)
    else:
        if ROTATION == SIGNS:
            out = out * first_column + extra
        tl.store(out_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < V_DIM)


def blocks_of(splits: int, dim: int) -> tuple[int, int]:
    """Dims and warps of a program that has no transform to do: more programs of many splits."""
    if splits > 64:
        return min(32, dim), 8
    if splits > 16:
        return min(32, dim), 2
    return dim, 4 if splits > 4 else 1


def reduce_splits(
    out: torch.Tensor,
    partial: torch.Tensor,
    logs: torch.Tensor,
    q: torch.Tensor,
    seq_lens: torch.Tensor | None,
    v_rotation: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    group: int,
    max_len: int,
    scale: float,
    beside: Beside = NOTHING,
    transformed: bool = False,
) -> None:
    """Fill `out` `[B, H, q, Dv]` from partials `[B, Hkv, row, split, Dv]`; rows are token-major.

    The partials are rotated if there is a rotation, or `transformed`: of the rotation the signs are left.
    The last is that of exact tokens, if any are kept, and is neither. `q` `[B, H, q, D]` as it came, not
    rotated; `bounds` has a row for each row of the batch.
    """
    batch, heads, q_len, dv = out.shape
    dim, splits = q.shape[3], partial.shape[3] - (beside.exact is not None)
    lens_stride = 0 if seq_lens is None else seq_lens.expand(batch).stride(0)
    mask_kind, mask, mask_strides = mask_arguments(attn_mask, q, max_len)
    block_d = triton.next_power_of_2(dv)
    rotation = NONE if v_rotation is None else HADAMARD if block_d == dv else MATRIX
    padded = triton.next_power_of_2(splits)
    num_warps = 16 if padded > 64 else 4 if padded > 4 else 1
    if transformed:
        rotation = SIGNS
    if rotation in (NONE, SIGNS):
        block_d, num_warps = blocks_of(splits, block_d)
    decode_reduce_kernel[(batch * heads * q_len, triton.cdiv(dv, block_d))](
        partial, logs, out if seq_lens is None else seq_lens, out if sinks is None else sinks,
        out if v_rotation is None else v_rotation, out, q, out if beside.k_mean is None else beside.k_mean,
        out if bounds is None else bounds, mask, lens_stride, *q.stride(),
        *((0, 0) if bounds is None else bounds.stride()[:2]), *mask_strides, heads, splits, q_len, max_len,
        scale, ROTATION=rotation.value, HAS_LENS=seq_lens is not None, HAS_BOUNDS=bounds is not None,
        MASK=mask_kind, HAS_SINKS=sinks is not None, HAS_MEAN=beside.k_mean is not None,
        HAS_EXACT=beside.exact is not None, K_DIM=dim, V_DIM=dv, HEADS=group,
        BLOCK_S=max(1, min(padded, 2048 * num_warps // block_d)),  # 64 values a thread
        BLOCK_K=triton.next_power_of_2(dim), BLOCK_D=block_d, BLOCK_OUT=max(1, 4096 // block_d),
        num_warps=num_warps, **early_launch(out.device),
    )  # fmt: skip
