"""The last step of split-KV decoding: add up the partial outputs of a query row, and what they leave out.

Partials are of packed tokens, in the rotated space of the values. Left out are a sink of the head, and
visible slots past the length, whose keys and values are zeros. Tokens that are there as they came have
partials of their own, `Parts`, which are not rotated. A program takes one query row.

Bytes: the partials.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import early_launch, hadamard, nan_if_overfull
from .exact import Parts
from .scores import LOG2_E, NO_MASK, load_mask, mask_arguments

LN_2 = tl.constexpr(0.6931471805599453)
# What is left to do of the rotation back.
NONE, HADAMARD, MATRIX, SIGNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


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
def load_partials(ptr, index, exists, dims, DIM: tl.constexpr):
    """The partial outputs with these indices, [partials, dims]; zeros where none exist."""
    ptrs = ptr + index[:, None] * DIM + dims[None, :]
    return tl.load(ptrs, mask=exists[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def decode_reduce_kernel(
    partial_ptr, log_ptr, seq_lens_ptr, sinks_ptr, rotation_ptr, out_ptr, lse_ptr, bounds_ptr, mask_ptr,
    part_ptr, part_log_ptr, lens_stride, bounds_stride_b, bounds_stride_t, mask_stride_b, mask_stride_h,
    mask_stride_t, mask_stride_n, heads, splits, q_len, max_len, ROTATION: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_BOUNDS: tl.constexpr, MASK: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr, PIECES: tl.constexpr, V_DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # [batch, KV head, token, head of the group]
    group_row = row // HEADS
    kv_row, token = group_row // q_len, group_row % q_len  # [batch, KV head], token
    batch_head = kv_row * HEADS + row % HEADS
    batch, head = batch_head // heads, batch_head % heads
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if ROTATION == HADAMARD:
        # Two dims a thread, and no thread for other splits: no two threads have the same sum, which each
        # would write for the transform.
        dims = tl.max_contiguous(dims, 2)

    missing = 0.0
    if HAS_LENS:
        seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
        missing = nan_if_overfull(seq_len, max_len)
        filled = tl.minimum(seq_len, max_len).to(tl.int32)
        low, high = filled * 0, filled * 0 + max_len
        if HAS_BOUNDS:
            bounds_ptr += batch * bounds_stride_b + token * bounds_stride_t
            low = tl.maximum(tl.load(bounds_ptr), 0)
            high = tl.minimum(tl.load(bounds_ptr + 1), max_len)
        elif MASK == NO_MASK:  # the queries are the last tokens
            high = tl.minimum(seq_len - q_len + token + 1, max_len).to(tl.int32)
        mask_ptr += batch * mask_stride_b + head * mask_stride_h + token * mask_stride_t
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if PIECES > 0:  # on their way while the partials are added
        piece = tl.arange(0, BLOCK_P)
        part_log = tl.load(part_log_ptr + row * PIECES + piece, mask=piece < PIECES, other=float("-inf"))
        part = load_partials(part_ptr, row * PIECES + piece, piece < PIECES, dims, V_DIM)
    if ROTATION == HADAMARD or ROTATION == SIGNS:  # noqa: SIM109
        first_column = tl.load(rotation_ptr + dims * V_DIM)

    peak, total = float("-inf"), 0.0
    out = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        log = tl.load(log_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
        partial = load_partials(partial_ptr, row * splits + split, split < splits, dims, V_DIM)
        # Not a mask of the load, which would wait for the logarithms.
        partial = tl.where((log == float("-inf"))[:, None], 0.0, partial)
        peak, total, decay, weights = join(peak, total, log)
        out = out * decay + tl.sum(partial * weights[:, None], axis=0)

    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head + tl.arange(0, 1)).to(tl.float32) * LOG2_E
        peak, total, decay, _ = join(peak, total, sink)
        out *= decay
    if HAS_LENS:
        first = tl.maximum(low, filled)
        peak, total, decay = score_zeros(peak, total, mask_ptr, mask_stride_n, first, high, MASK, 1024)
        out *= decay
    extra = tl.zeros([BLOCK_D], tl.float32)  # in the space of the values as they came
    if PIECES > 0:
        peak, total, decay, weights = join(peak, total, part_log)
        out *= decay
        part = tl.where((part_log == float("-inf"))[:, None], 0.0, part)
        extra += tl.sum(part * weights[:, None], axis=0)
    if HAS_LSE:
        lse = (peak + tl.log2(total)) * LN_2 + missing
        tl.store(lse_ptr + batch_head * q_len + token, lse, mask=tl.program_id(1) == 0)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    out = out * share + missing
    extra *= share

    out_ptr += ((batch * q_len + token) * heads + head) * V_DIM
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
            out = out * first_column
        out += extra
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
    seq_lens: torch.Tensor | None,
    v_rotation: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    group: int,
    max_len: int,
    lse: torch.Tensor | None = None,
    parts: Parts | None = None,
    transformed: bool = False,
) -> None:
    """Fill `out` `[B, H, q, Dv]`, and `lse` `[B, H, q]` if given, from partials `[B, Hkv, row, split, Dv]`.

    `out` lies as an `empty_result` does. Rows are token-major. The partials are rotated if there is a
    rotation, or `transformed`: of the rotation the signs are left; `parts` are not. `bounds` has a row for
    each row of the batch.
    """
    batch, heads, q_len, dv = out.shape
    splits, pieces = partial.shape[3], 0 if parts is None else parts.logs.shape[3]
    lens_stride = 0 if seq_lens is None else seq_lens.expand(batch).stride(0)
    mask_kind, mask, mask_strides = mask_arguments(attn_mask, out, max_len)
    block_d = triton.next_power_of_2(dv)
    rotation = NONE if v_rotation is None else HADAMARD if block_d == dv >= 64 else MATRIX
    padded = triton.next_power_of_2(splits)
    num_warps = 16 if padded > 64 else 4 if padded > 4 else 1
    if rotation == HADAMARD:  # two dims a thread
        num_warps = min(num_warps, block_d // 64)
    if transformed:
        rotation = SIGNS
    if rotation in (NONE, SIGNS):
        block_d, num_warps = blocks_of(splits, block_d)
    decode_reduce_kernel[(batch * heads * q_len, triton.cdiv(dv, block_d))](
        partial, logs, out if seq_lens is None else seq_lens, out if sinks is None else sinks.contiguous(),
        out if v_rotation is None else v_rotation, out, out if lse is None else lse,
        out if bounds is None else bounds, mask, *(parts or (partial, logs)), lens_stride,
        *((0, 0) if bounds is None else bounds.stride()[:2]), *mask_strides,
        heads, splits, q_len, max_len, ROTATION=rotation.value, HAS_LENS=seq_lens is not None,
        HAS_BOUNDS=bounds is not None, MASK=mask_kind, HAS_SINKS=sinks is not None,
        HAS_LSE=lse is not None, PIECES=pieces, V_DIM=dv, HEADS=group,
        # 64 values a thread
        BLOCK_S=max(1, min(padded, 2048 * num_warps // block_d)),
        BLOCK_P=triton.next_power_of_2(max(1, pieces)),
        BLOCK_D=block_d, BLOCK_OUT=max(1, 4096 // block_d),
        num_warps=num_warps, **early_launch(out.device),
    )  # fmt: skip
