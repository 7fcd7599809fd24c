"""Codebooks: Lloyd-Max centroids of a standard normal, placed on the grid of fp8 e4m3.

After a random rotation each coordinate of a vector is nearly normal, so one codebook per bit width
serves every model (TurboQuant, arXiv 2504.19874; Lloyd-Max as in DRIVE/EDEN and HIGGS). Centroids
are fp8 e4m3 values so that a kernel turns a code into a tensor-core operand by a byte lookup; with
the scale free to move, the grid costs less than 0.2% of distortion.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

FP8_UNIT = 16.0  # e4m3 units per standard deviation of an 8-bit code: 448 is 28 deviations


@dataclass(frozen=True)
class Codebook:
    """Symmetric scalar quantiser of a standard normal.

    Attributes:
        magnitudes: positive centroids in e4m3 units, ascending; code = sign bit then index.
        unit: e4m3 units per standard deviation: a coordinate y is compared with
            `midpoints` after multiplication by `unit`.
        distortion: expected squared error per coordinate of variance 1, at the best scale.
    """

    magnitudes: tuple[float, ...]
    unit: float
    distortion: float

    @property
    def midpoints(self) -> tuple[float, ...]:
        """Decision boundaries between neighbouring magnitudes, in e4m3 units."""
        return tuple((a + b) / 2 for a, b in zip(self.magnitudes, self.magnitudes[1:], strict=False))

    @property
    def fp8_bytes(self) -> tuple[int, ...]:
        """The e4m3 bit patterns of `magnitudes`."""
        return tuple(_fp8_byte(m) for m in self.magnitudes)


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def _cumulative(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _lloyd_max(levels: int) -> list[float]:
    """Positive centroids of the optimal symmetric quantiser of N(0, 1) with `2 * levels` values."""
    centroids = [3.0 * (i + 0.5) / levels for i in range(levels)]
    for _ in range(5000):
        edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(centroids)), math.inf]
        new = [
            (_density(lo) - _density(hi)) / (_cumulative(hi) - _cumulative(lo))
            for lo, hi in itertools.pairwise(edges)
        ]
        moved = max(abs(a - b) for a, b in zip(new, centroids, strict=True))
        centroids = new
        if moved < 1e-13:
            break
    return centroids


def _fp8_byte(value: float) -> int:
    """Bit pattern of a positive normal e4m3 value (bias 7, 3 mantissa bits)."""
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2**exponent, mantissa in [0.5, 1)
    return (exponent - 1 + 7) << 3 | round((2 * mantissa - 1) * 8)


def _round_to_fp8(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 16) / 16, exponent)


def _distortion(magnitudes: list[float], unit: float) -> float:
    """Squared error of N(0, 1) with decision midpoints of `magnitudes / unit`, at the best scale."""
    edges = [0.0, *((a + b) / 2 / unit for a, b in itertools.pairwise(magnitudes))]
    edges.append(math.inf)
    dot = square = 0.0
    for centroid, lo, hi in zip(magnitudes, edges, edges[1:], strict=False):
        dot += 2 * centroid * (_density(lo) - _density(hi))
        square += 2 * centroid**2 * (_cumulative(hi) - _cumulative(lo))
    return 1 - dot * dot / square


@cache
def codebook(bits: int) -> Codebook:
    """The codebook of 2, 3 or 4 bits: the e4m3 rounding of scaled Lloyd-Max with least distortion.

    Deterministic: the same on every machine, a pure function of `bits`.
    """
    exact = _lloyd_max(2 ** (bits - 1))
    candidates = (2 ** (i / 2000) for i in range(2000))  # the grid repeats every octave
    best: Codebook | None = None
    for unit in candidates:
        magnitudes = [_round_to_fp8(unit * c) for c in exact]
        if len(set(magnitudes)) < len(magnitudes):
            continue
        error = _distortion(magnitudes, unit)
        if best is None or error < best.distortion:
            best = Codebook(tuple(magnitudes), unit, error)
    assert best is not None
    return best
