"""Flash attention of a block of query rows over a run of tiles, by wgmma (sm_90): the loop of two kernels.

While the weights of a tile are computed, the tensor cores multiply those of the one before with its values.
Triton waits for a product whose result is used in the same iteration, so this is Gluon.

A program is two groups of four warps, each of 64 rows. A stage of the ring in shared memory has the values
of a tile and the keys of the next one, which TMA copies two stages ahead.
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

from .prefill import WEIGHT_BITS
from .scores import BIT_MASK, KEY_MASK, NO_MASK
from .segments import MEAN_OF

BLOCK_M, BLOCK_N, STAGES = gl.constexpr(128), gl.constexpr(128), gl.constexpr(3)
# Triton 3.9 has other names for these.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def widest(begin, end, whole_from, whole_to, other_begin, other_end, other_from, other_to):
    """The slots that either of two rows sees, and those that both do."""
    return (
        gl.minimum(begin, other_begin),
        gl.maximum(end, other_end),
        gl.maximum(whole_from, other_from),
        gl.minimum(whole_to, other_to),
    )


@gluon.jit
def span(low, high, bounds_ptr, valid, most, HAS_WHOLE: gl.constexpr, MASK: gl.constexpr):
    """Of a block's rows: (first slot, the end of slots) that any sees, (the same) of those that all see.

    A row sees slots low .. high - 1 that the mask lets through. `most`: the most slots.
    """
    whole_from, whole_to = low, high
    if HAS_WHOLE:  # the mask lets all of these through
        whole_from = gl.maximum(low, gl.load(bounds_ptr + 2, mask=valid, other=0))
        whole_to = gl.minimum(high, gl.load(bounds_ptr + 3, mask=valid, other=0))
    elif MASK != NO_MASK:
        whole_to = high * 0
    seen = valid & (low < high)
    begin, end = gl.where(seen, low, most), gl.where(seen, high, 0)
    whole_from, whole_to = gl.where(valid, whole_from, 0), gl.where(valid, whole_to, most)
    # One exchange between warps, not four.
    begin, end, whole_from, whole_to = gl.reduce((begin, end, whole_from, whole_to), 0, widest)
    return begin // BLOCK_N * BLOCK_N, end, whole_from, whole_to


@gluon.jit
def weigh(
    s, start, sees, mask, factor, means, peak, total, MASK: gl.constexpr, HAS_MEAN: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """A tile of the online softmax, base 2, of slots from `start`: (weights, decay, total, peak).

    `mask`: where it starts, for a mask of bits of each row; its stride over keys or words; valid rows.
    """
    low, high, whole_from, whole_to, end = sees
    mean_score = 0.0 * factor
    if HAS_MEAN:  # one for all keys of a tile: it goes with the peak
        mean_score = gl.load(means[0] + (start // MEAN_OF - means[3]) * means[1], mask=means[2], other=0.0)
    if (start < whole_from) | (start + BLOCK_N > whole_to):
        slot = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
        if MASK == KEY_MASK:
            let_through = gl.load(mask[0] + slot.to(gl.int64) * mask[1], mask=slot < end, other=0) != 0
            visible = visible & let_through[None, :]
        elif MASK == BIT_MASK:
            column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))[None, :]
            words = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, SCORES)
            for i in gl.static_range(BLOCK_N // 32):
                ptrs = mask[0] + (start // 32 + i) * mask[1]
                word = gl.load(ptrs, mask=mask[2] & (start + 32 * i < end), other=0)
                words = gl.where(column // 32 == i, word[:, None], words)
            visible = visible & ((words >> column % 32 & 1) != 0)
        s = gl.where(visible, s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, axis=1) * factor + mean_score)
    origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(s * factor[:, None] - (origin - mean_score - WEIGHT_BITS)[:, None])
    decay = gl.exp2(peak - origin)
    return weights, decay, total * decay + gl.sum(weights, axis=1), new_peak


@gluon.jit
def ring(tiles, dtype: gl.constexpr, DIM: gl.constexpr, RANK: gl.constexpr):
    """Room for a tile in each stage."""
    if RANK == 4:
        return gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, DIM], tiles.layout)
    else:
        return gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], tiles.layout)


@gluon.jit
def tile_in(buffers, stage, DIM: gl.constexpr, RANK: gl.constexpr):
    """The tile of a stage, [BLOCK_N, DIM]."""
    if RANK == 4:
        return buffers.index(stage).reshape([BLOCK_N, DIM])
    else:
        return buffers.index(stage)


@gluon.jit
def copy_into(buffer, tiles, place, offset, bar, pred, RANK: gl.constexpr):
    """Copy the tile that begins `offset` tokens after `place`."""
    if RANK == 4:
        copy_tile(tiles, [place[0], place[1], place[2] + offset, 0], bar, buffer, pred=pred)
    else:
        copy_tile(tiles, [place[0] + offset, 0], bar, buffer, pred=pred)


@gluon.jit
def issue(
    k_tiles, v_tiles, place, bars, k_buffers, v_buffers, stage, pred, K_DIM: gl.constexpr,
    V_DIM: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """Stage i: values of tile i, and keys of tile i + 1."""
    offset = stage * BLOCK_N
    which = stage % STAGES
    bar = bars.index(which)
    mbarrier.expect(bar, BLOCK_N * (K_DIM + V_DIM) * 2, pred=pred)
    copy_into(k_buffers.index(which), k_tiles, place, offset + BLOCK_N, bar, pred, RANK)
    copy_into(v_buffers.index(which), v_tiles, place, offset, bar, pred, RANK)


@gluon.jit
def attend_tiles(
    q, k_tiles, v_tiles, place, begin, n, sees, mask, factor, means, peak, total, acc,
    MASK: gl.constexpr, HAS_MEAN: gl.constexpr, OPERAND: gl.constexpr, K_DIM: gl.constexpr,
    V_DIM: gl.constexpr, RANK: gl.constexpr, SCORES: gl.constexpr, RESULT: gl.constexpr,
):  # fmt: skip
    """The online softmax over `n` tiles, at least one, of slots from `begin`: (acc, total, peak).

    `q` is [BLOCK_M, K_DIM]. `place` of the first keys and values: batch row, KV head and slot in tensors of
    `RANK` 4, the row in those of 2.
    """
    RESULT_ROWS: gl.constexpr = gl.SliceLayout(1, RESULT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    k_buffers = ring(k_tiles, OPERAND, K_DIM, RANK)
    v_buffers = ring(v_tiles, OPERAND, V_DIM, RANK)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    # The first keys, in the last stage's place.
    mbarrier.expect(bars.index(STAGES), BLOCK_N * K_DIM * 2)
    copy_into(k_buffers.index(STAGES - 1), k_tiles, place, 0, bars.index(STAGES), True, RANK)
    for i in gl.static_range(STAGES - 1):
        issue(k_tiles, v_tiles, place, bars, k_buffers, v_buffers, i, i < n, K_DIM, V_DIM, RANK)
    # Queries, which may still be under way, are waited for while keys come.
    Q_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, K_DIM], OPERAND)
    q = gl.allocate_shared_memory(OPERAND, [BLOCK_M, K_DIM], Q_SHARED, q)
    fence_async_shared()
    barrier()
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(bars.index(STAGES), 0)
    keys = tile_in(k_buffers, STAGES - 1, K_DIM, RANK).permute((1, 0))
    s = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    weights, decay, total, peak = weigh(
        s, begin, sees, mask, factor, means, peak, total, MASK, HAS_MEAN, SCORES
    )
    p = gl.convert_layout(weights.to(OPERAND), WEIGHTS)
    mbarrier.wait(bars.index(0), 0)
    for i in range(0, n - 1):
        # Products of stage i run while the weights of tile i + 1 are computed.
        keys = tile_in(k_buffers, i % STAGES, K_DIM, RANK).permute((1, 0))
        s = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        acc = acc * gl.convert_layout(decay, RESULT_ROWS)[:, None]
        o = warpgroup_mma(p, tile_in(v_buffers, i % STAGES, V_DIM, RANK), acc, is_async=True)
        barrier()  # all warps are done with stage i - 1
        stage = i + STAGES - 1
        issue(k_tiles, v_tiles, place, bars, k_buffers, v_buffers, stage, stage < n, K_DIM, V_DIM, RANK)
        s = warpgroup_mma_wait(1, [s])
        weights, decay, total, peak = weigh(
            s, begin + (i + 1) * BLOCK_N, sees, mask, factor, means, peak, total, MASK, HAS_MEAN, SCORES
        )
        next_p = gl.convert_layout(weights.to(OPERAND), WEIGHTS)
        # The assembler may move what precedes a wait for products behind it, but not past this one.
        mbarrier.wait(bars.index((i + 1) % STAGES), (i + 1) // STAGES & 1)
        acc, p, next_p, decay = warpgroup_mma_wait(0, [o, p, next_p, decay])
        p = next_p
    acc = acc * gl.convert_layout(decay, RESULT_ROWS)[:, None]
    o = warpgroup_mma(p, tile_in(v_buffers, (n - 1) % STAGES, V_DIM, RANK), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [o])
    for i in gl.static_range(STAGES + 1):
        mbarrier.invalidate(bars.index(i))
    return acc, total, peak


def has_wgmma(device: torch.device) -> bool:
    """Whether these run there."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) == (9, 0)
