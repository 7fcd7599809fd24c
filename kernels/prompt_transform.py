"""The transform of `store_prompt`: 16 vectors copied to shared memory, rotated on the tensor cores.

The Hadamard matrix of D is one of 16, over bits 0, 2, 3, 4 of a dim, for the tensor cores, and one of
D / 16, over bit 1 and those from 5 on, for sums and differences of what they give. The inputs are exact
(bf16 or float16 values; signs over D), sums are in float32. Dims are the rows of a product and tokens its
columns. With these bits a lane, 4r + c, reads 16 bytes of a token at once, and gets all dims that share a
byte of a row, bytes 4r to 4r + 3 of every 32, of 4 tokens, 4c to 4c + 3.

A program is one warp: nobody else has its shared memory, and a copy of it is in flight for one group only.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import int32
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..format import PAGE_ALIGNMENT
from .warp_tiles import async_load

TOKENS = gl.constexpr(PAGE_ALIGNMENT)  # of a group


@gluon.constexpr_function
def load_layout(tokens: int):
    """[tokens, 32 dims] with 8 dims of a token in a lane, as the second operand of a product needs them."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[8, 0]] * (tokens // 16)
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [tokens, 32])


@gluon.jit
def token_of(column):
    """Which token of a group a column of the products is: a lane has columns 2c and 2c + 1 of every 8."""
    return column % 8 // 2 * 4 + column // 8 * 2 + column % 2


@gluon.jit
def transform_operands(rotation_ptr, dtype: gl.constexpr, DIM: gl.constexpr, MMA: gl.constexpr):
    """First operands [16, 16], one for each 16 dims: the signed Hadamard matrix over DIM.

    Row m stands for dim 4 * (m % 8) + m // 8, column k for dims of bits 3, 4, 0, 2, the highest last.
    """
    FIRST: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    m = gl.arange(0, 16, layout=gl.SliceLayout(1, FIRST))[:, None]
    k = gl.arange(0, 16, layout=gl.SliceLayout(0, FIRST))[None, :]
    odd = (m >> 3 & k) ^ (m >> 2 & k >> 2) ^ (m >> 1 & k >> 1) ^ (m & k >> 3)
    dim = (k >> 1 & 3) * 8 + (k >> 3) * 4 + (k & 1) + 0 * m
    operands = ()
    for i in gl.static_range(DIM // 16):
        sign = gl.load(rotation_ptr + (dim + (i // 2 * 32 + i % 2 * 2)) * DIM)  # of the first column
        operands += (gl.where((sign < 0) ^ (odd & 1 == 1), -1.0 / DIM, 1.0 / DIM).to(dtype),)
    return operands


@gluon.jit
def products(ptr, operands, DIM: gl.constexpr, MMA: gl.constexpr):
    """Vectors at `ptr` [columns, 32] and every 32 further: [16, columns] for each 16 dims."""
    N: gl.constexpr = ptr.shape[0]
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    y = ()
    for i in gl.static_range(DIM // 32):
        x = gl.load(ptr + 32 * i)
        x = gl.permute(gl.reshape(x, [N, 4, 2, 2, 2]), [2, 1, 4, 0, 3])
        pair = gl.split(x)  # bit 1 of a dim
        for bit in gl.static_range(2):
            operand = gl.convert_layout(gl.reshape(pair[bit], [16, N]), SECOND, assert_trivial=True)
            y += (mma_v2(operands[2 * i + bit], operand, gl.zeros([16, N], gl.float32, MMA)),)
    return y


@gluon.constexpr_function
def staged_layout():
    """[16 tokens, 64 dims] of shared memory: 8 dims of a token in a lane, tokens as of `token_of`."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 32], [2, 0]]
    return gl.DistributedLinearLayout(
        registers, [[0, 8], [0, 16], [1, 0], [4, 0], [8, 0]], [], [], [16, 64]
    )


@gluon.jit
def group_memory(dtype: gl.constexpr, DIM: gl.constexpr):
    """Shared memory for 16 vectors in pieces of 64 dims; swizzled, so that banks meet neither way."""
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(32, 1, 2, [1, 0])
    return gl.allocate_shared_memory(dtype, [DIM // 64, TOKENS, 64], SWIZZLED)


@gluon.jit
def copy_group(shared, x_ptr, first, stop, new, stride_t):
    """Start copying the tokens from `first`, if that is before `stop`, to `group_memory`.

    Nothing is read outside the `new` tokens: where there is none, another, whose row is not written. By 16
    bytes a lane, 128 of a token side by side: `x_ptr` and `stride_t` must be multiples of that.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    PIECES: gl.constexpr = shared.shape[0]
    token = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, LANES))
    dims = gl.arange(0, 64, layout=gl.SliceLayout(0, LANES))[None, :]
    ptr = x_ptr + gl.minimum(gl.maximum(token, 0), new - 1).to(gl.int64)[:, None] * stride_t + dims
    mask = (first + 0 * token)[:, None] + 0 * dims < stop
    for i in gl.static_range(PIECES):
        async_load(shared.index(i), ptr + 64 * i, mask=mask)
    async_copy.commit_group()


@gluon.jit
def group_products(shared, operands, MMA: gl.constexpr):
    """`products` of the group that `copy_group` copied, once that is done."""
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    PIECES: gl.constexpr = shared.shape[0]
    async_copy.wait_group(0)
    tiles = ()
    for i in gl.static_range(PIECES):
        x = shared.index(i).load(staged_layout())
        x = gl.permute(gl.reshape(x, [4, 2, 2, 2, 4, 2, 2, 2]), [5, 4, 7, 1, 0, 2, 3, 6])
        even, odd = gl.split(x)  # bit 1 of a dim
        e0, e1 = gl.split(even)
        o0, o1 = gl.split(odd)
        tiles += (e0, o0, e1, o1)
    y = ()
    for i in gl.static_range(4 * PIECES):
        operand = gl.convert_layout(gl.reshape(tiles[i], [16, TOKENS]), SECOND, assert_trivial=True)
        y += (mma_v2(operands[i], operand, gl.zeros([16, TOKENS], gl.float32, MMA)),)
    return y


@gluon.jit
def last_butterflies(x, COUNT: gl.constexpr):
    """The last step of the transform, and of each lane's columns the largest magnitude, as int32.

    |a| + |b| is the larger of |a + b| and |a - b|: half as many maxima, and of integers three at once.
    """
    HALF: gl.constexpr = COUNT // 2
    sums, differences, peaks = (), (), ()
    for i in gl.static_range(HALF):
        sums += (x[i] + x[i + HALF],)
        differences += (x[i] - x[i + HALF],)
        peaks += ((gl.abs(x[i]) + gl.abs(x[i + HALF])).to(int32, bitcast=True),)
    largest = gl.maximum(peaks[0], peaks[1])
    for i in gl.static_range(2, HALF, 2):
        largest = gl.maximum(gl.maximum(peaks[i], peaks[i + 1]), largest)
    return sums + differences, largest
