"""The scores of the means of keys for `decode_warp`: a warp scores those of the segments of its run.

16 segments by one product, from the query rows as they came. They lie in shared memory, from where each
tile takes that of its segment: a branch where a segment starts would cut the loop in two, which costs more.
What the first product needs is on its way before the launch that rotates the queries is done.
Bytes: a mean for each segment of a run, which is at most 0.8% of what is read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .scores import LOG2_E
from .segments import MEAN_OF
from .warp_operands import by_vectors, first_operand, second_operand

# Triton 3.9 calls it `reinterpret`; in 3.6 it begins with an underscore.
_Shared = gl.shared_memory_descriptor
reinterpret = getattr(_Shared, "reinterpret", None) or _Shared._reinterpret

SEGMENTS = gl.constexpr(16)  # rows of a product
PRODUCTS = gl.constexpr(4)  # of a run at most
MOST_SEGMENTS = SEGMENTS.value * PRODUCTS.value  # that a run may touch


@gluon.jit
def load_means(ptr, first, end, DIM: gl.constexpr):
    """Means of `SEGMENTS` segments from the `first`, those of slots before `end`, `by_vectors`.

    Others are not read: they may be in the making, and a first-level cache would keep what they were.
    """
    LAYOUT: gl.constexpr = by_vectors(SEGMENTS, DIM)
    segment = first + gl.arange(0, SEGMENTS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(ptr + segment * DIM + dim, mask=(segment * MEAN_OF < end) & (dim >= 0), other=0.0)


@gluon.jit
def score_means(means, ptr, q, first, end, scale, DIM: gl.constexpr, N: gl.constexpr, MMA: gl.constexpr):
    """Scores in base 2 of the segments from the `first` to that of slot `end` - 1, in shared memory.

    [PRODUCTS * SEGMENTS, N]; `means` are what `load_means` loads of these, `q` what `load_rows` does.
    """
    FIRST: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scores = gl.allocate_shared_memory(gl.float32, [PRODUCTS, SEGMENTS, N], PLAIN)
    q = second_operand(q, gl.DotOperandLayout(1, MMA, 2))
    for product in range(gl.cdiv(gl.cdiv(end, MEAN_OF) - first, SEGMENTS)):
        x = mma_v2(first_operand(means, FIRST), q, gl.zeros([SEGMENTS, N], gl.float32, MMA))
        scores.index(product).store(x * (scale * LOG2_E))
        means = load_means(ptr, first + (product + 1) * SEGMENTS, end, DIM)
    return reinterpret(scores, gl.float32, [PRODUCTS * SEGMENTS, N], ROW)
