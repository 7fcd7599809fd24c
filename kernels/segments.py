"""Which segment's mean of keys a position has: `beside` has the rules."""

import triton.language as tl

from ..beside import DECODE_TOKENS, SEGMENT

MEAN_OF = tl.constexpr(SEGMENT)
FEW = tl.constexpr(DECODE_TOKENS)  # tokens of a store that sets means by itself
