"""PTX that encodes rotated coordinates for `store_prompt`: codes without comparisons, sums for the scale.

The magnitude of a code is a polynomial through the midpoints of the codebook, at the i-th of them i - 1/2,
rounded: one multiply-add a midpoint, the last of which rounds since it adds to 2**23, whose last bit
is 1. The same sum puts the codes before it four bits further, so that packing is one multiply-add a code.
Sums for the scale are exact integers: centroids are multiples of 1/64 below 4, a byte each, looked up by
the packed codes, and coordinates are multiples of a small fraction of one in e4m3 units, in 16 bits.
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
    """Steps of 1 in e4m3 units that `encode_asm` counts coordinates and centroids in.

    The first is a power of two with which the largest coordinate fits 15 bits.
    """
    largest = codebook(bits).unit * dim**0.5
    return 2.0 ** math.floor(math.log2(32767 / largest)), CENTROID_STEPS


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
    """Words of codes that `encode_asm` gives; a single one may hold two bytes only."""
    return max(1, dim // 16 * bits // 32)


def field_order(bits: int, dim: int) -> list[int]:
    """Which of `encode_asm`'s inputs is each code of the result, from the lowest bits."""
    chunks, codes = dim // 32, 8 // bits
    apart = chunks // codes  # chunks between the codes of a byte
    return [2 * (code * apart + byte // 2) + byte % 2 for byte in range(2 * apart) for code in range(codes)]


@functools.cache
def encode_asm(bits: int, dim: int) -> str:
    """PTX: coordinates 2q + e, e = 0 or 1, of chunk q of 32 dims -> their codes and sums for the scale.

    Operands: `words_of_call` words of codes in the order of `field_order`, two sums (of coordinate times
    centroid, of squares of centroids), `dim / 16` coordinates and what takes them to steps. The sums are
    integers in steps. NaN gets code 0.
    """
    count, words = dim // 16, words_of_call(bits, dim)
    numerator, square = f"${words}", f"${words + 1}"
    inputs = [f"${words + 2 + i}" for i in range(count)]
    factor = f"${words + 2 + count}"
    order = field_order(bits, dim)
    start, width, coefficients = code_polynomial(bits)
    steps, _ = code_steps(bits, dim)
    scale, shift = literal(1 / (width * steps)), literal(-start / width)
    lines = [".reg .f32 g, u, h, c; .reg .b32 s, w, z0, z1, t, a, b, p, n, d;"]
    lines.append(".reg .b32 " + ", ".join(f"q{i}" for i in range(count)) + ";")
    fields = 32 // bits  # of a word
    lines.append("mov.b32 n, 0; mov.b32 d, 0;")
    for word in range(words):
        members = order[word * fields : (word + 1) * fields]
        half = 16 // bits
        for part in range(0, len(members), half):
            for i, member in enumerate(reversed(members[part : part + half])):
                lines.append(f"abs.f32 g, {inputs[member]}; mul.rn.f32 g, g, {factor};")
                lines.append(f"add.rn.f32 c, g, {literal(MAGIC)}; mov.b32 q{member}, c;")
                lines.append(f"fma.rn.sat.f32 u, g, {scale}, {shift};")
                lines.append(f"mov.f32 h, {literal(coefficients[-1])};")
                lines += [f"fma.rn.f32 h, h, u, {literal(c)};" for c in coefficients[-2::-1]]
                if i == 0:
                    lines.append(f"mov.f32 c, {literal(MAGIC)};")
                else:  # the codes so far move up
                    up = 1 << bits
                    lines.append(f"mov.b32 c, z{part // half};")
                    lines.append(f"fma.rn.f32 c, c, {literal(up)}, {literal((1 - up) * MAGIC)};")
                lines.append(f"fma.rn.f32 c, h, u, c; mov.b32 z{part // half}, c;")
        top = "z1" if len(members) > half else "0"
        lines.append(f"prmt.b32 w, z0, {top}, 0x5410;")
        low, high = table_words(bits)
        for part in range(0, len(members), 4):  # fields part, part + 1, .. or, of 2 bits, every second
            if bits == 4:
                chosen = members[part : part + 4]
                lines.append(f"shr.u32 t, w, {4 * part};" if part else "mov.b32 t, w;")
            else:
                chosen = members[part // 8 * 8 + part // 4 % 2 :: 2][:4]
                lines.append(f"shr.u32 t, w, {part // 8 * 16 + part // 4 % 2 * 2}; and.b32 t, t, 0x3333;")
            lines.append(f"prmt.b32 a, {low:#x}, {high:#x}, t; dp4a.u32.u32 d, a, a, d;")
            for pair, side in ((chosen[:2], "lo"), (chosen[2:], "hi")):
                lines.append(f"prmt.b32 p, q{pair[0]}, q{pair[1]}, 0x5410; dp2a.{side}.u32.u32 n, p, a, n;")
        lines.append(f"mov.b32 s, {inputs[members[-1]]};")
        for member in reversed(members):
            lines.append(f"mov.b32 t, {inputs[member]}; shf.l.wrap.b32 s, t, s, {bits};")
        signs = sum(1 << bits - 1 << bits * i for i in range(len(members)))
        lines.append(f"lop3.b32 ${word}, s, {signs:#x}, w, 0xEA;")
    lines.append(f"mov.b32 {numerator}, n; mov.b32 {square}, d;")
    return "{" + "\n".join(lines) + "}"
