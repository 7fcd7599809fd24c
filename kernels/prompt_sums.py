"""Sums over lanes in `store_prompt`, by which each lane has one token at the end, not all have all four.

A lane of a product, 4r + c, has two of 16 dims of tokens 4c to 4c + 3. The lanes 16 away take two tokens
each, those 8 away one, for what they give; the lane 4 away has the same token. So the sums of four tokens
are 4 shuffles, not 12, and what follows is computed once for a token. `to_columns` spreads it again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import float32, int32

SMALL, LARGE = gl.constexpr(2.0**-80), gl.constexpr(2.0**80)  # squares between these are exact enough
SPREAD = gl.constexpr(
    " ".join(f"shfl.sync.idx.b32 ${i}, $4, {8 * (i % 2) + 16 * (i // 2)}, 0x71f, -1;" for i in range(4))
)


@gluon.constexpr_function
def exchange_asm(lanes: int) -> str:
    return f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, -1;"


@gluon.jit
def from_other(x, LANES: gl.constexpr):
    """`x` of the lane that is `LANES` away."""
    ASM: gl.constexpr = exchange_asm(LANES)
    TYPES: gl.constexpr = "=f,f" if x.dtype == float32 else "=r,r"
    return gl.inline_asm_elementwise(ASM, TYPES, [x], x.dtype, True, 1)


@gluon.jit
def combine(a, b, MAXIMUM: gl.constexpr):
    return gl.maximum(a, b) if MAXIMUM else a + b


@gluon.jit
def rows_and_tokens(LANES: gl.constexpr):
    """Of `over_rows`' results [8, 4]: the row of each, and which of the 16 tokens it is."""
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, LANES))[:, None]
    column = gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))[None, :]
    return row + 0 * column, row // 2 + 4 * column


@gluon.jit
def over_rows(x, MAXIMUM: gl.constexpr):
    """Sums, or maxima, of the columns of x [16, 16], a product: [8, 4], of two rows the same token."""
    low, high = gl.split(gl.permute(gl.reshape(x, [2, 8, 2, 4, 2]), [0, 1, 3, 4, 2]))
    u = ()
    for t in gl.static_range(4):  # the tokens of a lane
        pair = gl.split(low if t < 2 else high)
        u += (gl.max(pair[t % 2], axis=0) if MAXIMUM else gl.sum(pair[t % 2], axis=0),)
    LANES: gl.constexpr = u[0].type.layout
    row, _ = rows_and_tokens(LANES)
    far, near = (row & 4) != 0, (row & 2) != 0
    a = combine(gl.where(far, u[2], u[0]), from_other(gl.where(far, u[0], u[2]), 16), MAXIMUM)
    b = combine(gl.where(far, u[3], u[1]), from_other(gl.where(far, u[1], u[3]), 16), MAXIMUM)
    a = combine(gl.where(near, b, a), from_other(gl.where(near, a, b), 8), MAXIMUM)
    return combine(a, from_other(a, 4), MAXIMUM)


@gluon.jit
def to_columns(x, MMA: gl.constexpr):
    """[8, 4] as from `over_rows` -> [16, 16], each row all tokens."""
    t = gl.inline_asm_elementwise(
        SPREAD, "=&f,=&f,=&f,=f,f", [x], (float32, float32, float32, float32), True, 1
    )
    y = gl.join(gl.join(t[0], t[1]), gl.join(t[2], t[3]))
    y = gl.permute(gl.join(y, y), [4, 0, 3, 1, 2])
    return gl.convert_layout(gl.reshape(y, [16, 16]), MMA, assert_trivial=True)


@gluon.jit
def squares_of(y, COUNT: gl.constexpr):
    """Of each column, what a lane has."""
    total = y[0] * y[0]
    for i in gl.static_range(1, COUNT):
        total += y[i] * y[i]
    return total


@gluon.jit
def largest_of(y, COUNT: gl.constexpr):
    largest = gl.abs(y[0])
    for i in gl.static_range(1, COUNT):
        largest = gl.maximum(largest, gl.abs(y[i]))
    return largest


@gluon.jit
def to_ordinary(y, COUNT: gl.constexpr, MMA: gl.constexpr):
    """Vectors over a power of two, with squares from SMALL to LARGE; squares, peak as int32, that power.

    Of a vector with NaN or infinity 0, and NaN for the power.
    """
    squares, peak = over_rows(squares_of(y, COUNT), False), over_rows(largest_of(y, COUNT), True)
    broken = (squares != squares) | (peak == float("inf"))  # a maximum may drop NaN
    exponent = gl.minimum(gl.maximum(peak.to(int32, bitcast=True) >> 23, 1), 253)
    unit = gl.where(broken, float("nan"), (exponent << 23).to(float32, bitcast=True))
    inverse = (254 - exponent << 23).to(float32, bitcast=True)
    inverse = to_columns(gl.where(broken, float("nan"), inverse), MMA)
    z = ()
    for i in gl.static_range(COUNT):
        z += (gl.where(inverse != inverse, 0.0, y[i] * inverse),)
    peak = over_rows(largest_of(z, COUNT), True).to(int32, bitcast=True)
    return z, gl.maximum(over_rows(squares_of(z, COUNT), False), SMALL), peak, unit
