"""`prefill_pieces.piece_kernel` for wgmma (sm_90): no softcap, and no mask but one over keys.

While the weights of a tile are computed, the tensor cores multiply those of the one before with its values.
Triton waits for a product whose result is used in the same iteration, so this is Gluon.

A program is two groups of four warps, each of 64 rows. A stage of the ring in shared memory has the values
of a tile and the keys of the next one, which TMA copies two stages ahead.
Bytes: as `piece_kernel`.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .bits import TINY
from .prefill import WEIGHT_BITS, WEIGHT_UNIT
from .segments import MEAN_OF

BLOCK_M, BLOCK_N, STAGES = gl.constexpr(128), gl.constexpr(128), gl.constexpr(3)
WGMMA_TILE = (BLOCK_M.value, BLOCK_N.value)
# Triton 3.9 has other names for these.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def issue(k_tiles, v_tiles, row, bars, k_buffers, v_buffers, stage, pred):
    """Stage i: values of tile i, from `row`, and keys of tile i + 1."""
    which = stage % STAGES
    bar = bars.index(which)
    BYTES: gl.constexpr = BLOCK_N * (k_tiles.block_shape[1] + v_tiles.block_shape[1]) * 2
    mbarrier.expect(bar, BYTES, pred=pred)
    copy_tile(k_tiles, [row + BLOCK_N, 0], bar, k_buffers.index(which), pred=pred)
    copy_tile(v_tiles, [row, 0], bar, v_buffers.index(which), pred=pred)


@gluon.jit
def weigh(
    s, start, sees, mask, factor, means, peak, total, HAS_MASK: gl.constexpr, HAS_MEAN: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """A tile of the online softmax, base 2, of slots from `start`: (weights, decay, total, peak)."""
    low, high, whole_from, whole_to, end = sees
    mean_score = 0.0 * factor
    if HAS_MEAN:  # one for all keys of a tile: it goes with the peak
        mean_score = gl.load(means[0] + (start // MEAN_OF - means[3]) * means[1], mask=means[2], other=0.0)
    if (start < whole_from) | (start + BLOCK_N > whole_to):
        slot = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
        if HAS_MASK:
            let_through = gl.load(mask[0] + slot.to(gl.int64) * mask[1], mask=slot < end, other=0) != 0
            visible = visible & let_through[None, :]
        s = gl.where(visible, s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, axis=1) * factor + mean_score)
    origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(s * factor[:, None] - (origin - mean_score - WEIGHT_BITS)[:, None])
    decay = gl.exp2(peak - origin)
    return weights, decay, total * decay + gl.sum(weights, axis=1), new_peak


@gluon.jit(do_not_specialize=["batch_from"])
def wgmma_piece_kernel(
    q_ptr, factor_ptr, k_tiles, v_tiles, unit_ptr, seq_lens_ptr, exact_from_ptr, bounds_ptr, partial_ptr,
    log_ptr, lens_stride, from_stride, bounds_stride_b, bounds_stride_t, q_len, own, max_len, batch_from,
    first, piece, splits, mean_score_ptr, segments, mask_ptr, mask_stride_b, mask_stride_n,
    K_DIM: gl.constexpr, V_DIM: gl.constexpr, HEADS: gl.constexpr, SINKS: gl.constexpr,
    RECENT: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_WHOLE: gl.constexpr, HAS_MEAN: gl.constexpr,
    HAS_MASK: gl.constexpr,
):  # fmt: skip
    """The arguments and results are `piece_kernel`'s."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, V_DIM, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    RESULT_ROWS: gl.constexpr = gl.SliceLayout(1, RESULT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
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
        if not HAS_MASK:  # the queries are the last tokens
            high = gl.minimum(seq_len - q_len + token + 1, max_len).to(gl.int32)
    high = gl.minimum(high, gl.minimum(seq_len - own, max_len).to(gl.int32))
    if SINKS + RECENT > 0:
        first_recent = gl.maximum(gl.load(exact_from_ptr + batch * from_stride), seq_len - RECENT)
        low = gl.maximum(low, SINKS)
        high = gl.minimum(high, gl.minimum(first_recent, max_len).to(gl.int32))
    low, high = gl.maximum(low, first), gl.minimum(high, first + piece)
    seen = valid & (low < high)
    begin = gl.min(gl.where(seen, low, first + piece), axis=0) // BLOCK_N * BLOCK_N
    end = gl.max(gl.where(seen, high, 0), axis=0)
    run = gl.cdiv(gl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * run
    end = gl.minimum(begin + run, end)
    if (first > 0) & (begin >= end):
        return
    group_row = (batch * gl.num_programs(1) + kv_head) * rows
    kv_row = gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)
    means = (mean_score_ptr + kv_row.to(gl.int64) * segments * rows + row, rows, valid, first // MEAN_OF)
    # Slots that all rows see.
    whole_from = gl.max(gl.where(valid, low, 0), axis=0)
    whole_to = gl.min(gl.where(valid, high, max_len), axis=0)
    if HAS_WHOLE:
        whole_from = gl.maximum(whole_from, gl.max(gl.load(bounds_ptr + 2, mask=valid, other=0), axis=0))
        last = gl.load(bounds_ptr + 3, mask=valid, other=max_len)
        whole_to = gl.minimum(whole_to, gl.min(last, axis=0))
    elif HAS_MASK:
        whole_to = whole_to * 0
    sees = (low, high, whole_from, whole_to, end)
    mask = (mask_ptr + batch * mask_stride_b, mask_stride_n)
    unit, v_unit = gl.load(unit_ptr + kv_row * 2), gl.load(unit_ptr + kv_row * 2 + 1)
    factor = gl.maximum(gl.load(factor_ptr + group_row + row, mask=valid, other=0.0) * unit, TINY)

    q_row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, Q))
    dims = gl.arange(0, K_DIM, layout=gl.SliceLayout(0, Q))
    q_ptrs = q_ptr + (group_row + q_row)[:, None] * K_DIM + dims[None, :]
    q = gl.load(q_ptrs, mask=(q_row < rows)[:, None] & (dims < K_DIM)[None, :], other=0.0)
    Q_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, K_DIM], gl.float16)
    q = gl.allocate_shared_memory(gl.float16, [BLOCK_M, K_DIM], Q_SHARED, q)

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
        k_buffers = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N, K_DIM], k_tiles.layout)
        v_buffers = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N, V_DIM], v_tiles.layout)
        bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES + 1):
            mbarrier.init(bars.index(i), count=1)
        fence_async_shared()  # of the queries and the barriers
        barrier()
        place = kv_row * piece - first + begin
        # The first keys, in the last stage's place.
        mbarrier.expect(bars.index(STAGES), BLOCK_N * K_DIM * 2)
        copy_tile(k_tiles, [place, 0], bars.index(STAGES), k_buffers.index(STAGES - 1))
        for i in gl.static_range(STAGES - 1):
            issue(k_tiles, v_tiles, place + i * BLOCK_N, bars, k_buffers, v_buffers, i, i < n)
        zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
        mbarrier.wait(bars.index(STAGES), 0)
        keys = k_buffers.index(STAGES - 1).permute((1, 0))
        s = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        weights, decay, total, peak = weigh(
            s, begin, sees, mask, factor, means, peak, total, HAS_MASK, HAS_MEAN, SCORES
        )
        p = gl.convert_layout(weights.to(gl.float16), WEIGHTS)
        mbarrier.wait(bars.index(0), 0)
        for i in range(0, n - 1):
            # Products of stage i run while the weights of tile i + 1 are computed.
            keys = k_buffers.index(i % STAGES).permute((1, 0))
            s = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
            acc = acc * gl.convert_layout(decay, RESULT_ROWS)[:, None]
            o = warpgroup_mma(p, v_buffers.index(i % STAGES), acc, is_async=True)
            barrier()  # all warps are done with stage i - 1
            stage = i + STAGES - 1
            row_of_stage = place + stage * BLOCK_N
            issue(k_tiles, v_tiles, row_of_stage, bars, k_buffers, v_buffers, stage, stage < n)
            s = warpgroup_mma_wait(1, [s])
            weights, decay, total, peak = weigh(
                s, begin + (i + 1) * BLOCK_N, sees, mask, factor, means, peak, total, HAS_MASK, HAS_MEAN,
                SCORES,
            )  # fmt: skip
            next_p = gl.convert_layout(weights.to(gl.float16), WEIGHTS)
            # The assembler may move what precedes a wait for products behind it, but not past this one.
            mbarrier.wait(bars.index((i + 1) % STAGES), (i + 1) // STAGES & 1)
            acc, p, next_p, decay = warpgroup_mma_wait(0, [o, p, next_p, decay])
            p = next_p
        acc = acc * gl.convert_layout(decay, RESULT_ROWS)[:, None]
        o = warpgroup_mma(p, v_buffers.index((n - 1) % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [o])
        for i in gl.static_range(STAGES + 1):
            mbarrier.invalidate(bars.index(i))

    share = gl.convert_layout(v_unit / gl.where(total == 0.0, 1.0, total), RESULT_ROWS)
    gl.store(ptrs, acc * share[:, None], mask=(o_row < rows)[:, None] & (columns < V_DIM)[None, :])
    gl.store(log_ptr + part, peak + (gl.log2(total) - WEIGHT_BITS), mask=valid)


def describe(x: torch.Tensor) -> TensorDescriptor:
    """Tiles of float16 vectors `[rows, dim]`."""
    shape = [BLOCK_N.value, x.shape[1]]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.float16)
    return TensorDescriptor.from_tensor(x, shape, layout)


def has_wgmma(device: torch.device) -> bool:
    """Whether the kernel runs there."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) == (9, 0)
