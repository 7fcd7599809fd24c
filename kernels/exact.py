"""Attention over exact tokens for few query rows: programs of the launch that attends to packed ones.

A program is a warp and takes 8 rows of one KV head and as many slots as it can have keys and values of on
their way at once, as soon as the length says which tokens the slots hold. It never waits for the launch
before, which stores the new tokens and rotates the queries (`decode_query`), so on GPUs that start launches
early it is done about when that one is. It may, since it reads nothing that changes in the meantime:

- q, new keys and values, the length, bounds and mask were there before: a program of the launch before lets
  this one start only after it has waited for all earlier ones (the mean of keys, which is taken by one of
  these, is not needed here);
- new tokens are read from where they are now, k and v. The slots that the launch before writes are theirs
  (`locate_exact`); a slot whose latest token is an older one stays as it is;
- `exact_from` gives the same before and after (`exact_positions`).

Queries, tokens and `exact_from` are read past the first-level cache, where programs that do wait might find
what is old by then. Parts are allocated before that launch: where torch fills new memory, that is done too.

Keys and values are first operands, as in `decode_warp`, of the same 16 bytes that a lane loads at once: any
dims may be at the places of a sum, and any dims in the rows of a result.

Results are `Parts`, which `decode_reduce` joins. More rows, or more tokens, are `unpacked`'s.
Bytes: the exact tokens once for every 8 rows, the partials once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..beside import NOTHING, Beside, Chunk
from .scores import LOG2_E, NO_MASK, squash, visible_slots
from .warp_operands import by_vectors, first_operand, load_rows, second_operand

ROWS = gl.constexpr(8)  # of a program: columns of a product of tensor cores
TILE = gl.constexpr(16)  # tokens: rows of one
KEY_REGISTERS = 192  # of a lane, for the keys and values that are on their way at once
MOST_PIECES = 16  # of all tokens: the reduction has them all in registers
MOST_PARTS = 256  # of a KV head: a bound on memory
# Lane 4i + j has row i, columns 2j and 2j + 1 of 8 x 8 numbers of 16 bits, and gets those of column i.
TRANSPOSE = gl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")
# Loads before it are on their way when it is passed: the assembler puts none off to need fewer registers.
FENCE = gl.constexpr("fence.acq_rel.cta; // $0")


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
def first_recent_of(exact_from, length, new, RECENT: tl.constexpr):
    """The first recent exact token; `exact_from` is that before `new` tokens were stored, or that after."""
    return tl.maximum(tl.minimum(exact_from, length - new), length - RECENT)


@triton.jit
def exact_positions(
    slot, length, exact_from, new, end, SINKS: tl.constexpr, RECENT: tl.constexpr
):  # fmt: skip
    """Positions of the tokens in these slots, and which slots hold one of a position below `end`.

    `exact_from` may be what it was before the last `new` tokens were stored, or what it is after.
    """
    is_sink = slot < SINKS
    last = length - 1
    age = (last - SINKS) % max(RECENT, 1) - (slot - SINKS)  # in tokens, of those whose slot is no sink's
    position = tl.where(is_sink, slot, last - tl.where(age < 0, age + RECENT, age))
    first_recent = first_recent_of(exact_from, length, new, RECENT)
    held = is_sink | (position >= tl.maximum(first_recent, SINKS))
    return position, held & (slot < SINKS + RECENT) & (position < end)


@gluon.constexpr_function
def by_dims(vectors: int, dim: int):
    """Lane 4r + c: of vectors 2c, 2c + 1 and the 8th from these the dims 8r .. 8r + 7 of every 64."""
    registers = [[0, 1], [0, 2], [0, 4], [1, 0]] + ([[8, 0]] if vectors == 16 else [])
    registers += [[0, d] for d in (64, 128) if d < dim]
    lanes = [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [vectors, dim])


@gluon.jit
def load_tile(
    first, state, ptr, WIDTH: gl.constexpr, new_ptr, new_stride, HAS_NEW: gl.constexpr, SINKS: gl.constexpr,
    RECENT: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Keys, or values, of the 16 slots from `first`, which are `WIDTH` numbers apart; zero for no token."""
    length, exact_from, new, end = state
    slot = first + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    position, held = exact_positions(slot, length, exact_from, new, end, SINKS, RECENT)
    ptrs = ptr + slot * WIDTH
    if HAS_NEW:
        place = (position - (length - new)).to(gl.int64)
        ptrs = gl.where(place >= 0, new_ptr + place * new_stride, ptrs)
    dim = gl.arange(0, layout.shape[1], layout=gl.SliceLayout(0, layout))
    mask = held[:, None] & (dim >= 0)[None, :]
    return gl.load(ptrs[:, None] + dim[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def attend_to_exact(
    run, batch, kv_head, kv_row, q_ptr, k_ptr, v_ptr, exact_ptr, part_ptr, log_ptr, exact_from_ptr,
    seq_lens_ptr, bounds_ptr, mask_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d, k_stride_b,
    k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, lens_stride, from_stride, bounds_stride_b,
    bounds_stride_t, mask_stride_b, mask_stride_n, rows, q_len, max_len, scale, HAS_NEW: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_MASK: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
    RECENT: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr, HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
):  # fmt: skip
    """Partials of `ROWS` rows and `TOKENS` slots; with `HAS_NEW`, k and v are the last q_len tokens.

    Of a KV head, the `kv_row`th of all rows of the batch, it is the `run`th program.
    """
    EXACT: gl.constexpr = SINKS + RECENT
    PIECES: gl.constexpr = (EXACT + TOKENS - 1) // TOKENS
    WIDTH: gl.constexpr = K_DIM + V_DIM
    TILES: gl.constexpr = TOKENS // TILE
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    FIRST: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    first_slot, first_row = run % PIECES * TOKENS, run // PIECES * ROWS
    length = gl.load(seq_lens_ptr + batch * lens_stride)
    exact_from = gl.load(exact_from_ptr + batch * from_stride, cache_modifier=".cg").to(gl.int32)

    q_ptr += batch * q_stride_b + kv_head * HEADS * q_stride_h
    q = load_rows(q_ptr, first_row, rows, q_stride_h, q_stride_t, q_stride_d, ROWS, K_DIM, HEADS)
    row = first_row + gl.arange(0, ROWS, layout=COLUMNS)
    valid = row < rows
    low, high = visible_slots(
        bounds_ptr + batch * bounds_stride_b, bounds_stride_t, row // HEADS, valid, length, q_len, max_len,
        HAS_BOUNDS, NO_MASK,
    )  # fmt: skip

    # What is stored already has no new tokens: `exact_from` is what it is.
    new = q_len if HAS_NEW else 0
    length = length.to(gl.int32)
    state = (length, exact_from, new, gl.minimum(length, max_len))
    exact_ptr += kv_row * (EXACT * WIDTH)
    if HAS_NEW:
        k_ptr += batch * k_stride_b + kv_head * k_stride_h
        v_ptr += batch * v_stride_b + kv_head * v_stride_h
    k, v = (), ()
    for i in gl.static_range(TILES):
        k += (load_tile(first_slot + i * TILE, state, exact_ptr, WIDTH, k_ptr, k_stride_t, HAS_NEW, SINKS,
            RECENT, by_vectors(TILE, K_DIM)),)  # fmt: skip
    for i in gl.static_range(TILES):
        v += (load_tile(first_slot + i * TILE, state, exact_ptr + K_DIM, WIDTH, v_ptr, v_stride_t, HAS_NEW,
            SINKS, RECENT, by_dims(TILE, V_DIM)),)  # fmt: skip
    gl.inline_asm_elementwise(FENCE, "=r", [], gl.int32, False, 1)

    q = second_operand(q, SECOND)
    s = ()
    for i in gl.static_range(TILES):
        x = mma_v2(first_operand(k[i], FIRST), q, gl.zeros([TILE, ROWS], gl.float32, MMA))
        x = squash(x * (scale * LOG2_E), SOFTCAP)
        slot = first_slot + i * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, MMA))
        position, held = exact_positions(slot, length, exact_from, new, state[3], SINKS, RECENT)
        if HAS_MASK:
            mask_ptrs = mask_ptr + batch * mask_stride_b + position.to(gl.int64) * mask_stride_n
            held &= gl.load(mask_ptrs, mask=held, other=0) != 0
        inside = (position[:, None] >= low[None, :]) & (position[:, None] < high[None, :])
        s += (gl.where(held[:, None] & inside, x, float("-inf")),)

    peaks = s[0]
    for i in gl.static_range(1, TILES):
        peaks = gl.maximum(peaks, s[i])
    peak = gl.max(peaks, axis=0)
    origin = gl.where(peak == float("-inf"), 0.0, peak)[None, :]
    totals = gl.zeros([TILE, ROWS], gl.float32, MMA)
    out = gl.zeros([V_DIM, ROWS], gl.float32, MMA)
    for i in gl.static_range(TILES):
        weights = gl.exp2(s[i] - origin)
        totals += weights
        # Rows of the operand: dims 8r + 2t + h of 64 as rows r of 8, by h, of 16, by t.
        x = gl.reshape(v[i], [TILE, V_DIM // 64, 8, 4, 2])
        x = gl.reshape(gl.permute(x, [1, 3, 4, 2, 0]), [V_DIM, TILE])
        x = gl.convert_layout(x, FIRST, assert_trivial=True)
        # What rounding leaves of the weights is a second product.
        rounded = weights.to(x.dtype)
        left = (weights - rounded.to(gl.float32)).to(x.dtype)
        out = mma_v2(x, transpose(left, SECOND), mma_v2(x, transpose(rounded, SECOND), out))
    total = gl.sum(totals, axis=0)
    out *= (1.0 / gl.where(total == 0.0, 1.0, total))[None, :]

    part = (kv_row * rows + row) * PIECES + first_slot // TOKENS
    gl.store(log_ptr + part, peak + gl.log2(total), mask=valid)
    RESULTS: gl.constexpr = by_dims(ROWS, V_DIM)
    out = gl.permute(gl.reshape(out, [V_DIM // 64, 4, 2, 8, ROWS]), [4, 0, 3, 1, 2])
    out = gl.convert_layout(gl.reshape(out, [ROWS, V_DIM]), RESULTS, assert_trivial=True)
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, RESULTS))
    dim = gl.arange(0, V_DIM, layout=gl.SliceLayout(0, RESULTS))
    part = (kv_row * rows + row) * PIECES + first_slot // TOKENS
    mask = (row < rows)[:, None] & (dim >= 0)[None, :]
    gl.store(part_ptr + part[:, None] * V_DIM + dim[None, :], out, mask=mask)


@gluon.jit
def transpose(x, layout: gl.constexpr):
    """Weights [token, row], as products leave them, as a second operand."""
    x = gl.inline_asm_elementwise(TRANSPOSE, "=r,r", [x], x.dtype, True, 2)
    x = gl.permute(gl.reshape(x, [2, 8, 1, 8]), [0, 3, 2, 1])
    return gl.convert_layout(gl.reshape(x, [TILE, ROWS]), layout, assert_trivial=True)


class ExactWork(NamedTuple):
    """What `decode_warp`'s launch needs to attend to exact tokens too.

    Attributes:
        parts: what it fills; None if there are no tokens, or it does not take them.
        runs: how many programs it takes for each row of the batch and KV head.
        arguments: the kernel's.
        constants: likewise.
    """

    parts: Parts | None
    runs: int
    arguments: tuple
    constants: dict


def exact_work(
    q: torch.Tensor, kv_heads: int, v_dim: int, scale: float, beside: Beside = NOTHING,
    new: Chunk | None = None,
) -> ExactWork:  # fmt: skip
    """For q `[B, H, q, D]` and `reference.decode`'s arguments.

    `new`: k and v of the last q tokens, if the launch before stores them.
    """
    _, heads, q_len, dim = q.shape
    parts, runs, tokens = None, 0, 0
    if beside.exact is not None:
        blocks = triton.cdiv(q_len * heads // kv_heads, ROWS.value)
        tiles = triton.cdiv(beside.exact.shape[2], TILE.value)
        pieces = triton.cdiv(tiles, max(1, KEY_REGISTERS * 4 // (dim + v_dim)))
        few = pieces <= min(MOST_PIECES, MOST_PARTS // (blocks * ROWS.value))
        as_they_lie = all(x.dtype == beside.exact.dtype and x.stride(3) == 1 for x in new or ())
        if few and as_they_lie and q.dtype == beside.exact.dtype:
            parts = empty_parts(q, kv_heads, pieces, v_dim)
            runs, tokens = blocks * pieces, TILE.value * triton.cdiv(tiles, pieces)
    k, v = new or (q, q)
    arguments = (
        q, k, v, q if beside.exact is None else beside.exact, *(parts or (q, q)), *q.stride(),
        *k.stride()[:3], *v.stride()[:3], scale, runs,
    )  # fmt: skip
    return ExactWork(parts, runs, arguments, dict(HAS_NEW=new is not None, TOKENS=tokens))
