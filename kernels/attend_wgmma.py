"""Attention of many new tokens over 16-bit keys and values with wgmma (sm_90): `decode`'s for prompts.

Flash attention by blocks of 128 query rows, each over the slots that it sees (`wgmma_tiles`). TMA copies
tiles of one KV head each, so what another head or row holds is never read.
Bytes: queries and results once, keys and values once a row block (from the second-level cache).
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .bits import sm_count
from .scores import BIT_MASK, KEY_MASK, LOG2_E, NO_MASK, has_whole, mask_arguments
from .wgmma_tiles import BLOCK_M, BLOCK_N, attend_tiles, has_wgmma, span

# Of fewer keys a block has too little to do: what is beside its tiles takes as long, and nothing hides it.
LEAST_KEYS = 512
# Of all multiprocessors, with a block each: the portable kernel can split the keys of one.
LEAST_FILLED = 0.75
OPERANDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def wgmma_attend_kernel(
    q_ptr, k_tiles, v_tiles, bounds_ptr, mask_ptr, out_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    bounds_stride_b, bounds_stride_t, mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_n, q_len,
    max_len, scale, OPERAND: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr, HEADS: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_WHOLE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Rows are `decode_split_kernel`'s; the result is [batch, token, head, dim]."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, V_DIM, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    RESULT_ROWS: gl.constexpr = gl.SliceLayout(1, RESULT)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K_DIM, K_DIM // 8], [8, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V_DIM, V_DIM // 8], [8, 1], [1, 0])
    block = gl.num_programs(0) - 1 - gl.program_id(0)  # the last rows, which see most, come first
    kv_head, batch = gl.program_id(1), gl.program_id(2)
    rows = q_len * HEADS  # token-major, the heads of a group fastest
    row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=ROWS)
    valid = row < rows
    q_row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, Q))
    dims = gl.arange(0, K_DIM, layout=gl.SliceLayout(0, Q))
    q_head = kv_head.to(gl.int64) * HEADS + q_row % HEADS
    q_ptr += batch.to(gl.int64) * q_stride_b
    q_rows = q_ptr + q_head * q_stride_h + (q_row // HEADS).to(gl.int64) * q_stride_t
    q = gl.load(q_rows[:, None] + dims[None, :] * q_stride_d, mask=(q_row < rows)[:, None], other=0.0)
    low = row * 0
    high = low + max_len
    if HAS_BOUNDS:
        bounds_ptr += batch.to(gl.int64) * bounds_stride_b + row // HEADS * bounds_stride_t
        low = gl.maximum(gl.load(bounds_ptr, mask=valid, other=0), 0)
        high = gl.minimum(gl.load(bounds_ptr + 1, mask=valid, other=0), max_len)
    begin, end, whole_from, whole_to = span(low, high, bounds_ptr, valid, max_len, HAS_WHOLE, MASK)
    sees = (low, high, whole_from, whole_to, end)
    mask_ptr += batch.to(gl.int64) * mask_stride_b
    if MASK == BIT_MASK:
        head = kv_head.to(gl.int64) * HEADS + row % HEADS
        mask_ptr += head * mask_stride_h + (row // HEADS).to(gl.int64) * mask_stride_t
    mask = (mask_ptr, mask_stride_n, valid)
    factor = scale * LOG2_E + 0.0 * row

    peak = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
    total = gl.zeros([BLOCK_M], gl.float32, ROWS)
    acc = gl.zeros([BLOCK_M, V_DIM], gl.float32, RESULT)
    n = gl.cdiv(end - begin, BLOCK_N)
    if n > 0:
        acc, total, peak = attend_tiles(
            q, k_tiles, v_tiles, (batch, kv_head, begin), begin, n, sees, mask, factor, mask, peak, total,
            acc, MASK, False, OPERAND, K_DIM, V_DIM, 4, SCORES, RESULT,
        )  # fmt: skip

    share = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), RESULT_ROWS)
    out = gl.convert_layout((acc * share[:, None]).to(OPERAND), OUT)  # to write whole lines
    o_row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
    columns = gl.arange(0, V_DIM, layout=gl.SliceLayout(0, OUT))
    place = (batch.to(gl.int64) * q_len + o_row // HEADS) * (gl.num_programs(1) * HEADS)
    ptrs = out_ptr + (place + kv_head * HEADS + o_row % HEADS)[:, None] * V_DIM + columns[None, :]
    gl.store(ptrs, out, mask=(o_row < rows)[:, None])


def describe(x: torch.Tensor) -> TensorDescriptor:
    """Tiles of one head of keys or values `[B, Hkv, L, D]`."""
    block = [1, 1, BLOCK_N.value, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, OPERANDS[x.dtype])
    # Of a dimension of size 1 PyTorch's stride may be anything; TMA wants multiples of 16 bytes.
    strides = [s if n > 1 else x.shape[3] for n, s in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], block, layout)


def can_copy(x: torch.Tensor) -> bool:
    """Whether TMA takes tiles of `[B, Hkv, L, D]`."""
    strides = [s for n, s in zip(x.shape[:3], x.stride(), strict=False) if n > 1]
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)
    return aligned and x.stride(3) == 1


def takes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None,
    sinks: torch.Tensor | None, scale: float, softcap: float | None, lse: torch.Tensor | None,
) -> bool:  # fmt: skip
    """Whether the kernel takes this call, and is faster than the portable one (docs/kernel-notes.md)."""
    if not has_wgmma(q.device) or not q.dtype == k.dtype == v.dtype or q.dtype not in OPERANDS:
        return False
    kind, _, _ = mask_arguments(attn_mask, q, k.shape[2])
    rows = q.shape[2] * q.shape[1] // k.shape[1]
    blocks = triton.cdiv(rows, BLOCK_M.value) * k.shape[1] * q.shape[0]
    return (
        rows >= BLOCK_M.value
        and blocks >= LEAST_FILLED * sm_count(q.device)
        and k.shape[2] >= LEAST_KEYS
        and {q.shape[3], v.shape[3]} in ({128}, {64, 128})
        and kind in (NO_MASK.value, KEY_MASK.value, BIT_MASK.value)
        and sinks is None
        and not softcap
        and lse is None
        and scale > 0
        and can_copy(k)
        and can_copy(v)
    )


def attend_by_wgmma(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None, scale: float,
) -> None:  # fmt: skip
    """Fill `out` `[B, H, q, Dv]`, of which `[B, q, H, Dv]` is contiguous. `bounds` has a row a token."""
    batch, heads, q_len, dim = q.shape
    kv_heads, max_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    kind, mask, mask_strides = mask_arguments(attn_mask, q, max_len)
    wgmma_attend_kernel[(triton.cdiv(q_len * group, BLOCK_M.value), kv_heads, batch)](
        q, describe(k), describe(v), q if bounds is None else bounds, mask, out, *q.stride(),
        *((0, 0) if bounds is None else bounds.stride()[:2]), *mask_strides, q_len,
        max_len, scale, OPERAND=OPERANDS[q.dtype], K_DIM=dim, V_DIM=v.shape[3], HEADS=group,
        HAS_BOUNDS=bounds is not None, HAS_WHOLE=has_whole(bounds, kind), MASK=kind,
        num_warps=8,
    )  # fmt: skip
