"""The tiles of `decode_warp`: bytes of the cache to shared memory, to registers, to operands of a product.

A tile comes in pieces of 4 runs of contiguous bytes: 16 key rows (4 runs of 4), or 16 bytes of every
value row (a run for each 16 tokens). In shared memory a piece is rows of up to 32 words.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import float16
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .bits import codes_per_byte, unpack_constraints

# Triton 3.9 calls it `async_load`; in 3.6 it has the longer name.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def place_of_row(row: int) -> int:
    """Bytes of shared memory between key rows of `row` bytes."""
    return 1 << (row - 1).bit_length()


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
def key_layout(row: int, parts: int):
    """Lane 4r + c: a quarter of each part of key row r // 2 * 4 + r % 2 of the piece, then of the row
    two further."""
    part = row // parts
    registers = [4 << i for i in range((part // 16).bit_length() - 1)]
    registers += [part << i for i in range(parts.bit_length() - 1)] + [2 * row]
    return read_layout(4 * row, registers, [part // 4, part // 2, row, 4 * row, 8 * row])


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
def copy_rows(shared, ptr, left, ROW: gl.constexpr):
    """Start copying key rows of `ROW` bytes; `left` tokens are left."""
    ROWS: gl.constexpr = shared.shape[1]
    WORDS: gl.constexpr = shared.shape[2]
    PLACE: gl.constexpr = place_of_row(ROW) // 4
    LANES: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [1, 1], [1, 0])
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LANES))[None, :]
    word += gl.arange(0, ROWS, layout=gl.SliceLayout(1, LANES))[:, None] * WORDS
    token = word // PLACE  # of the piece
    ptr += (token // 4 * 16 + token % 4) * (ROW // 4) + word % PLACE
    for i in gl.static_range(4):
        mask = (token // 4 * 16 < left) & (word % PLACE < ROW // 4)
        async_load(shared.index(i), ptr + i * ROW, mask=mask)


@gluon.jit
def copy_values(shared, ptr, left, ROW: gl.constexpr):
    """Start copying the values of a tile, of which `left` tokens are left."""
    LANES: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [1, 1], [1, 0])
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, LANES))[:, None]
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, LANES))[None, :]
    ptr += row // 2 * (4 * ROW) + row % 2 * 32 + word
    for i in gl.static_range(ROW // 16):
        mask = row // 2 * 16 + 0 * word < left
        async_load(shared.index(i), ptr + i * 64, mask=mask)
    async_copy.commit_group()


@gluon.jit
def place_byte(place, BYTES: gl.constexpr):
    """Which byte of 4 * BYTES is `place` along the sum of an operand."""
    return place // 2 % 4 * BYTES + place // 8 * 2 + place % 2


@gluon.constexpr_function
def query_layout(rows: int, plane: int, parts: int):
    """Lane 4r + c: of query rows r and r + 8 what belongs to its bytes of a key row, as in `key_layout`."""
    quarter = plane // parts // 4
    registers = [[0, 1 << i] for i in range(quarter.bit_length() - 1)]
    registers += ([[0, plane // 2]] if parts == 2 else []) + ([[8, 0]] if rows == 16 else [])
    lanes = [[0, quarter], [0, 2 * quarter], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [rows, plane])


@gluon.jit
def load_queries(
    ptr, first, rows, DIM: gl.constexpr, ROWS: gl.constexpr, PLANE: gl.constexpr, PARTS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Second operands for those that `operands` makes of keys: query rows `first` .. at `ptr`."""
    LANES: gl.constexpr = query_layout(ROWS, PLANE, PARTS)
    CODES: gl.constexpr = DIM // PLANE
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LANES))[:, None]
    dim = gl.arange(0, PLANE, layout=gl.SliceLayout(0, LANES))[None, :]
    ptr += row * DIM + dim
    mask = (row < rows) & (dim >= 0)
    q = ()
    # A lane's places of a sum are pairs; of every 8 there is one.
    for t in gl.static_range(CODES // 2 if is_paired(CODES) else CODES):
        x = gl.load(ptr + t * PLANE, mask=mask, other=0.0)
        if is_paired(CODES):
            x = gl.join(x, gl.load(ptr + (t + CODES // 2) * PLANE, mask=mask, other=0.0))
            x = gl.permute(gl.reshape(x, [ROWS, PARTS, 4, PLANE // PARTS // 4, 2]), [1, 3, 2, 4, 0])
            x = gl.reshape(x, [2 * PLANE, ROWS])
        else:
            x = gl.permute(gl.reshape(x, [ROWS, PARTS, 4, PLANE // PARTS // 16, 2, 2]), [1, 3, 4, 2, 5, 0])
            x = gl.reshape(x, [PLANE, ROWS])
        q += (gl.convert_layout(x, layout, assert_trivial=True),)
    return q


@gluon.constexpr_function
def is_paired(codes: int) -> bool:
    """Whether neighbours along the sum are two codes of a byte of a key, not the same code of two bytes."""
    return codes == 4


@gluon.jit
def operands(
    words, signs, table, ASM: gl.constexpr, BITS: gl.constexpr, PAIRED: gl.constexpr, layout: gl.constexpr
):
    """Words [2, 8, 4, n] -> first operands [16, 16n], one for each code of a byte.

    With `PAIRED` [16, 32n]: one for the first and the third codes, one for the others (`unpack_asm`).
    """
    CONSTRAINTS: gl.constexpr = unpack_constraints(BITS)
    # The types of the results are written out: Triton 3.9 takes no computed tuple of them.
    if BITS == 8:
        x = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words, table], is_pure=True, pack=1, dtype=(
            float16, float16, float16, float16))  # fmt: skip
    elif BITS == 4:
        x = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words, table], is_pure=True, pack=1, dtype=(
            float16, float16, float16, float16, float16, float16, float16, float16))  # fmt: skip
    else:
        x = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [words, table, signs], is_pure=True, pack=1, dtype=(
            float16, float16, float16, float16, float16, float16, float16, float16,
            float16, float16, float16, float16, float16, float16, float16, float16))  # fmt: skip
    tiles = ()
    # [2, 8, lane, word, place % 2, which pair of the word]; of paired codes there are four pairs
    if PAIRED:
        for i in gl.static_range(2):
            y = gl.join(join4(x, 8 * i), join4(x, 8 * i + 4))
            y = gl.reshape(gl.permute(y, [0, 1, 3, 6, 5, 2, 4]), [16, 32 * words.shape[3]])
            tiles += (gl.convert_layout(y, layout, assert_trivial=True),)
    else:
        for i in gl.static_range(codes_per_byte(BITS)):
            y = gl.reshape(gl.permute(join4(x, 4 * i), [0, 1, 3, 5, 2, 4]), [16, 16 * words.shape[3]])
            tiles += (gl.convert_layout(y, layout, assert_trivial=True),)
    return tiles


@gluon.jit
def join4(x, first: gl.constexpr):
    return gl.join(gl.join(x[first], x[first + 1]), gl.join(x[first + 2], x[first + 3]))


@gluon.jit
def copy_keys(shared, ptrs, left, ROW: gl.constexpr):
    """Start copying the keys of a tile, of which `left` tokens are left, and the scales."""
    copy_scales(shared[2], ptrs[2], left)
    copy_scales(shared[3], ptrs[3], left)
    copy_rows(shared[0], ptrs[0], left, ROW)
    async_copy.commit_group()


@gluon.jit
def key_words(shared, PIECE: gl.constexpr, ROW: gl.constexpr, BITS: gl.constexpr):
    """Words [2, 8, 4, n] of 16 keys, and of their signs if these are separate: if the bits are 3.

    The place of a row has four parts then: two of magnitudes, one of signs and one of nothing. Of a byte of
    signs bits 0, 2, 4, 6 belong to a byte of the first part, the others to one of the second.
    """
    PLACE: gl.constexpr = place_of_row(ROW)
    PARTS: gl.constexpr = 4 if BITS == 3 else 1
    WORDS: gl.constexpr = PLACE // PARTS // 16
    words = by_lane(shared[0].index(PIECE).load(key_layout(PLACE, PARTS)), WORDS, PARTS)
    signs = words
    if BITS == 3:
        words, rest = halves(words)
        signs, _ = halves(rest)
        signs = gl.join(signs, (signs.to(gl.uint32) >> 1).to(gl.int32))
        signs = gl.reshape(gl.permute(signs, [0, 1, 2, 4, 3]), words.shape)
        signs = gl.convert_layout(signs, words.type.layout, assert_trivial=True)
    return words, signs


@gluon.jit
def halves(words):
    """Words [2, 8, 4, 2n] -> the first and the second n."""
    N: gl.constexpr = words.shape[3] // 2
    return gl.split(gl.permute(gl.reshape(words, [2, 8, 4, 2, N]), [0, 1, 2, 4, 3]))


@gluon.jit
def by_lane(words, WORDS: gl.constexpr, PARTS: gl.constexpr):
    """Key words in the order of memory -> [2, 8, 4, PARTS * WORDS]."""
    words = gl.permute(gl.reshape(words, [4, 2, 2, PARTS, 4, WORDS]), [1, 0, 2, 4, 3, 5])
    return gl.reshape(words, [2, 8, 4, PARTS * WORDS])


@gluon.jit
def written_bytes(count):
    """All bits of the bytes of the first `count` tokens, in `value_layout`: stale ones may be NaN."""
    run = gl.arange(0, 8, layout=gl.SliceLayout(1, value_layout()))[:, None] // 2
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, value_layout()))[None, :] % 4
    missing = gl.minimum(gl.maximum(4 - (count - run * 16 - word * 4), 0), 4)
    bits = gl.where(missing == 4, 0, -1).to(gl.uint32) >> (8 * (missing % 4)).to(gl.uint32)
    return bits.to(gl.int32)


@gluon.jit
def tile_pointers(page, offsets, start, K_ROW: gl.constexpr, V_ROW: gl.constexpr):
    """Where the keys, the values and their scales of the slots from `start` lie in a page."""
    start = start.to(gl.int64)
    return (
        page.to(gl.pointer_type(gl.int32)) + start * (K_ROW // 4),
        (page + offsets[0]).to(gl.pointer_type(gl.int32)) + start * (V_ROW // 4),
        (page + offsets[1]).to(gl.pointer_type(gl.bfloat16)) + start,
        (page + offsets[2]).to(gl.pointer_type(gl.bfloat16)) + start,
    )


@gluon.jit
def find_page(table, start, end, PAGE: gl.constexpr):
    """Of the tile from `start`: where and from which slot to read how many tokens; and if it has a page."""
    table_ptr, table_stride, cache_ptr, cache_stride = table
    number = gl.load(table_ptr + start // PAGE * table_stride, mask=start < end, other=-1)
    page = cache_ptr + number.to(gl.int64) * cache_stride
    slot = start // 64 % (PAGE // 64) * 64  # so written that the alignment shows
    return page, slot, gl.where(number < 0, 0, end - start), number >= 0
