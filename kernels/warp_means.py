"""The scores of the means of keys for `decode_warp`: a warp scores those of the segments that it sees.

For 16 segments by one product, and from the query rows as they came, so before the launch that rotates them
is done.
Bytes: a mean for each segment of a run, which is at most 0.8% of what is read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .scores import LOG2_E
from .segments import MEAN_OF

SEGMENTS = gl.constexpr(16)  # rows of a product


@gluon.jit
def score_means(
    q_ptr, mean_ptr, block, first, end, first_row, rows, stride_h, stride_t, stride_d, scale,
    DIM: gl.constexpr, HEADS: gl.constexpr, N: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Scores in base 2 of the means of `SEGMENTS` segments, block `block` of a row: [SEGMENTS, N].

    Only those of slots `first` .. `end` - 1 are read: others may be in the making, and a first-level cache
    would keep what they were.
    """
    FIRST: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    segment = block * SEGMENTS + gl.arange(0, SEGMENTS, layout=gl.SliceLayout(1, FIRST))
    known = (segment >= first // MEAN_OF) & (segment * MEAN_OF < end)
    dim = gl.arange(0, 16, layout=gl.SliceLayout(0, FIRST))[None, :]
    mean_ptrs = mean_ptr + (segment[:, None] * DIM + dim)
    row = first_row + gl.arange(0, N, layout=gl.SliceLayout(0, SECOND))
    q_dim = gl.arange(0, 16, layout=gl.SliceLayout(1, SECOND))[:, None]
    q_ptrs = q_ptr + (row % HEADS * stride_h + row // HEADS * stride_t)[None, :] + q_dim * stride_d
    x = gl.zeros([SEGMENTS, N], gl.float32, MMA)
    for i in gl.static_range(DIM // 16):
        mean = gl.load(mean_ptrs + 16 * i, mask=known[:, None] & (dim >= 0), other=0.0)
        q = gl.load(q_ptrs + 16 * i * stride_d, mask=(row < rows)[None, :] & (q_dim >= 0), other=0.0)
        x = mma_v2(mean, q, x)
    return x * (scale * LOG2_E)


@gluon.jit
def score_of(means, start, MMA: gl.constexpr):
    """Of the rows of `score_means`, that of the segment of slot `start`: [N]."""
    segment = gl.arange(0, SEGMENTS, layout=gl.SliceLayout(1, MMA))[:, None]
    return gl.sum(gl.where(segment == start // MEAN_OF % SEGMENTS, means, 0.0), axis=0)
