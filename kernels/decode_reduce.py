"""The last step of split-KV decoding: add the partial outputs of each query row, rotate the sum back."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bits import early_launch, hadamard, nan_if_overfull

LOG2_E = tl.constexpr(1.4426950408889634)
# What is left to do of the rotation back.
NONE, HADAMARD, MATRIX, SIGNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def decode_reduce_kernel(
    partial_ptr, log_ptr, seq_lens_ptr, sinks_ptr, rotation_ptr, out_ptr, lens_stride, heads, splits,
    q_len, max_len, ROTATION: tl.constexpr, HAS_LENS: tl.constexpr, HAS_SINKS: tl.constexpr,
    V_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # [batch, KV head, token, head of the group]
    group_row = row // HEADS
    kv_row, token = group_row // q_len, group_row % q_len  # [batch, KV head], token
    batch_head = kv_row * HEADS + row % HEADS
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    missing = 0.0
    if HAS_LENS:
        missing = nan_if_overfull(tl.load(seq_lens_ptr + batch_head // heads * lens_stride), max_len)
    if ROTATION == HADAMARD or ROTATION == SIGNS:  # noqa: SIM109
        first_column = tl.load(rotation_ptr + dims * V_DIM)
    peak = float("-inf")
    total = 0.0
    if HAS_SINKS:
        peak = tl.load(sinks_ptr + batch_head % heads).to(tl.float32) * LOG2_E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    out = tl.zeros([BLOCK_D], tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        log = tl.load(log_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
        mask = (split < splits)[:, None] & (dims < V_DIM)[None, :]
        partial_ptrs = partial_ptr + (row * splits + split)[:, None] * V_DIM + dims[None, :]
        partial = tl.load(partial_ptrs, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        # Not a mask of the load, which would wait for the logarithms.
        partial = tl.where((log == float("-inf"))[:, None], 0.0, partial)
        new_peak = tl.maximum(peak, tl.max(log, axis=0))
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight, decay = tl.exp2(log - origin), tl.exp2(peak - origin)
        out = out * decay + tl.sum(partial * weight[:, None], axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        peak = new_peak
    out /= tl.where(total == 0.0, 1.0, total)
    out += missing

    out_ptr += (batch_head * q_len + token) * V_DIM
    if ROTATION == HADAMARD:  # the rotation is its first column times the Hadamard matrix
        rotated = tl.reshape(hadamard(out[None, :]), [BLOCK_D]) * first_column
        tl.store(out_ptr + dims, rotated.to(out_ptr.dtype.element_ty))
    elif ROTATION == MATRIX:
        for start in range(0, V_DIM, BLOCK_OUT):
            columns = start + tl.arange(0, BLOCK_OUT)
            mask = (columns < V_DIM)[:, None] & (dims < V_DIM)[None, :]
            rotation_ptrs = rotation_ptr + columns[:, None] * V_DIM + dims[None, :]
            rotation = tl.load(rotation_ptrs, mask=mask, other=0.0)  # [BLOCK_OUT, BLOCK_D]
            rotated = tl.sum(rotation * out[None, :], axis=1)
            tl.store(out_ptr + columns, rotated.to(out_ptr.dtype.element_ty), mask=columns < V_DIM)
    else:
        if ROTATION == SIGNS:
            out *= first_column
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
    sinks: torch.Tensor | None,
    group: int,
    max_len: int,
    transformed: bool = False,
) -> None:
    """Fill `out` `[B, H, q, Dv]` from partials `[B, Hkv, row, split, Dv]`; rows are token-major.

    The partials are rotated if there is a rotation, or `transformed`: of the rotation the signs are left.
    """
    batch, heads, q_len, dv = out.shape
    splits = partial.shape[3]
    lens_stride = 0 if seq_lens is None else seq_lens.expand(batch).stride(0)
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
        out if v_rotation is None else v_rotation, out, lens_stride, heads, splits, q_len, max_len,
        ROTATION=rotation.value, HAS_LENS=seq_lens is not None, HAS_SINKS=sinks is not None,
        V_DIM=dv, HEADS=group,
        BLOCK_S=max(1, min(padded, 2048 * num_warps // block_d)),  # 64 values a thread
        BLOCK_D=block_d, BLOCK_OUT=max(1, 4096 // block_d),
        num_warps=num_warps, **early_launch(out.device),
    )  # fmt: skip
