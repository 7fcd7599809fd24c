"""Codebooks: the best quantisers of a rotated coordinate whose centroids are fp8 e4m3 values.

After a random rotation each coordinate of a vector is nearly normal, so one codebook per bit width
serves every model (TurboQuant, arXiv 2504.19874; optimal scalar codebooks as in DRIVE/EDEN and HIGGS).
Centroids are fp8 e4m3 values so that a kernel turns a code into a tensor-core operand by a byte lookup;
with the scale free to move, the grid costs up to 0.9% of distortion.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

FP8_UNIT = 16.0  # e4m3 units per standard deviation of an 8-bit code: 448 is 28 deviations


@dataclass(frozen=True)
class Codebook:
    """Symmetric scalar quantiser of a coordinate of variance 1.

    Attributes:
        magnitudes: positive centroids in e4m3 units, ascending; code = sign bit then index.
        unit: e4m3 units per standard deviation: a coordinate y is compared with
            `midpoints` after multiplication by `unit`.
    """

    magnitudes: tuple[float, ...]
    unit: float

    @property
    def midpoints(self) -> tuple[float, ...]:
        """Decision boundaries between neighbouring magnitudes, in e4m3 units."""
        return tuple((a + b) / 2 for a, b in itertools.pairwise(self.magnitudes))

    @property
    def fp8_bytes(self) -> tuple[int, ...]:
        """The e4m3 bit patterns of `magnitudes`."""
        return tuple(_fp8_byte(m) for m in self.magnitudes)


# No other magnitudes of the grid have less distortion on the unit sphere at D=128: tests/test_codec.py
# searches all of them. The units are the best for these and the least-squares scale, but at 4 bits: 1.11
# would gain 0.2% there, and code constant vectors 40% worse at D=32 and 30% at D=64.
CODEBOOKS = {
    2: Codebook((0.5625, 1.875), 1.242),
    3: Codebook((0.375, 1.125, 2.0, 3.25), 1.52),
    4: Codebook((0.140625, 0.40625, 0.6875, 1.0, 1.375, 1.75, 2.25, 3.0), 1.09),
}


def _fp8_byte(value: float) -> int:
    """Bit pattern of a positive normal e4m3 value (bias 7, 3 mantissa bits)."""
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2**exponent, mantissa in [0.5, 1)
    return (exponent - 1 + 7) << 3 | round((2 * mantissa - 1) * 8)


def codebook(bits: int) -> Codebook:
    """The codebook of 2, 3 or 4 bits."""
    return CODEBOOKS[bits]
