"""Rows of 16-bit numbers in memory as operands of a warp's tensor cores, of the 16 bytes that a lane loads.

Any dims may be at the places of a sum, as long as both operands agree.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def by_vectors(vectors: int, dim: int):
    """Lane 4r + c: of vectors r and r + 8 the dims 8c .. 8c + 7 of every 32."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[0, d] for d in (32, 64, 128) if d < dim]
    registers += [[8, 0]] if vectors == 16 else []
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [vectors, dim])


@gluon.jit
def load_rows(
    ptr, first, rows, stride_h, stride_t, stride_d, ROWS: gl.constexpr, DIM: gl.constexpr,
    HEADS: gl.constexpr,
):  # fmt: skip
    """Query rows `first` .. of a KV head, `by_vectors` [ROWS, DIM], past the first-level cache.

    Rows are token-major, the heads of a group fastest; zero for rows from `rows` on.
    """
    LAYOUT: gl.constexpr = by_vectors(ROWS, DIM)
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + (row % HEADS).to(gl.int64) * stride_h + (row // HEADS).to(gl.int64) * stride_t
    mask = (row < rows)[:, None] & (dim >= 0)[None, :]
    return gl.load(ptrs[:, None] + dim[None, :] * stride_d, mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def first_operand(x, layout: gl.constexpr):
    """Vectors `by_vectors` [vectors, dim] with dims as a sum has them: of every 32, eight of a lane."""
    VECTORS: gl.constexpr = x.shape[0]
    DIM: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [VECTORS, DIM // 32, 4, 2, 2, 2]), [0, 1, 3, 4, 2, 5])
    return gl.convert_layout(gl.reshape(x, [VECTORS, DIM]), layout, assert_trivial=True)


@gluon.jit
def second_operand(x, layout: gl.constexpr):
    """Like `first_operand`, but [dim, vectors]."""
    VECTORS: gl.constexpr = x.shape[0]
    DIM: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [VECTORS, DIM // 32, 4, 2, 2, 2]), [1, 3, 4, 2, 5, 0])
    return gl.convert_layout(gl.reshape(x, [DIM, VECTORS]), layout, assert_trivial=True)
