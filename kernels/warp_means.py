"""The scores of the means of keys for `decode_warp`: a warp scores those of the segments of its run.

16 segments by one product, from the query rows as they came, so before the launch that rotates them is
done. They lie in shared memory, from where each tile takes that of its segment: a branch where a segment
starts would cut the loop in two, which costs more.
Bytes: a mean for each segment of a run, which is at most 0.8% of what is read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .scores import LOG2_E
from .segments import MEAN_OF

SEGMENTS = gl.constexpr(16)  # rows of a product
PRODUCTS = gl.constexpr(4)  # of a run at most
MOST = SEGMENTS.value * PRODUCTS.value  # segments that a run may touch


@gluon.jit
def two_operands(ptr, exists, layout: gl.constexpr):
    """Rows at `ptr` `[rows, 4, 8]`, zeros unless they exist, as two first operands `[rows, 16]`.

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
def score_means(
    q_ptr, mean_ptr, first, end, first_row, rows, stride_h, stride_t, stride_d, scale, DIM: gl.constexpr,
    HEADS: gl.constexpr, N: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Scores in base 2 of the means of segments from that of slot `first` to that of `end` - 1.

    In shared memory, [PRODUCTS * SEGMENTS, N]. Others are not read: they may be in the making, and a
    first-level cache would keep what they were.
    """
    FIRST: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    LANES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [8, 4, 1], [1, 1, 1], [2, 1, 0])
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, LANES)))[None, :, None]
    place = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, LANES)))[None, None, :]
    dim = lane * 8 + place
    row = first_row + gl.arange(0, N, layout=gl.SliceLayout(1, gl.SliceLayout(2, LANES)))[:, None, None]
    q_ptrs = q_ptr + (row % HEADS * stride_h + row // HEADS * stride_t) + dim * stride_d
    q = ()
    for i in gl.static_range(DIM // 32):
        q += two_operands(q_ptrs + 32 * i * stride_d, (row < rows) & (dim >= 0), SECOND)

    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    scores = gl.allocate_shared_memory(gl.float32, [PRODUCTS, SEGMENTS, N], PLAIN)
    segment = gl.arange(0, SEGMENTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LANES)))[:, None, None]
    segment += first // MEAN_OF
    for product in range(gl.cdiv(gl.cdiv(end, MEAN_OF) - first // MEAN_OF, SEGMENTS)):
        mean_ptrs = mean_ptr + (segment * DIM + dim)
        x = gl.zeros([SEGMENTS, N], gl.float32, MMA)
        for i in gl.static_range(DIM // 32):
            mean = two_operands(mean_ptrs + 32 * i, (segment * MEAN_OF < end) & (dim >= 0), FIRST)
            x = mma_v2(mean[1], q[2 * i + 1], mma_v2(mean[0], q[2 * i], x))
        scores.index(product).store(x * (scale * LOG2_E))
        segment += SEGMENTS
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return scores._reinterpret(gl.float32, [PRODUCTS * SEGMENTS, N], ROW)
