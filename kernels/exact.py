"""Attention over exact tokens for few query rows: programs of the launch that rotates the queries.

A program is a warp and takes 8 rows of one KV head and 16 slots. Keys and values are on their way at once,
as soon as the length says which tokens the slots hold. The launch may be the one that stores new tokens, so
these come from where they are now, k and v, and not from their slots.

Results are `Parts`, which `decode_reduce` joins. More rows, or more tokens, are `unpacked`'s.
Bytes: the exact tokens once for every 8 rows, the partials once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..beside import NOTHING, Beside, Chunk
from .scores import LOG2_E, NO_MASK, load_mask, mask_arguments, squash, visible_slots

ROWS, TOKENS = 8, 16  # of a program: what a product of tensor cores has at least
MOST_PIECES = 16  # of all tokens: the reduction has them all in registers
MOST_PARTS = 256  # of a KV head: a bound on memory


class Parts(NamedTuple):
    """Partial attention over tokens that are there as they came, in the space of values as they came.

    Attributes:
        outputs: `[B, Hkv, q * H / Hkv, pieces, Dv]` float32, normalised; rows are token-major.
        logs: without the last dimension: base-2 logarithms of the sums of weights, -inf where a row sees
            nothing of a piece.
    """

    outputs: torch.Tensor
    logs: torch.Tensor


def empty_parts(q: torch.Tensor, kv_heads: int, pieces: int, v_dim: int) -> Parts:
    """For q `[B, H, q, D]`, not filled."""
    batch, heads, q_len, _ = q.shape
    shape = (batch, kv_heads, q_len * heads // kv_heads, pieces)
    outputs = torch.empty((*shape, v_dim), dtype=torch.float32, device=q.device)
    return Parts(outputs, torch.empty(shape, dtype=torch.float32, device=q.device))


@triton.jit
def exact_positions(
    slot, length, exact_from, new, end, SINKS: tl.constexpr, RECENT: tl.constexpr
):  # fmt: skip
    """Positions of the tokens in these slots, and which slots hold one of a position below `end`.

    `exact_from` may be what it was before the last `new` tokens were stored, or what it is after.
    """
    is_sink = slot < SINKS
    last = length - 1
    position = tl.where(is_sink, slot, last - (last - slot) % max(RECENT, 1))
    first_recent = tl.maximum(tl.minimum(exact_from, length - new), length - RECENT)
    held = is_sink | (position >= tl.maximum(first_recent, SINKS))
    return position, held & (slot < SINKS + RECENT) & (position < end)


@triton.jit
def attend_to_exact(
    program, q_ptr, k_ptr, v_ptr, exact_ptr, exact_from_ptr, seq_lens_ptr, bounds_ptr, mask_ptr, part_ptr,
    log_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, k_stride_b, k_stride_h, k_stride_t, v_stride_b,
    v_stride_h, v_stride_t, lens_stride, from_stride, bounds_stride_b, bounds_stride_t, mask_stride_b,
    mask_stride_n, kv_rows, kv_heads, q_len, max_len, scale, HAS_NEW: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Partials of `ROWS` rows and `TOKENS` slots; with `HAS_NEW`, k and v are the last q_len tokens.

    One of the `kv_rows` (batch, KV head) that there are; other programs do nothing.
    """
    EXACT: tl.constexpr = SINKS + RECENT
    PIECES: tl.constexpr = (EXACT + TOKENS - 1) // TOKENS
    rows = q_len * HEADS  # token-major, the heads of a group fastest
    blocks = tl.cdiv(rows, ROWS)
    piece, first_row = program % PIECES, program // PIECES % blocks * ROWS
    kv_row = (program // PIECES // blocks).to(tl.int64)
    if kv_row < kv_rows:
        batch, kv_head = kv_row // kv_heads, kv_row % kv_heads
        slot = piece * TOKENS + tl.arange(0, TOKENS)
        k_dims, v_dims = tl.arange(0, K_DIM), tl.arange(0, V_DIM)
        row = first_row + tl.arange(0, ROWS)
        valid, token = row < rows, row // HEADS
        q_ptr += batch * q_stride_b + kv_head * HEADS * q_stride_h
        q_ptrs = q_ptr + row % HEADS * q_stride_h + token.to(tl.int64) * q_stride_t
        q = tl.load(q_ptrs[:, None] + k_dims[None, :] * q_stride_d, mask=valid[:, None], other=0.0)
        length = tl.load(seq_lens_ptr + batch * lens_stride)
        low, high = visible_slots(
            bounds_ptr + batch * bounds_stride_b, bounds_stride_t, token, valid, length, q_len, max_len,
            HAS_BOUNDS, MASK,
        )  # fmt: skip
        length = length.to(tl.int32)
        exact_from = tl.load(exact_from_ptr + batch * from_stride).to(tl.int32)
        end = tl.minimum(length, max_len)
        position, held = exact_positions(slot, length, exact_from, q_len, end, SINKS, RECENT)
        k_ptrs = exact_ptr + (kv_row * EXACT + slot) * (K_DIM + V_DIM)
        v_ptrs = k_ptrs + K_DIM
        if HAS_NEW:
            place = (position - (length - q_len)).to(tl.int64)
            k_ptr += batch * k_stride_b + kv_head * k_stride_h
            v_ptr += batch * v_stride_b + kv_head * v_stride_h
            k_ptrs = tl.where(place >= 0, k_ptr + place * k_stride_t, k_ptrs)
            v_ptrs = tl.where(place >= 0, v_ptr + place * v_stride_t, v_ptrs)
        k = tl.load(k_ptrs[:, None] + k_dims[None, :], mask=held[:, None], other=0.0)
        v = tl.load(v_ptrs[:, None] + v_dims[None, :], mask=held[:, None], other=0.0)
        if MASK != NO_MASK:
            mask_ptrs = mask_ptr + batch * mask_stride_b + position.to(tl.int64) * mask_stride_n
            held &= load_mask(mask_ptrs, held, MASK)[0]

        # Tokens are the first dimension: of a product of tensor cores it has 16, the second 8.
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        scores = squash(scores * (scale * LOG2_E), SOFTCAP)  # [TOKENS, ROWS]
        visible = held[:, None] & (position[:, None] >= low[None, :]) & (position[:, None] < high[None, :])
        scores = tl.where(visible, scores, float("-inf"))
        peak = tl.max(scores, axis=0)
        weights = tl.exp2(scores - tl.where(peak == float("-inf"), 0.0, peak)[None, :])
        total = tl.sum(weights, axis=0)
        # What rounding leaves of the weights is a second product.
        rounded = weights.to(v.dtype)
        left = (weights - rounded.to(tl.float32)).to(v.dtype)
        out = tl.dot(tl.trans(v), rounded, input_precision="ieee")
        out = tl.dot(tl.trans(v), left, out, input_precision="ieee")
        out *= (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]
        part = (kv_row * rows + row) * PIECES + piece
        tl.store(part_ptr + part[None, :] * V_DIM + v_dims[:, None], out, mask=valid[None, :])
        tl.store(log_ptr + part, peak + tl.log2(total), mask=valid)


class ExactWork(NamedTuple):
    """What a launch needs to attend to exact tokens too.

    Attributes:
        parts: what it fills; None if there are no tokens, or it does not take them.
        programs: how many it takes.
        kept: arguments that a launch which stores has anyway: the copies, `exact_from`, lengths, strides.
        arguments: the other ones.
        constants: its own, and sinks and recent tokens.
    """

    parts: Parts | None
    programs: int
    kept: tuple
    arguments: tuple
    constants: dict


def exact_work(
    q: torch.Tensor, kv_heads: int, v_dim: int, seq_lens: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None, bounds: torch.Tensor | None = None, max_len: int = 0,
    softcap: float | None = None, beside: Beside = NOTHING, new: Chunk | None = None,
) -> ExactWork:  # fmt: skip
    """For q `[B, H, q, D]` and `reference.decode`'s arguments; a mask is over keys.

    `bounds` has a row for each row of the batch and each query. `new`: k and v of the last q tokens, if the
    launch is to store them.
    """
    batch, heads, q_len, _ = q.shape
    parts, programs = None, 0
    if beside.exact is not None:
        blocks = triton.cdiv(q_len * heads // kv_heads, ROWS)
        pieces = triton.cdiv(beside.exact.shape[2], TOKENS)
        few = pieces <= min(MOST_PIECES, MOST_PARTS // (blocks * ROWS))
        as_they_lie = all(x.dtype == beside.exact.dtype and x.stride(3) == 1 for x in new or ())
        if few and as_they_lie and q.dtype == beside.exact.dtype:
            parts = empty_parts(q, kv_heads, pieces, v_dim)
            programs = batch * kv_heads * blocks * pieces
    exact, exact_from, lens = (q if x is None else x for x in (beside.exact, beside.exact_from, seq_lens))
    from_stride, lens_stride = (
        0 if x is None else x.expand(batch).stride(0) for x in (beside.exact_from, seq_lens)
    )
    mask_kind, mask, (mask_stride_b, _, _, mask_stride_n) = mask_arguments(attn_mask, q, max_len)
    arguments = (
        q if bounds is None else bounds, mask, *(parts or (q, q)),
        *((0, 0) if bounds is None else bounds.stride()[:2]), mask_stride_b, mask_stride_n, max_len,
    )  # fmt: skip
    constants = dict(
        HAS_BOUNDS=bounds is not None, MASK=mask_kind, SOFTCAP=softcap or 0.0, SINKS=beside.sink_tokens,
        RECENT=beside.recent_tokens, EXACT_ROWS=ROWS if programs else 0, TOKENS=TOKENS, V_DIM=v_dim,
    )  # fmt: skip
    kept = (exact, exact_from, lens, from_stride, lens_stride)
    return ExactWork(parts, programs, kept, arguments, constants)
