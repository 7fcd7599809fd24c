"""Device functions that the kernels share: unpack codes, look centroids up, quantise, rotate.

A centroid is an e4m3 value, and an e4m3 byte becomes fp16 by moving its bits: sign to the top, the
other seven below it. That gives the value / 256, exactly, subnormals included; a kernel multiplies
its result by `FP16_UNIT`. No native fp8 type is needed, and no byte decodes to NaN.
"""

import functools

import torch
import triton
import triton.language as tl

from ..codebook import FP8_UNIT, codebook

FP16_UNIT = tl.constexpr(256.0)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
FP8_MAX = tl.constexpr(448.0)
CPU_SMS = 2  # in the interpreter

CONVERT = "mov.b32 {{p, q}}, {x}; cvt.rn.f16x2.e4m3x2 {x}, p; mov.b32 {{${0}, ${1}}}, {x}; "
CONVERT += "cvt.rn.f16x2.e4m3x2 {x}, q; mov.b32 {{${2}, ${3}}}, {x};"


def magnitude_words(bits: int) -> tuple[int, int]:
    """The e4m3 bytes of the magnitudes of a codebook, four to a word: (first four, last four)."""
    if bits not in (2, 3, 4):
        return 0, 0
    table = int.from_bytes(bytes(codebook(bits).fp8_bytes), "little")
    return table & 0xFFFFFFFF, table >> 32


def quantiser(bits: int) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Magnitudes (none for 8 bits), and e4m3 units of a vector's root mean square and of its peak."""
    if bits not in (2, 3, 4):
        return (), (FP8_UNIT, 0.0)
    book = codebook(bits)
    return book.magnitudes, (book.per_rms, book.per_peak)


@triton.constexpr_function
def codes_per_byte(bits: int) -> int:
    """Of a row, or if the bits are 3, of its magnitudes."""
    return 4 if bits == 3 else 8 // bits


def lookup_words(bits: int) -> tuple[int, int]:
    """Eight e4m3 bytes to look codes up in, four to a word: magnitudes of 4 bits, centroids of 3 and 2."""
    low, high = magnitude_words(bits)
    if bits == 3:
        high = low | 0x80808080
    elif bits == 2:
        low |= low << 16 | 0x80800000
    return low, high


@functools.cache
def unpack_asm(bits: int, paired: bool = False) -> str:
    """PTX: the codes of a word of four bytes -> e4m3 bytes by lookup -> float16, a word of four for each.

    What is looked up at once are two codes each of two bytes. With `paired` (2 and 3 bits) they stay
    together, which saves two instructions of twelve: of each byte the first and the third code, then the
    others of each.

    Operands: the results, the word, the first of `lookup_words`, and for 3 bits, of which the word has the
    magnitudes, the word whose bytes have the signs, at bits 0, 2, 4, 6. The lookup (PRMT) takes a selector
    of four bits, of which the highest must be clear.
    """
    tiles = codes_per_byte(bits)
    high = lookup_words(bits)[1]
    word, table, signs = (f"${4 * tiles + i}" for i in range(3))
    lines = [".reg .b32 s, t, u, a, b, x0, x1, x2, x3;", ".reg .b16 p, q;"]
    if bits == 8:
        lines.append(f"mov.b32 x0, {word};")
    if bits == 3:
        lines.append(f"and.b32 s, {signs}, 0x55555555;")
    for tile in range(0 if bits == 8 else tiles // 2):  # and the tile of the other half of its bytes
        if bits == 4:
            lines.append(f"and.b32 t, {word}, 0x77777777;")
        elif bits == 2:
            lines.append(f"shr.u32 t, {word}, {2 * tile}; and.b32 t, t, 0x33333333;")
        else:  # the sign above the two bits of the magnitude
            lines.append(f"shr.u32 t, {word}, {2 * tile}; shl.b32 u, s, {2 - 2 * tile};")
            lines.append("lop3.b32 t, t, 0x33333333, u, 0xE2;")
        first, second = (f"x{2 * tile}", f"x{2 * tile + 1}") if paired else ("a", "b")
        lines.append(f"shr.u32 u, t, 16; prmt.b32 {first}, {table}, {high:#x}, t;")
        lines.append(f"prmt.b32 {second}, {table}, {high:#x}, u;")
        if not paired:
            lines.append(f"prmt.b32 x{tile}, a, b, 0x6420; prmt.b32 x{tile + tiles // 2}, a, b, 0x7531;")
    if bits == 4:
        lines.append(f"shl.b32 t, {word}, 4; lop3.b32 x0, t, 0x80808080, x0, 0xEA;")
        lines.append(f"lop3.b32 x1, {word}, 0x80808080, x1, 0xEA;")
    for tile in range(tiles):
        lines.append(CONVERT.format(*range(4 * tile, 4 * tile + 4), x=f"x{tile}"))
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def unpack_constraints(bits: int) -> str:
    """Of `unpack_asm`."""
    return "=h," * (4 * codes_per_byte(bits)) + ("r,r" if bits in (4, 8) else "r,r,r")


def early_launch(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may start before the one before it ends, and waits for it inside.

    Programmatic dependent launch of Hopper and later; `PDL` is the kernel's own.
    """
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    if is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def sm_count(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    if device.type == "cpu":
        return CPU_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def whole_waves(groups: int, tiles: int, slots: int) -> int:
    """How many runs of `tiles` take the fewest: waves of programs, times tiles of a run and one."""
    most = min(tiles, max(1, 4 * slots // groups))
    return min(range(1, most + 1), key=lambda n: -(-groups * n // slots) * (-(-tiles // n) + 1))


def operand_dtype(*dtypes: torch.dtype) -> tl.dtype:
    """The dtype of tensor-core operands: that of the inputs if all are of one 16-bit type."""
    if set(dtypes) == {torch.bfloat16}:
        return tl.bfloat16
    return tl.float16 if set(dtypes) == {torch.float16} else tl.float32


@triton.jit
def load_centroids(
    row_ptr, dims, mask, BITS: tl.constexpr, DIM: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, BYTE_STRIDE: tl.constexpr,
):  # fmt: skip
    """The centroids of `dims` of the packed rows at `row_ptr`, in fp16, divided by 256.

    `row_ptr`, `dims` and `mask` broadcast to one tile; masked-out places read nothing. A byte that
    holds several codes is loaded once for each (the later loads hit the first-level cache).
    """
    if BITS == 8:
        byte = tl.load(row_ptr + dims * BYTE_STRIDE, mask=mask, other=0).to(tl.int32)
        bits = (byte & 0x7F) << 7 | (byte & 0x80) << 8
    else:
        PLANE_BITS: tl.constexpr = 2 if BITS == 3 else BITS
        PLANE_BYTES: tl.constexpr = DIM * PLANE_BITS // 8
        byte = tl.load(row_ptr + dims % PLANE_BYTES * BYTE_STRIDE, mask=mask, other=0).to(tl.int32)
        code = byte >> dims // PLANE_BYTES * PLANE_BITS
        if BITS == 3:
            sign_ptr = row_ptr + (PLANE_BYTES + dims % (DIM // 8)) * BYTE_STRIDE
            sign = tl.load(sign_ptr, mask=mask, other=0).to(tl.int32) >> dims // (DIM // 8)
        else:
            sign = code >> BITS - 1
        magnitude = tl.where(code & 4 != 0, HI, LO) if BITS == 4 else LO
        INDEX_MASK: tl.constexpr = 1 if BITS == 2 else 3
        magnitude = magnitude >> (code & INDEX_MASK) * 8 & 0x7F
        bits = magnitude << 7 | (sign & 1) << 15
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def nan_if_overfull(seq_len, max_len):
    """NaN if a row holds more tokens than `max_len` (some were dropped), else 0: to be added."""
    return tl.where(seq_len > max_len, float("nan"), 0.0)


@triton.jit
def fp8_byte(x):
    """The e4m3 byte, int32, of float32 `x` within +-448, rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = bits >> 24 & 0x80
    bits = bits & 0x7FFFFFFF
    normal = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (120 << 3)  # exponent bias 127 -> 7
    # Adding 2**14, whose last bit is worth 2**-9, rounds to a whole number of subnormal steps.
    shifted = bits.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - (141 << 23)
    return sign | tl.where(bits < 121 << 23, subnormal, normal)


@triton.jit
def fp8_value(word, i: tl.constexpr):
    """float32 of the e4m3 byte `i`, from the lowest, of int32 words; NaN's bytes are +-480."""
    bits = word << 24 - 8 * i >> 4 & -0x78100000  # the sign, and seven bits from the fifth on
    return bits.to(tl.float32, bitcast=True) * 2.0**120  # exponent bias 127 -> 7


@triton.jit
def encode(y, to_grid, BITS: tl.constexpr, MAGNITUDES: tl.constexpr):
    """Codes (int32) of rotated coordinates, and their centroids (float32) in e4m3 units.

    `y * to_grid` is in e4m3 units. NaN (also 0 * inf, of a zero vector) gets code 0.
    """
    if BITS == 8:
        grid = y * to_grid
        clamped = tl.minimum(tl.maximum(grid, -FP8_MAX), FP8_MAX)
        code = fp8_byte(tl.where(grid == grid, clamped, 0.0))
        bits = ((code & 0x7F) << 7 | (code & 0x80) << 8).to(tl.int16)
        centroid = bits.to(tl.float16, bitcast=True).to(tl.float32) * FP16_UNIT
    else:
        grid = tl.abs(y) * to_grid
        code = tl.where(y < 0, 1 << BITS - 1, 0)
        centroid = tl.zeros_like(y) + MAGNITUDES[0]
        for i in tl.static_range(1, len(MAGNITUDES)):
            above = grid > (MAGNITUDES[i - 1] + MAGNITUDES[i]) / 2
            code += above.to(tl.int32)
            centroid += tl.where(above, MAGNITUDES[i] - MAGNITUDES[i - 1], 0.0)
        centroid = tl.where(y < 0, -centroid, centroid)
    return code, centroid


@triton.jit
def hadamard(x):
    """x [rows, D] @ the Hadamard matrix of D, a power of two: sums and differences of neighbours.

    Each step puts the sums in the first half and the differences in the second, so that after log2 D
    steps every bit of the index has been the last one, and is back in its place.
    """
    ROWS: tl.constexpr = x.shape[0]
    DIM: tl.constexpr = x.shape[1]
    for i in tl.static_range(16):
        if 1 << i < DIM:
            a, b = tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS, DIM])
    return x
