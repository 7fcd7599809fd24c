"""Split-KV attention over a packed cache for few query rows: one warp a program, no exchange.

For NVIDIA GPUs that convert fp8 (sm_89 on); `decode` has the kernel for all others. A program is one
warp: it attends a run of 64-token tiles of one KV head for up to 8 or 16 query rows. Its lanes copy a
tile's bytes to shared memory, each exactly those that it reads back, unpack them to float16 in the
registers that the tensor cores take them from, and keep scores, weights and sums there too. Nothing
waits for another warp, so the warps of an SM hide each other's latencies.

Keys and values are the first operand (`S^T = K q^T`, `O^T = V^T P^T`), for which lane 4r + c holds rows
r and r + 8 and, of every 8 places along the sum, places 2c and 2c + 1. Those places may be any dims or
tokens as long as both operands agree, so a lane takes 2, 4, .. contiguous bytes at once: place
8i + 2c + e is byte (c * BYTES + 2i + e) of 4 * BYTES, `place_byte`. The weights leave the first product
with a token per row, and enter the second with a token per place: `movmatrix` transposes 8 x 8 blocks.

Queries come rotated, divided by their largest magnitude, in float16; a weight is
2**15 * exp2(score - peak) times the value's scale over the largest scale so far, at most 2**15, so
that float16 loses nothing before 2**-39 of the largest.
"""

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import float16
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..beside import NOTHING, Beside
from ..format import KVFormat
from .bits import TINY, magnitude_words
from .decode_exact import attend_exact

# Triton 3.9 calls it `async_load`; in 3.6 it has the longer name.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
TILE = gl.constexpr(64)  # tokens: 16 for each of the 4 lanes of a row of an operand
SHARED_BYTES = 227 << 10  # of a multiprocessor
WEIGHT_BITS = gl.constexpr(15.0)
CONVERT = "mov.b32 {{p, q}}, {x}; cvt.rn.f16x2.e4m3x2 {x}, p; mov.b32 {{${0}, ${1}}}, {x}; "
CONVERT += "cvt.rn.f16x2.e4m3x2 {x}, q; mov.b32 {{${2}, ${3}}}, {x};"


@functools.cache
def unpack_asm(bits: int) -> str:
    """PTX: the codes of a word of four bytes -> e4m3 bytes by lookup -> float16, 8 / bits words of four.

    Operands: the results, the word, and the first word of the table of magnitudes.
    """
    tiles = 8 // bits
    low, high = magnitude_words(bits)
    word, table = f"${4 * tiles}", f"${4 * tiles + 1}"
    lines = [".reg .b32 t, u, a, b, x0, x1, x2, x3;", ".reg .b16 p, q;"]
    if bits == 8:
        lines.append(f"mov.b32 x0, {word};")
    elif bits == 4:  # PRMT looks four magnitudes up; bit 3 of its selectors must be clear
        lines += [
            f"and.b32 t, {word}, 0x77777777; shr.u32 u, t, 16;",
            f"prmt.b32 a, {table}, {high:#x}, t; prmt.b32 b, {table}, {high:#x}, u;",
            "prmt.b32 x0, a, b, 0x6420; prmt.b32 x1, a, b, 0x7531;",
            f"shl.b32 t, {word}, 4; lop3.b32 x0, t, 0x80808080, x0, 0xEA;",
            f"lop3.b32 x1, {word}, 0x80808080, x1, 0xEA;",
        ]
    else:  # one of two magnitudes
        first, step = low & 0xFF, (low >> 8 & 0xFF) - (low & 0xFF)
        for tile in range(tiles):
            lines += [
                f"shr.u32 t, {word}, {2 * tile}; and.b32 t, t, 0x01010101;",
                f"mad.lo.u32 x{tile}, t, {step}, {first * 0x01010101:#x};",
                f"shl.b32 t, {word}, {6 - 2 * tile}; lop3.b32 x{tile}, t, 0x80808080, x{tile}, 0xEA;",
            ]
    for tile in range(tiles):
        lines.append(CONVERT.format(*range(4 * tile, 4 * tile + 4), x=f"x{tile}"))
    return "{" + "\n".join(lines) + "}"


# `$1`, in a register: lane masks below and above never meet, but the assembler does not know, and so
# does not keep the value in a uniform register, from which it would be copied before every lookup.
OPAQUE = gl.constexpr(
    "{ .reg .b32 a, b; mov.u32 a, %lanemask_lt; mov.u32 b, %lanemask_gt;"
    " and.b32 a, a, b; xor.b32 $0, $1, a; }"
)
TRANSPOSE = gl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")


# A tile comes in pieces of 4 runs of contiguous bytes: 16 key rows (4 runs of 4), or 16 bytes of every
# value row (a run for each 16 tokens). In shared memory a piece is rows of up to 32 words.


@gluon.constexpr_function
def words_of_row(run: int) -> int:
    return min(32, run // 4)


@gluon.constexpr_function
def read_layout(run: int, registers: list, lanes: list):
    """The layout in which bit i of a lane's registers, or of its index, stands for these bytes."""
    words = min(32, run // 4)
    bases = [[[byte // 4 // words, byte // 4 % words] for byte in bits] for bits in (registers, lanes)]
    return gl.DistributedLinearLayout(*bases, [], [], [run // words, words])


@gluon.constexpr_function
def key_layout(row: int):
    """Lane 4r + c: a quarter of key row r // 2 * 4 + r % 2 of the piece, then of the row two further."""
    words = [4 << i for i in range((row // 16).bit_length() - 1)]
    return read_layout(4 * row, [*words, 2 * row], [row // 4, row // 2, row, 4 * row, 8 * row])


@gluon.constexpr_function
def value_layout():
    """Lane 4r + c: 16 tokens, the c-th, of bytes r and r + 8."""
    return read_layout(256, [4, 8, 128], [256, 512, 16, 32, 64])


@gluon.jit
def copy_scales(shared, ptr, left):
    """Start copying the scales of a tile, of which `left` tokens are left, to shared memory [4, 8, 2]."""
    LANES: gl.constexpr = gl.BlockedLayout([1, 1, 2], [4, 8, 1], [1, 1, 1], [2, 1, 0])
    run = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, LANES)))[:, None, None]
    pair = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LANES)))[None, :, None]
    token = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, LANES)))[None, None, :]
    ptr += run * 16 + pair * 2 + token
    async_load(shared, ptr, mask=run * 16 + 0 * (pair + token) < left)


@gluon.jit
def read_scales(shared, layout: gl.constexpr):
    """The scales of a tile in the order of `place_byte`, a token a row."""
    bases: gl.constexpr = [[1, 0, 0], [2, 0, 0], [4, 0, 0]]
    LANES: gl.constexpr = gl.DistributedLinearLayout(
        bases, [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 2, 0]], [], [], [8, 4, 2]
    )
    x = gl.reshape(shared.permute([1, 0, 2]).load(LANES), [64])
    return gl.convert_layout(x, layout, assert_trivial=True).to(gl.float32)


@gluon.jit
def copy_tile(shared, ptr, stride, left, RUN: gl.constexpr):
    """Start copying a tile's pieces to shared memory; `left` tokens, runs `stride` words apart."""
    PIECES: gl.constexpr = shared.shape[0]
    ROWS: gl.constexpr = shared.shape[1]
    WORDS: gl.constexpr = shared.shape[2]
    LANES: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [1, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LANES))[:, None]
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LANES))[None, :]
    run = row // (ROWS // 4)
    ptr += run * stride + row % (ROWS // 4) * WORDS + word
    mask = run * 16 + 0 * word < left
    for i in gl.static_range(PIECES):
        async_load(shared.index(i), ptr + i * (RUN // 4), mask=mask)
    async_copy.commit_group()


@gluon.constexpr_function
def constraints_of(bits: int) -> str:
    """Of `unpack_asm`."""
    return "=h," * (32 // bits) + "r,r"


@gluon.jit
def place_byte(place, BYTES: gl.constexpr):
    """Which byte of 4 * BYTES is `place` along the sum of an operand."""
    return place // 2 % 4 * BYTES + place // 8 * 2 + place % 2


@gluon.jit
def operands(words, table, ASM: gl.constexpr, BITS: gl.constexpr, layout: gl.constexpr):
    """Words [2, 8, 4, n] -> 8 / BITS first operands [16, 16n], one for each code of a byte."""
    CONSTRAINTS: gl.constexpr = constraints_of(BITS)
    # The types of the results are written out: Triton 3.9 takes no computed tuple of them.
    if BITS == 8:
        x = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words, table], is_pure=True, pack=1, dtype=(
            float16, float16, float16, float16))  # fmt: skip
    elif BITS == 4:
        x = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words, table], is_pure=True, pack=1, dtype=(
            float16, float16, float16, float16, float16, float16, float16, float16))  # fmt: skip
    else:
        x = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words, table], is_pure=True, pack=1, dtype=(
            float16, float16, float16, float16, float16, float16, float16, float16,
            float16, float16, float16, float16, float16, float16, float16, float16))  # fmt: skip
    tiles = ()
    for i in gl.static_range(8 // BITS):
        # [2, 8, lane, word, place % 2, which pair of the word]
        y = gl.join(gl.join(x[4 * i], x[4 * i + 1]), gl.join(x[4 * i + 2], x[4 * i + 3]))
        y = gl.reshape(gl.permute(y, [0, 1, 3, 5, 2, 4]), [16, 16 * words.shape[3]])
        tiles += (gl.convert_layout(y, layout, assert_trivial=True),)
    return tiles


@gluon.jit
def copy_keys(shared, ptrs, left, ROW: gl.constexpr):
    """Start copying the keys of a tile, of which `left` tokens are left, and the scales."""
    copy_scales(shared[2], ptrs[2], left)
    copy_scales(shared[3], ptrs[3], left)
    copy_tile(shared[0], ptrs[0], 4 * ROW, left, 4 * ROW)


@gluon.jit
def copy_values(shared, ptrs, left, ROW: gl.constexpr):
    """Start copying the values of a tile, of which `left` tokens are left."""
    copy_tile(shared[1], ptrs[1], 4 * ROW, left, 256)


@gluon.jit
def written_bytes(count):
    """All bits of the bytes of the first `count` tokens, in `value_layout`: stale ones may be NaN."""
    run = gl.arange(0, 8, layout=gl.SliceLayout(1, value_layout()))[:, None] // 2
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, value_layout()))[None, :] % 4
    missing = gl.minimum(gl.maximum(4 - (count - run * 16 - word * 4), 0), 4)
    bits = gl.where(missing == 4, 0, -1).to(gl.uint32) >> (8 * (missing % 4)).to(gl.uint32)
    return bits.to(gl.int32)


@gluon.jit
def attend_tile(
    acc, total, peak, largest, q, q_scale, tables, shared, ptrs, sees, start, end,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr, K_ASM: gl.constexpr, V_ASM: gl.constexpr,
    K_ROW: gl.constexpr, V_ROW: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """One tile of slots from `start`, online softmax in base 2; `ptrs` are those of the next tile."""
    FIRST: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    TOKENS: gl.constexpr = gl.SliceLayout(1, MMA)
    K_WORDS: gl.constexpr = K_ROW // 16  # words of a lane
    N: gl.constexpr = total.shape[0]
    next_start = start + TILE
    async_copy.wait_group(1)
    s = ()
    for m in gl.static_range(4):
        words = shared[0].index(m).load(key_layout(K_ROW))
        words = gl.permute(gl.reshape(words, [4, 2, 2, 4, K_WORDS]), [1, 0, 2, 3, 4])
        k = operands(gl.reshape(words, [2, 8, 4, K_WORDS]), tables[0], K_ASM, K_BITS, FIRST)
        x = gl.zeros([16, N], gl.float32, MMA)
        for t in gl.static_range(8 // K_BITS):
            x = mma_v2(k[t], q[t], x)
        s += (x,)
    k_scale, v_scale = read_scales(shared[2], TOKENS), read_scales(shared[3], TOKENS)
    copy_keys(shared, ptrs, end - next_start, K_ROW)
    s = gl.permute(gl.join(gl.join(s[0], s[1]), gl.join(s[2], s[3])), [3, 2, 0, 1])
    s = gl.convert_layout(gl.reshape(s, [TILE, N]), MMA, assert_trivial=True) * k_scale[:, None]

    low, high, filled, whole_from, whole_to = sees
    if (start < whole_from) | (start + TILE > whole_to):
        here = start + place_byte(gl.arange(0, TILE, layout=TOKENS), 16)
        s = gl.where((here < filled)[:, None], s, 0.0)
        inside = (here[:, None] >= low[None, :]) & (here[:, None] < high[None, :])
        s = gl.where(inside, s, float("-inf"))
        v_scale = gl.where(here < gl.minimum(filled, end), v_scale, 0.0)
    new_peak = gl.maximum(peak, gl.max(s, axis=0))
    origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = gl.exp2((peak - origin) * q_scale)
    shift = origin * q_scale - WEIGHT_BITS
    weights = gl.exp2(s * q_scale[None, :] - shift[None, :])
    total = total * decay + gl.sum(weights, axis=0)
    peak = new_peak
    new_largest = gl.maximum(largest, gl.max(gl.abs(v_scale), axis=0))
    unit = 1.0 / new_largest
    decay = (decay * (largest * unit))[None, :]
    largest = new_largest
    p = (weights * (v_scale * unit)[:, None]).to(gl.float16)
    p = gl.inline_asm_elementwise(TRANSPOSE, "=r,r", [p], gl.float16, True, 2)
    p = gl.permute(gl.reshape(p, [8, 8, N // 8, 8]), [0, 3, 2, 1])  # [block, token, column, row]
    p = gl.convert_layout(gl.reshape(p, [TILE, N]), SECOND, assert_trivial=True)
    if V_BITS == 8:
        written = written_bytes(filled - start)
    async_copy.wait_group(1)
    new_acc = ()
    for m in gl.static_range(V_ROW // 16):
        words = shared[1].index(m).load(value_layout())
        if V_BITS == 8:
            words &= written
        words = gl.permute(gl.reshape(words, [4, 2, 8, 4]), [1, 2, 0, 3])
        v = operands(words, tables[1], V_ASM, V_BITS, FIRST)
        for t in gl.static_range(8 // V_BITS):
            new_acc += (mma_v2(v[t], p, acc[m * (8 // V_BITS) + t] * decay),)
    copy_values(shared, ptrs, end - next_start, V_ROW)
    return new_acc, total, peak, largest


@gluon.jit
def warp_split_kernel(
    q_ptr, q_scale_ptr, raw_q_ptr, cache_ptr, seq_lens_ptr, exact_ptr, exact_from_ptr, bounds_ptr,
    partial_ptr, log_ptr, cache_stride_b, cache_stride_h, lens_stride, from_stride, q_stride_b, q_stride_h,
    q_stride_t, q_stride_d, bounds_stride_b, bounds_stride_t, v_rows_offset, k_scales_offset,
    v_scales_offset, rows, q_len, max_len, splits, scale, K_BITS: gl.constexpr, V_BITS: gl.constexpr,
    K_LO: gl.constexpr, V_LO: gl.constexpr, K_ASM: gl.constexpr, V_ASM: gl.constexpr, K_DIM: gl.constexpr,
    V_DIM: gl.constexpr, HEADS: gl.constexpr, SINKS: gl.constexpr, RECENT: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    K_ROW: gl.constexpr = K_DIM * K_BITS // 8  # bytes
    V_ROW: gl.constexpr = V_DIM * V_BITS // 8
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    K_ROWS: gl.constexpr = 4 * K_ROW // words_of_row(4 * K_ROW)  # of a piece in shared memory
    # Swizzled: of 8 lanes that read 16 bytes, two have neighbouring rows and four distant ones.
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])

    split = gl.program_id(0) % splits
    kv_head = gl.program_id(1).to(gl.int64)
    batch = gl.program_id(2).to(gl.int64)
    group = batch * gl.num_programs(1) + kv_head

    if SINKS + RECENT > 0:
        for exact_row in range(gl.program_id(0), rows, gl.num_programs(0)):
            attend_exact(
                raw_q_ptr, seq_lens_ptr, exact_ptr, exact_from_ptr, bounds_ptr, partial_ptr, log_ptr,
                lens_stride, from_stride, q_stride_b, q_stride_h, q_stride_t, q_stride_d, bounds_stride_b,
                bounds_stride_t, exact_row, rows, q_len, max_len, splits, scale, HEADS, HAS_BOUNDS, SINKS,
                RECENT, K_DIM, V_DIM,
            )  # fmt: skip

    # A query row sees slots low .. high - 1; here, of packed tokens.
    row = gl.program_id(0) // splits * N + gl.arange(0, N, layout=COLUMNS)
    valid = row < rows
    token = row // HEADS
    seq_len = gl.load(seq_lens_ptr + batch * lens_stride)
    filled = gl.minimum(seq_len, max_len).to(gl.int32)
    if HAS_BOUNDS:
        bounds_ptr += batch * bounds_stride_b + token * bounds_stride_t
        low = gl.maximum(gl.load(bounds_ptr, mask=valid, other=0), 0)
        high = gl.minimum(gl.load(bounds_ptr + 1, mask=valid, other=0), filled)
    else:
        low = token * 0
        high = gl.minimum(seq_len - q_len + token + 1, filled).to(gl.int32)
    if SINKS + RECENT > 0:
        first_recent = gl.maximum(gl.load(exact_from_ptr + batch * from_stride), seq_len - RECENT)
        low = gl.maximum(low, SINKS)
        high = gl.minimum(high, gl.minimum(first_recent, max_len).to(gl.int32))
    seen = valid & (low < high)
    begin = gl.min(gl.where(seen, low, max_len), axis=0) // 16 * 16
    end = gl.max(gl.where(seen, high, 0), axis=0)
    share = gl.cdiv(gl.cdiv(end - begin, TILE), splits) * TILE
    first = begin + split * share
    end = gl.minimum(first + share, end)

    # Tiles between these need no mask: every row sees all of them.
    whole_from = gl.max(gl.where(valid, low, 0), axis=0)
    whole_to = gl.minimum(gl.min(gl.where(valid, high, max_len), axis=0), filled)

    part = (group * rows + row) * (splits + (SINKS + RECENT > 0)) + split
    if first >= end:
        gl.store(log_ptr + part, gl.full([N], float("-inf"), gl.float32, COLUMNS), mask=valid)
        return

    page = cache_ptr + batch * cache_stride_b + kv_head * cache_stride_h
    k_ptr = page.to(gl.pointer_type(gl.int32)) + first.to(gl.int64) * (K_ROW // 4)
    v_ptr = (page + v_rows_offset).to(gl.pointer_type(gl.int32)) + first.to(gl.int64) * (V_ROW // 4)
    k_scale_ptr = (page + k_scales_offset).to(gl.pointer_type(gl.bfloat16)) + first
    v_scale_ptr = (page + v_scales_offset).to(gl.pointer_type(gl.bfloat16)) + first
    shared = (
        gl.allocate_shared_memory(gl.int32, [4, K_ROWS, 4 * K_ROW // K_ROWS], SWIZZLED),
        gl.allocate_shared_memory(gl.int32, [V_ROW // 16, 8, 32], SWIZZLED),
        gl.allocate_shared_memory(gl.bfloat16, [4, 8, 2], PLAIN),
        gl.allocate_shared_memory(gl.bfloat16, [4, 8, 2], PLAIN),
    )
    copy_keys(shared, (k_ptr, v_ptr, k_scale_ptr, v_scale_ptr), end - first, K_ROW)
    copy_values(shared, (k_ptr, v_ptr, k_scale_ptr, v_scale_ptr), end - first, V_ROW)

    place_k = gl.arange(0, K_ROW, layout=gl.SliceLayout(1, SECOND))[:, None]
    column = gl.program_id(0) // splits * N + gl.arange(0, N, layout=gl.SliceLayout(0, SECOND))[None, :]
    q_ptr += (group * rows + column) * K_DIM + place_byte(place_k, K_ROW // 4)
    q = ()
    for t in gl.static_range(8 // K_BITS):
        q += (gl.load(q_ptr + t * K_ROW, mask=column + 0 * place_k < rows, other=0.0),)
    q_scale = gl.load(q_scale_ptr + group * rows + row, mask=valid, other=1.0)
    k_table = gl.inline_asm_elementwise(OPAQUE, "=r,r", [gl.to_tensor(K_LO)], gl.int32, False, 1)
    v_table = k_table
    if V_LO != K_LO:
        v_table = gl.inline_asm_elementwise(OPAQUE, "=r,r", [gl.to_tensor(V_LO)], gl.int32, False, 1)

    tables, sees = (k_table, v_table), (low, high, filled, whole_from, whole_to)

    # [16 values, row] each: of 16 byte columns, of each code of a byte.
    acc = (gl.zeros([16, N], gl.float32, MMA),) * (V_DIM // 16)
    total = gl.zeros([N], gl.float32, COLUMNS)
    peak = gl.full([N], float("-inf"), gl.float32, COLUMNS)
    largest = TINY  # value scale so far
    for start in range(first, end, TILE):
        k_ptr, v_ptr = k_ptr + TILE * (K_ROW // 4), v_ptr + TILE * (V_ROW // 4)
        k_scale_ptr, v_scale_ptr = k_scale_ptr + TILE, v_scale_ptr + TILE
        ptrs = (k_ptr, v_ptr, k_scale_ptr, v_scale_ptr)
        acc, total, peak, largest = attend_tile(
            acc, total, peak, largest, q, q_scale, tables, shared, ptrs, sees, start, end,
            K_BITS, V_BITS, K_ASM, V_ASM, K_ROW, V_ROW, MMA,
        )  # fmt: skip
    async_copy.wait_group(0)

    gl.store(log_ptr + part, peak * q_scale + gl.log2(total) - WEIGHT_BITS, mask=valid)
    scale = (largest / gl.where(total == 0.0, 1.0, total))[None, :]
    value = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))[:, None]
    out_ptr = partial_ptr + part[None, :] * V_DIM + value
    for m in gl.static_range(V_ROW // 16):
        for t in gl.static_range(8 // V_BITS):
            x = acc[m * (8 // V_BITS) + t] * scale
            gl.store(out_ptr + (t * V_ROW + m * 16), x, mask=valid[None, :] & (value >= 0))


@functools.cache
def best_splits(groups: int, tiles: int, slots: int) -> int:
    """How many runs of `tiles` take the least time: waves of programs times tiles of a run, and one.

    The one is what a program spends before and after its tiles.
    """
    most = min(tiles, max(1, 4 * slots // groups))
    return min(range(1, most + 1), key=lambda n: -(-groups * n // slots) * (-(-tiles // n) + 1))


def warp_split(
    queries: torch.Tensor,
    factors: torch.Tensor,
    q: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    bounds: torch.Tensor | None,
    fmt: KVFormat,
    max_len: int,
    scale: float,
    sms: int,
    beside: Beside = NOTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial outputs [B, Hkv, row, split, Dv], the last of exact tokens; logarithms of their weights.

    `queries` and `factors` are `rotate_queries`'s, the others `reference.decode`'s; `sms` of the GPU.
    """
    batch, kv_heads, rows, dim = queries.shape
    dv, q_len, exact, exact_from = fmt.v_head_dim, q.shape[2], beside.exact, beside.exact_from
    columns = 8 if rows <= 8 or max(dim, dv) > 128 else 16
    blocks = triton.cdiv(rows, columns)
    # Queries and sums live in registers: a lane has 1/32 of them, queries two to a register.
    registers = min(255, 80 + columns * (dim // 2 + dv) // 32)
    warps = min(32, 65536 // 32 // registers, SHARED_BYTES // (TILE.value * fmt.slot_bytes + 1024))
    splits = best_splits(batch * kv_heads * blocks, triton.cdiv(max_len, TILE.value), warps * sms)
    shape = (batch, kv_heads, rows, splits + (exact is not None))
    partial = torch.empty((*shape, dv), dtype=torch.float32, device=queries.device)
    logs = torch.empty(shape, dtype=torch.float32, device=queries.device)
    offsets = [plane.offset for plane in fmt.planes(fmt.page_size(cache.shape[-1]))[1:]]
    lens_strides = [0 if x is None else x.expand(batch).stride(0) for x in (seq_lens, exact_from)]
    warp_split_kernel[(splits * blocks, kv_heads, batch)](
        queries, factors, q, cache, seq_lens, q if exact is None else exact,
        seq_lens if exact_from is None else exact_from, q if bounds is None else bounds, partial, logs,
        *cache.stride()[:2], *lens_strides, *q.stride(),
        *((0, 0) if bounds is None else bounds.stride()[:2]), *offsets, rows, q_len, max_len, splits, scale,
        K_BITS=fmt.k_bits, V_BITS=fmt.v_bits, K_LO=magnitude_words(fmt.k_bits)[0],
        V_LO=magnitude_words(fmt.v_bits)[0], K_ASM=unpack_asm(fmt.k_bits), V_ASM=unpack_asm(fmt.v_bits),
        K_DIM=dim, V_DIM=dv, HEADS=rows // q_len, SINKS=beside.sink_tokens, RECENT=beside.recent_tokens,
        HAS_BOUNDS=bounds is not None, N=columns, num_warps=1, maxnreg=registers,
    )  # fmt: skip
    return partial, logs
