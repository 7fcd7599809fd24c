"""PTX that encodes rotated coordinates for `store_prompt`: codes without comparisons, sums for the scale.

The magnitude of a code is a polynomial through the midpoints of the codebook, at the i-th of them i - 1/2,
rounded: one multiply-add a midpoint, the last of which rounds since it adds to 2**23, whose last bit
is 1. The same sum puts the codes before it four bits further, so that packing is one multiply-add a code.
Sums for the scale are exact integers: centroids are multiples of 1/64 below 4, a byte each, looked up by
the packed codes, and coordinates are multiples of a small fraction of one in e4m3 units, in 16 bits.

Codes of 8 bits are what an instruction makes of coordinates; `store_prompt` sums them in float32.
"""

import functools
import math
import struct

import torch
import triton

from ..codebook import codebook

CENTROID_STEPS = 64.0  # of 1 in e4m3 units: every centroid is a whole number of steps
MAGIC = 2.0**23
MARGIN = 0.25  # the polynomial ends so far before it would round to one more than the largest code


def code_polynomial(bits: int) -> tuple[float, float, tuple[float, ...]]:
    """`(start, width, coefficients)` of the magnitude code of x >= 0, which is in e4m3 units.

    The code is `round(c0 u + c1 u**2 + ...)` with u = (x - start) / width, held within 0 and 1.
    """
    midpoints = codebook(bits).midpoints
    targets = [i + 0.5 for i in range(len(midpoints))]
    points = ((0.0, *midpoints), [0.0, *targets]) if len(midpoints) == 1 else (midpoints, targets)
    x, y = (torch.tensor(values, dtype=torch.float64) for values in points)
    fitted = torch.linalg.solve(torch.vander(x), y).tolist()

    def where(target: float, low: float, high: float) -> float:
        for _ in range(60):  # halve; the polynomial rises
            middle = (low + high) / 2
            value = functools.reduce(lambda total, c: total * middle + c, fitted)
            low, high = (low, middle) if value > target else (middle, high)
        return low

    start = where(0.0, 0.0, midpoints[0])
    width = where(targets[-1] + 1 - MARGIN, midpoints[-1], 3 * midpoints[-1]) - start
    u = (torch.tensor(midpoints, dtype=torch.float64) - start) / width
    powers = u[:, None] ** torch.arange(1, max(2, len(midpoints)))
    solution = torch.linalg.lstsq(powers, torch.tensor(targets, dtype=torch.float64)[:, None]).solution
    return start, width, tuple(solution[:, 0].tolist())


def code_steps(bits: int, dim: int) -> tuple[float, float]:
    """Steps of 1 in e4m3 units that `encode_asm` counts coordinates and centroids in; 1 for 8 bits.

    The first is a power of two with which the largest coordinate fits 15 bits.
    """
    if bits == 8:
        return 1.0, 1.0
    return 2.0 ** math.floor(math.log2(32767 / codebook(bits).largest(dim))), CENTROID_STEPS


def literal(value: float) -> str:
    """A float32 constant of PTX."""
    return "0f" + struct.pack(">f", value).hex().upper()


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
    The sums are integers in steps. NaN gets code 0. Nothing for 8 bits.
    """
    if bits == 8:
        return ""
    count, words = dim // 16, words_of_call(bits, dim)
    inputs = [f"${words + 2 + i}" for i in range(count)]
    order, factor = field_order(bits, dim), f"${words + 2 + count}"
    field = 2 if bits == 3 else bits
    members = [(inputs[i], f"q{i}") for i in order]
    lines = [".reg .f32 g, u, h, c; .reg .b32 s, w, z0, z1, t, a, b, p, n, d;"]
    lines.append(".reg .b32 " + ", ".join(steps for _, steps in members) + "; mov.b32 z1, 0;")
    half = 16 // field
    for part in range(0, count, half):
        lines += magnitude_lines(bits, dim, field, members[part : part + half], factor, f"z{part // half}")
    lines.append("prmt.b32 w, z0, z1, 0x5410; mov.b32 n, 0; mov.b32 d, 0;")
    low, high = table_words(bits)
    for part in range(count // 4):  # four fields one after the other, or of 2 bits every second
        chosen = [steps for _, steps in (members[4 * part :][:4] if field == 4 else members[part::2])]
        lines.append(f"shr.u32 t, w, {16 * part if field == 4 else 2 * part};")
        if field == 2:
            lines.append("and.b32 t, t, 0x3333;")
        lines.append(f"prmt.b32 a, {low:#x}, {high:#x}, t; dp4a.u32.u32 d, a, a, d;")
        lines.append(f"prmt.b32 p, {chosen[0]}, {chosen[1]}, 0x5410; dp2a.lo.u32.u32 n, p, a, n;")
        lines.append(f"prmt.b32 p, {chosen[2]}, {chosen[3]}, 0x5410; dp2a.hi.u32.u32 n, p, a, n;")
    lines.append(f"mov.b32 s, {members[-1][0]};")
    lines += [f"mov.b32 t, {x}; shf.l.wrap.b32 s, t, s, {field};" for x, _ in reversed(members)]
    signs = sum(1 << field * i + field - 1 for i in range(count))
    if bits == 3:  # to the lower of each two bits, and in lanes from 16 on to the upper
        lines.append(f"mov.b32 $0, w; and.b32 s, s, {signs:#x}; mov.u32 t, %laneid; and.b32 t, t, 16;")
        lines.append("xor.b32 t, t, 16; shr.u32 t, t, 4; shr.u32 s, s, t;")
        lines.append("shfl.sync.bfly.b32 t, s, 16, 31, -1; or.b32 $1, s, t;")
    else:
        lines.append(f"lop3.b32 $0, s, {signs:#x}, w, 0xEA;")
    lines.append(f"mov.b32 ${words}, n; mov.b32 ${words + 1}, d;")
    return "{" + "\n".join(lines) + "}"


def magnitude_lines(
    bits: int, dim: int, field: int, members: list[tuple[str, str]], factor: str, result: str
) -> list[str]:
    """The magnitudes of `members` to the low bits of `result`, each coordinate in steps to its second."""
    start, width, coefficients = code_polynomial(bits)
    scale = literal(1 / (width * code_steps(bits, dim)[0]))
    lines = [f"mov.b32 {result}, {literal(MAGIC)};"]
    for x, steps in reversed(members):
        lines.append(f"abs.f32 g, {x}; mul.rn.f32 g, g, {factor};")
        lines.append(f"add.rn.f32 c, g, {literal(MAGIC)}; mov.b32 {steps}, c;")
        lines.append(f"fma.rn.sat.f32 u, g, {scale}, {literal(-start / width)};")
        lines.append(f"mov.f32 h, {literal(coefficients[-1])};")
        lines += [f"fma.rn.f32 h, h, u, {literal(c)};" for c in coefficients[-2::-1]]
        lines.append(f"mov.b32 c, {result};")
        if (x, steps) != members[-1]:  # the codes so far move up
            lines.append(f"fma.rn.f32 c, c, {literal(1 << field)}, {literal((1 - (1 << field)) * MAGIC)};")
        lines.append(f"fma.rn.f32 c, h, u, c; mov.b32 {result}, c;")
    return lines
