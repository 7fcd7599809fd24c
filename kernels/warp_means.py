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

# Triton 3.9 calls it `reinterpret`; in 3.6 it begins with an underscore.
_Shared = gl.shared_memory_descriptor
reinterpret = getattr(_Shared, "reinterpret", None) or _Shared._reinterpret

SEGMENTS = gl.constexpr(16)  # rows of a product
PRODUCTS = gl.constexpr(4)  # of a run at most
MOST = SEGMENTS.value * PRODUCTS.value  # segments that a run may touch


@gluon.jit
def two_operands(ptr, exists, layout: gl.constexpr):
    """Rows at `ptr` `[rows, 4, 8]`, zeros unless they exist, as two operands `[rows, 16]`, or `[16, rows]`.

    Lane 4r + c takes the c-th 8 contiguous values: 4 for its places of each operand.
    """
    ROWS: gl.constexpr = ptr.shape[0]
    x = gl.load(ptr, mask=exists, other=0.0)
    a, b = gl.split(gl.permute(gl.reshape(x, [ROWS, 4, 2, 2, 2]), [0, 3, 1, 4, 2]))
    a, b = gl.reshape(a, [ROWS, 16]), gl.reshape(b, [ROWS, 16])
    if layout.operand_index == 1:
        a, b = gl.permute(a, [1, 0]), gl.permute(b, [1, 0])
    a = gl.convert_layout(a, layout, assert_trivial=True)
    return a, gl.convert_layout(b, layout, assert_trivial=True)


@gluon.jit
def rows_and_dims(ROWS: gl.constexpr):
    """Indices of rows, and of the dims of a first piece of 32, for `two_operands`."""
    LANES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [8, 4, 1], [1, 1, 1], [2, 1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LANES)))[:, None, None]
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, LANES)))[None, :, None]
    place = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, LANES)))[None, None, :]
    return row, lane * 8 + place


@gluon.jit
def load_raw_queries(
    ptr, first_row, rows, stride_h, stride_t, stride_d, DIM: gl.constexpr, HEADS: gl.constexpr,
    N: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Query rows as they came, as second operands [16, N]."""
    row, dim = rows_and_dims(N)
    row += first_row
    ptrs = ptr + (row % HEADS * stride_h + row // HEADS * stride_t) + dim * stride_d
    q = ()
    for i in gl.static_range(DIM // 32):
        exists = (row < rows) & (dim >= 0)
        q += two_operands(ptrs + 32 * i * stride_d, exists, gl.DotOperandLayout(1, MMA, 2))
    return q


@gluon.jit
def load_means(ptr, first, end, DIM: gl.constexpr, MMA: gl.constexpr):
    """Means of `SEGMENTS` segments from the `first`, those of slots before `end`, as first operands.

    Others are not read: they may be in the making, and a first-level cache would keep what they were.
    """
    row, dim = rows_and_dims(SEGMENTS)
    row += first
    means = ()
    for i in gl.static_range(DIM // 32):
        exists = (row * MEAN_OF < end) & (dim >= 0)
        means += two_operands(ptr + row * DIM + 32 * i + dim, exists, gl.DotOperandLayout(0, MMA, 2))
    return means


@gluon.jit
def score_means(means, ptr, q, first, end, scale, DIM: gl.constexpr, N: gl.constexpr, MMA: gl.constexpr):
    """Scores in base 2 of the segments from the `first` to that of slot `end` - 1, in shared memory.

    [PRODUCTS * SEGMENTS, N]; `means` are what `load_means` loads of these.
    """
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scores = gl.allocate_shared_memory(gl.float32, [PRODUCTS, SEGMENTS, N], PLAIN)
    for product in range(gl.cdiv(gl.cdiv(end, MEAN_OF) - first, SEGMENTS)):
        x = gl.zeros([SEGMENTS, N], gl.float32, MMA)
        for i in gl.static_range(DIM // 16):
            x = mma_v2(means[i], q[i], x)
        scores.index(product).store(x * (scale * LOG2_E))
        means = load_means(ptr, first + (product + 1) * SEGMENTS, end, DIM, MMA)
    return reinterpret(scores, gl.float32, [PRODUCTS * SEGMENTS, N], ROW)
