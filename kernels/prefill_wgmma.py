"""`prefill_pieces.piece_kernel` for wgmma (sm_90): no softcap, and no mask but one over keys.

Bytes: as `piece_kernel`.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .bits import TINY
from .prefill import WEIGHT_BITS, WEIGHT_UNIT
from .scores import NO_MASK
from .segments import MEAN_OF
from .wgmma_tiles import BLOCK_M, BLOCK_N, attend_tiles, span

WGMMA_TILE = (BLOCK_M.value, BLOCK_N.value)


@gluon.jit(do_not_specialize=["batch_from"])
def wgmma_piece_kernel(
    q_ptr, factor_ptr, k_tiles, v_tiles, unit_ptr, seq_lens_ptr, exact_from_ptr, bounds_ptr, partial_ptr,
    log_ptr, lens_stride, from_stride, bounds_stride_b, bounds_stride_t, q_len, own, max_len, batch_from,
    first, piece, splits, mean_score_ptr, segments, mask_ptr, mask_stride_b, mask_stride_n,
    K_DIM: gl.constexpr, V_DIM: gl.constexpr, HEADS: gl.constexpr, SINKS: gl.constexpr,
    RECENT: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_WHOLE: gl.constexpr, HAS_MEAN: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """The arguments and results are `piece_kernel`'s."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, V_DIM, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    RESULT_ROWS: gl.constexpr = gl.SliceLayout(1, RESULT)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K_DIM, K_DIM // 8], [8, 1], [1, 0])
    split, block = gl.program_id(0) % splits, gl.program_id(0) // splits
    kv_head, batch = gl.program_id(1).to(gl.int64), gl.program_id(2).to(gl.int64) + batch_from
    seq_len = gl.load(seq_lens_ptr + batch * lens_stride)
    if (first > 0) & (first >= seq_len - own):
        return
    rows = q_len * HEADS
    row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=ROWS)
    valid = row < rows
    token = row // HEADS
    if HAS_BOUNDS:
        bounds_ptr += batch * bounds_stride_b + token * bounds_stride_t
        low = gl.maximum(gl.load(bounds_ptr, mask=valid, other=0), 0)
        high = gl.minimum(gl.load(bounds_ptr + 1, mask=valid, other=0), max_len)
    else:
        low, high = token * 0, token * 0 + max_len
        if MASK == NO_MASK:  # the queries are the last tokens
            high = gl.minimum(seq_len - q_len + token + 1, max_len).to(gl.int32)
    high = gl.minimum(high, gl.minimum(seq_len - own, max_len).to(gl.int32))
    if SINKS + RECENT > 0:
        first_recent = gl.maximum(gl.load(exact_from_ptr + batch * from_stride), seq_len - RECENT)
        low = gl.maximum(low, SINKS)
        high = gl.minimum(high, gl.minimum(first_recent, max_len).to(gl.int32))
    low, high = gl.maximum(low, first), gl.minimum(high, first + piece)
    begin, end, whole_from, whole_to = span(low, high, bounds_ptr, valid, max_len, HAS_WHOLE, MASK)
    run = gl.cdiv(gl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * run
    end = gl.minimum(begin + run, end)
    if (first > 0) & (begin >= end):
        return
    group_row = (batch * gl.num_programs(1) + kv_head) * rows
    kv_row = gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)
    means = (mean_score_ptr + kv_row.to(gl.int64) * segments * rows + row, rows, valid, first // MEAN_OF)
    sees = (low, high, whole_from, whole_to, end)
    mask = (mask_ptr + batch * mask_stride_b, mask_stride_n, valid)
    unit, v_unit = gl.load(unit_ptr + kv_row * 2), gl.load(unit_ptr + kv_row * 2 + 1)
    factor = gl.maximum(gl.load(factor_ptr + group_row + row, mask=valid, other=0.0) * unit, TINY)

    q_row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, Q))
    dims = gl.arange(0, K_DIM, layout=gl.SliceLayout(0, Q))
    q_ptrs = q_ptr + (group_row + q_row)[:, None] * K_DIM + dims[None, :]
    q = gl.load(q_ptrs, mask=(q_row < rows)[:, None] & (dims < K_DIM)[None, :], other=0.0)

    part = (group_row + row) * splits + split
    resumed = valid & (first + 0 * row > 0)
    peak = gl.load(log_ptr + part, mask=resumed, other=float("-inf"))
    total = gl.where(peak == float("-inf"), 0.0, WEIGHT_UNIT)
    o_row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=RESULT_ROWS)
    columns = gl.arange(0, V_DIM, layout=gl.SliceLayout(0, RESULT))
    ptrs = partial_ptr + ((group_row + o_row) * splits + split)[:, None] * V_DIM + columns[None, :]
    known = gl.convert_layout(total, RESULT_ROWS) > 0.0
    acc = gl.load(ptrs, mask=known[:, None] & (columns < V_DIM)[None, :], other=0.0)
    acc *= WEIGHT_UNIT / v_unit

    n = gl.cdiv(end - begin, BLOCK_N)
    if n > 0:
        place = (kv_row * piece - first + begin,)
        acc, total, peak = attend_tiles(
            q, k_tiles, v_tiles, place, begin, n, sees, mask, factor, means, peak, total, acc, MASK,
            HAS_MEAN, gl.float16, K_DIM, V_DIM, 2, SCORES, RESULT,
        )  # fmt: skip

    share = gl.convert_layout(v_unit / gl.where(total == 0.0, 1.0, total), RESULT_ROWS)
    gl.store(ptrs, acc * share[:, None], mask=(o_row < rows)[:, None] & (columns < V_DIM)[None, :])
    gl.store(log_ptr + part, peak + (gl.log2(total) - WEIGHT_BITS), mask=valid)


def describe(x: torch.Tensor) -> TensorDescriptor:
    """Tiles of float16 vectors `[rows, dim]`."""
    shape = [BLOCK_N.value, x.shape[1]]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.float16)
    return TensorDescriptor.from_tensor(x, shape, layout)
