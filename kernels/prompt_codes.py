"""PTX that encodes rotated coordinates for `store_prompt`: codes without comparisons, sums for the scale.

One multiply-add that rounds down to a whole number gives a coordinate's steps, 16 bits; with the
complement where it is negative they are those of its magnitude, and name its cell, whose middle stands for
all of it. All midpoints of the codebook lie between cells: no decision moves. From there two coordinates
share a word.

Read as a float16, 16 bits below 2048 are a number in proportion to them (a subnormal), and more bits are
no smaller a number. Of that, held within 0 and 1, the code is a polynomial, rounded since its last
multiply-add adds to 1024, whose last bit is 1. The same sum puts the codes before it further up, so that
packing is one multiply-add a pair. `CURVES` was found by search; the test goes over all cells.

Sums for the scale are exact integers: centroids are multiples of 1/64 below 4, a byte each, looked up by
the packed codes, and coordinates the middles of their cells. The middles are off to all sides unless a
vector has few distinct coordinates (one entry once, or a few subnormals): then the scale is off by what
they are. So cells are fine enough that no scale is off by 2**-8, a bf16 ulp at least (the test has the
worst vectors). For 4 bits these are too fine for float16: its codes come from cells twice as wide, at one
instruction more a pair.

Codes of 8 bits are what an instruction makes of coordinates; `store_prompt` sums them in float32.
"""

import dataclasses
import functools
import struct

import triton

from ..codebook import codebook

CENTROID_STEPS = 64.0  # of 1 in e4m3 units: every centroid is a whole number of steps
FINE = 2  # steps of the cells that the sums count
MAGIC = 1024.0
FLOOR = 1.5 * 2.0**23  # the sum's low 16 bits are the steps, negative ones too


@dataclasses.dataclass(frozen=True)
class Curve:
    """From a coordinate in e4m3 units to its magnitude code: `steps` of 1, of which a cell has `cell`.

    `u = slope * h + offset`, held within 0 and 1, h the float16 with the bits of the cell's middle; the
    code is `c0 u + c1 u**2 + ...`, rounded. Each step rounds to float16.
    """

    steps: int
    cell: int
    slope: float
    offset: float
    coefficients: tuple[float, ...]


CURVES = {
    2: Curve(1024, FINE, 65504.0, -4.5234375, (1.4326171875,)),
    3: Curve(512, FINE, 14032.0, -0.16943359375, (3.421875, -0.8408203125)),
    4: Curve(512, 4, 11784.0, -0.05523681640625, (11.734375, -8.5546875, 8.03125, -4.50390625)),
}


def code_steps(bits: int) -> tuple[float, float]:
    """Steps of 1 in e4m3 units that `encode_asm` takes coordinates in, and of the quotient of its sums."""
    return (1.0, 1.0) if bits == 8 else (float(CURVES[bits].steps), CENTROID_STEPS)


def literal(value: float) -> str:
    """A float32 constant of PTX."""
    return "0f" + struct.pack(">f", value).hex().upper()


def half2(value: float) -> str:
    """A float16 constant of PTX, twice."""
    half = struct.pack(">e", value).hex()
    return "0x" + half + half


def table_words(bits: int) -> tuple[int, int]:
    """Magnitudes in steps, four to a word."""
    magnitudes = codebook(bits).magnitudes
    table = int.from_bytes(bytes(int(CENTROID_STEPS * m) for m in magnitudes), "little")
    return table & 0xFFFFFFFF, table >> 32


@triton.constexpr_function
def words_of_call(bits: int, dim: int) -> int:
    """Words of codes of 64 or 128 dims that a lane has: of 3 bits magnitudes and signs."""
    return dim // 64 if bits == 8 else 2 if bits == 3 else 1


@triton.constexpr_function
def first_byte(bits: int, dim: int, word: int) -> int:
    """Where the bytes of these words begin in a row; those of 3 bits' signs have their plane."""
    return 64 * word if bits == 8 else dim // 4 * word


@triton.constexpr_function
def lanes_apart(bits: int, word: int) -> int:
    """Of how many of the 8 lanes with other dims the bytes of this word differ: of 3 bits' signs of 4."""
    return 4 if bits == 3 and word == 1 else 8


def field_order(bits: int, dim: int) -> list[int]:
    """Which of `encode_asm`'s inputs is each code of its words, from the lowest bits; of 3 bits as of 2."""
    chunks, codes = dim // 32, 4 if bits == 3 else 8 // bits
    apart = chunks // codes  # chunks between the codes of a byte
    return [2 * (code * apart + byte // 2) + byte % 2 for byte in range(2 * apart) for code in range(codes)]


@functools.cache
def encode_asm(bits: int, dim: int) -> str:
    """PTX: coordinates 2q + e, e = 0 or 1, of chunk q of 32 dims -> their codes and sums for the scale.

    Operands: `words_of_call` words of codes in the order of `field_order` (of 3 bits: of two bits for each
    magnitude; of a bit for each sign, of the same dims and those of the lane 16 further), two sums (of
    coordinate times centroid, of squares of centroids), `dim / 16` coordinates, what takes them to steps.
    The sums are integers in steps. NaN gets any code. Nothing for 8 bits.
    """
    if bits == 8:
        return ""
    count, words = dim // 16, words_of_call(bits, dim)
    inputs = [f"${words + 2 + i}" for i in range(count)]
    order, factor = field_order(bits, dim), f"${words + 2 + count}"
    field = 2 if bits == 3 else bits
    codes = 8 // field  # of a byte
    chains = count // (2 * codes)  # each makes two bytes: pairs, from the highest codes
    lines = [".reg .f32 c; .reg .b32 l, h, p, u, f, k, x, w, s, t, a, b, n, d, slope, z;"]
    lines.append(".reg .b32 " + ", ".join(f"{x}{j}" for x in "qmt" for j in range(count // 2)) + ";")
    lines.append(f"mov.b32 slope, {half2(CURVES[bits].slope)};")
    lines.append("mov.b32 z, 0; mov.b32 n, 0; mov.b32 d, 0; mov.b32 s, 0;")
    for chain in range(chains):
        chosen = [inputs[i] for i in order[2 * codes * chain :][: 2 * codes]]
        for i in reversed(range(codes)):
            j = chain * codes + i
            lines += step_lines((chosen[i], chosen[codes + i]), factor, j)
            lines += code_lines(CURVES[bits], field, j, f"t{j + 1}" if i < codes - 1 else "")

    def low_bytes(x: str, i: int) -> str:
        """Of both halves of the i-th word of each chain."""
        return f"{x}{i}, {x}{codes + i}, 0x6420" if chains == 2 else f"{x}{i}, z, 0x4420"

    lines.append(f"prmt.b32 w, {low_bytes('t', 0)};")
    low, high = table_words(bits)
    for part in range(count // 4):  # four fields one after the other, or of 2 bits every second
        lines.append(f"shr.u32 t, w, {16 * part if field == 4 else 2 * part};")
        if field == 2:
            lines.append("and.b32 t, t, 0x3333;")
        first, other = (2 * part, 2 * part + 1) if field == 4 else (part, part + 2)
        lines.append(f"prmt.b32 a, {low:#x}, {high:#x}, t; dp4a.u32.u32 d, a, a, d;")
        lines.append("prmt.b32 b, a, a, 0x3120;")  # as the halves of a pair lie
        lines.append(f"dp2a.lo.u32.u32 n, q{first}, b, n; dp2a.hi.u32.u32 n, q{other}, b, n;")
    for i in range(codes):
        mask = 0x01010101 << field * i + field - 1
        lines.append(f"prmt.b32 a, {low_bytes('m', i)}; lop3.b32 s, a, {mask:#x}, s, 0xEA;")
    if bits == 3:  # to the lower of each two bits, and in lanes from 16 on to the upper
        lines.append("mov.b32 $0, w; mov.u32 t, %laneid; and.b32 t, t, 16;")
        lines.append("xor.b32 t, t, 16; shr.u32 t, t, 4; shr.u32 s, s, t;")
        lines.append("shfl.sync.bfly.b32 t, s, 16, 31, -1; or.b32 $1, s, t;")
    else:
        lines.append("or.b32 $0, s, w;")
    lines.append(f"mov.b32 ${words}, n; mov.b32 ${words + 1}, d;")
    return "{" + "\n".join(lines) + "}"


def step_lines(pair: tuple[str, str], factor: str, j: int) -> list[str]:
    """Two coordinates to words m<j>, ones where negative, and q<j>, the middles of their fine cells."""
    return [
        f"fma.rm.f32 c, {pair[0]}, {factor}, {literal(FLOOR)}; mov.b32 l, c;",
        f"fma.rm.f32 c, {pair[1]}, {factor}, {literal(FLOOR)}; mov.b32 h, c;",
        f"prmt.b32 p, l, h, 0x5410; prmt.b32 m{j}, p, p, 0xBB99;",
        f"lop3.b32 q{j}, p, m{j}, 0x10001, 0xBE;",  # p ^ m | 1
    ]


def code_lines(curve: Curve, field: int, j: int, before: str) -> list[str]:
    """From q<j> to t<j>: two codes, below those in `before`, if that is not "", which move up."""
    lines, middle = [], f"q{j}"
    if curve.cell > FINE:
        keep, half = (x << 16 | x for x in (0x10000 - curve.cell, curve.cell // 2))
        lines.append(f"lop3.b32 x, q{j}, {keep:#x}, {half:#x}, 0xEA;")  # q & keep | half
        middle = "x"
    lines.append(f"mov.b32 k, {half2(curve.offset)}; fma.rn.sat.f16x2 u, {middle}, slope, k;")
    lines.append(f"mov.b32 h, {half2(curve.coefficients[-1])};")
    lines += [f"mov.b32 k, {half2(c)}; fma.rn.f16x2 h, h, u, k;" for c in curve.coefficients[-2::-1]]
    if before:
        up = 2.0**field
        lines.append(f"mov.b32 f, {half2(up)}; mov.b32 k, {half2((1 - up) * MAGIC)};")
        lines.append(f"fma.rn.f16x2 k, {before}, f, k;")
    else:
        lines.append(f"mov.b32 k, {half2(MAGIC)};")
    lines.append(f"fma.rn.f16x2 t{j}, h, u, k;")
    return lines
