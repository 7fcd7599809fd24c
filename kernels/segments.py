"""Which segment's mean of keys a position has: `beside` has the rules."""

import triton
import triton.language as tl

from ..beside import DECODE_TOKENS, SEGMENT

MEAN_OF = tl.constexpr(SEGMENT)
FEW = tl.constexpr(DECODE_TOKENS)


@triton.jit
def mean_source(position, start, new):
    """(segment of a position, which segment's mean a store finds there), -1: zero.

    A store of a few tokens, from `start`, takes over the mean of the segment before for one that it starts.
    """
    segment = position // MEAN_OF
    starts = (segment * MEAN_OF >= start) & (new <= FEW)
    return segment, tl.where(starts, segment - 1, segment)
