"""`store` for a prompt: the transform on the tensor cores, then registers.

For NVIDIA GPUs that convert fp8 (sm_89 on) and 16-bit keys and values; `store` has the kernel for all
others and for few tokens. A program is one warp and takes a run of groups of 16 tokens of one KV head,
keys or values, each group aligned as value rows are interleaved. While it works on a group the next is
copied to shared memory.

`prompt_transform` copies and rotates, and says which lane has what: it writes whole words of both key and
value rows. A mean is taken off after the same product, so that equal vectors cancel. `prompt_sums` has
the sums over lanes, `prompt_codes` the encoding. Unlike the reference, vectors are not brought to a power
of two before they are rotated but after it, and only where squares would overflow or vanish.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import float32, int32

from ..beside import Beside
from ..format import PAGE_ALIGNMENT, KVFormat
from .bits import TINY, early_launch, fp8_value, sm_count
from .prompt_codes import code_steps, encode_asm, first_byte, lanes_apart, words_of_call
from .prompt_sums import LARGE, SMALL, over_rows, rows_and_tokens, squares_of, to_columns, to_ordinary
from .prompt_transform import (
    TOKENS,
    copy_group,
    group_memory,
    group_products,
    last_butterflies,
    load_layout,
    products,
    token_of,
    transform_operands,
)
from .segments import MEAN_OF
from .slots import locate_exact, locate_page
from .warp_hadamard import butterflies

WARPS, REGISTERS = 12, 168  # on a multiprocessor, as many for each of its schedulers; of a thread
MOST_GROUPS = 32  # of a program: its start costs a third of a group
LEAST_TOKENS = 64  # of a row: fewer are sooner done by `store`
FOUR_CODES = gl.constexpr(
    "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;"
    " mov.b32 $0, {l, h}; }"
)
WAIT = gl.constexpr("griddepcontrol.wait; // $0")
SIDE_BY_SIDE = gl.constexpr("prmt.b32 $0, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362;")
TRANSPOSE = gl.constexpr(
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $4, $5, 0x7362;"
    " prmt.b32 c, $6, $7, 0x5140; prmt.b32 d, $6, $7, 0x7362; prmt.b32 $0, a, c, 0x5410;"
    " prmt.b32 $1, a, c, 0x7632; prmt.b32 $2, b, d, 0x5410; prmt.b32 $3, b, d, 0x7632; }"
)


@gluon.constexpr_function
def encode_constraints(dim: int, bits: int) -> str:
    return "=r," * words_of_call(bits, dim) + "=r,=r" + ",f" * (dim // 16 + 1)


@gluon.jit
def encode_fp8(y, factor, COUNT: gl.constexpr):
    """Words of four e4m3 codes, and sums of coordinate times code and of squares of codes, in float32.

    Coordinates are times `factor`, and below 448 as no vector is longer. The sums take codes by
    `fp8_value`: of an earlier version, which converted them by an instruction, they were wrong on an H200.
    """
    words, fit, square = (), 0.0 * factor, 0.0 * factor
    for w in gl.static_range(COUNT // 4):
        x = (y[4 * w] * factor, y[4 * w + 1] * factor, y[4 * w + 2] * factor, y[4 * w + 3] * factor)
        word = gl.inline_asm_elementwise(FOUR_CODES, "=r,f,f,f,f", x, int32, True, 1)
        for i in gl.static_range(4):
            code = fp8_value(word, i)
            fit += x[i] * code
            square += code * code
        words += (word,)
    words += (fit, square)
    return words


@gluon.jit
def encode(y, factor, BITS: gl.constexpr, DIM: gl.constexpr, ASM: gl.constexpr):
    """Words of codes and two sums of `encode_asm` or `encode_fp8`, each [16, columns]."""
    CONSTRAINTS: gl.constexpr = encode_constraints(DIM, BITS)
    # The types of the results are written out: Triton 3.9 takes no computed tuple of them.
    if BITS == 8:
        out = encode_fp8(y, factor, DIM // 16)
    else:
        y += (factor,)
        if BITS == 3:
            out = gl.inline_asm_elementwise(ASM, CONSTRAINTS, y, (int32, int32, int32, int32), True, 1)
        else:
            out = gl.inline_asm_elementwise(ASM, CONSTRAINTS, y, (int32, int32, int32), True, 1)
    return out


@gluon.jit
def write_key_words(
    row_ptr, words, valid, ROW: gl.constexpr, WHOLE: gl.constexpr, LANES_APART: gl.constexpr
):  # fmt: skip
    """Words [16, columns] of 16 tokens into their rows of ROW bytes, the first at `row_ptr`, if `valid`.

    All four bytes of a word if `WHOLE`, else two; the words of rows `LANES_APART` apart are the same.
    """
    halves = gl.split(gl.permute(gl.reshape(words, [2, 8, TOKENS]), [1, 2, 0]))  # bit 0 of a dim
    LANES: gl.constexpr = halves[0].type.layout
    out = gl.inline_asm_elementwise(SIDE_BY_SIDE, "=&r,=r,r,r", halves, (int32, int32), True, 1)
    word = gl.arange(0, 8, layout=gl.SliceLayout(1, LANES))[:, None] % LANES_APART
    token = token_of(gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LANES)))[None, :]
    mask = gl.convert_layout(valid, gl.SliceLayout(0, LANES), assert_trivial=True)[None, :] & (word >= 0)
    ptr = row_ptr.to(gl.pointer_type(int32)) + (token * (ROW // 4) + word)
    gl.store(ptr, out[0], mask=mask)
    if WHOLE:
        gl.store(ptr + 8, out[1], mask=mask)


@gluon.jit
def write_value_words(
    group_ptr, words, valid, whole, WHOLE: gl.constexpr, LANES_APART: gl.constexpr
):  # fmt: skip
    """The same into the group at `group_ptr`: byte j of all tokens, then j + 1; `whole`: all are valid."""
    # Tokens 4c and 4c + 2, 4c + 1 and 4c + 3.
    even, odd = gl.split(gl.permute(gl.reshape(words, [16, 2, 4, 2]), [0, 2, 1, 3]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    LANES: gl.constexpr = first.type.layout
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, LANES))[:, None]
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))[None, :]
    byte = row % LANES_APART * 4 + row // 8
    tokens = (first, second, third, fourth)
    if whole:
        out = gl.inline_asm_elementwise(
            TRANSPOSE, "=r,=r,=r,=r,r,r,r,r", tokens, (int32, int32, int32, int32), True, 1
        )
        ptr = group_ptr.to(gl.pointer_type(int32)) + (byte * (TOKENS // 4) + lane)
        for b in gl.static_range(4 if WHOLE else 2):
            gl.store(ptr + (b // 2 * 32 + b % 2 * 2) * (TOKENS // 4), out[b])
    else:
        masks = gl.split(gl.permute(gl.reshape(valid, [2, 4, 2]), [1, 0, 2]))
        masks = gl.split(masks[0]) + gl.split(masks[1])  # of tokens 0, 2, 1, 3
        for t in gl.static_range(4):
            mask = gl.convert_layout(masks[t % 2 * 2 + t // 2], gl.SliceLayout(0, LANES))
            mask = mask[None, :] & (row >= 0)
            byte_ptr = group_ptr + (byte * TOKENS + lane * 4 + t)
            for b in gl.static_range(4 if WHOLE else 2):
                code = (tokens[t] >> 8 * b & 0xFF).to(gl.uint8)
                gl.store(byte_ptr + (b // 2 * 32 + b % 2 * 2) * TOKENS, code, mask=mask)


@gluon.jit
def rotated_mean(mean_ptr, position, segments, operands, DIM: gl.constexpr, MMA: gl.constexpr):
    """The mean of the segment of a position, as `products` gives vectors: [16, 1] for each 16 dims."""
    LOAD: gl.constexpr = load_layout(8)
    segment = gl.minimum(gl.maximum(position, 0) // MEAN_OF, segments - 1)
    offset = gl.arange(0, 32, layout=gl.SliceLayout(0, LOAD))[None, :]
    offset += 0 * gl.arange(0, 8, layout=gl.SliceLayout(1, LOAD))[:, None]
    rotated = products(mean_ptr + segment * DIM + offset, operands, DIM, MMA)
    mean = ()
    for i in gl.static_range(DIM // 16):
        mean += (gl.max(rotated[i], axis=1)[:, None],)  # all columns are equal
    return mean


@gluon.jit
def store_side(
    cache_ptr, x_ptr, seq_len, rotation_ptr, mean_ptr, exact_ptr, exact_from_ptr, cache_stride_b,
    cache_stride_h, stride_t, from_stride, rows_offset, scales_offset, kv_heads, new, page_size, segments,
    row, block, run, HAS_MEAN: gl.constexpr, HAS_EXACT: gl.constexpr, SINKS: gl.constexpr,
    RECENT: gl.constexpr, BITS: gl.constexpr, UNIT: gl.constexpr, STEPS: gl.constexpr, DIM: gl.constexpr,
    WIDTH: gl.constexpr, ASM: gl.constexpr, INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """Keys or values of `run` groups of one KV head. Vectors are over sqrt(DIM) once rotated."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    LOAD: gl.constexpr = load_layout(TOKENS)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    COUNT: gl.constexpr = DIM // 16
    ROW: gl.constexpr = DIM * BITS // 8
    dims = gl.arange(0, 32, layout=gl.SliceLayout(0, LOAD))[None, :]
    column = token_of(gl.arange(0, TOKENS, layout=gl.SliceLayout(1, LOAD)))
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    operands = transform_operands(rotation_ptr, dtype, DIM, MMA)
    batch, head = row // kv_heads, row % kv_heads
    start = seq_len - new
    shift = (start & TOKENS - 1).to(int32)
    first = block * (run * TOKENS) - shift  # token
    # Of which tokens there is room.
    low, high = gl.maximum(0, -start).to(int32), gl.minimum(new, page_size - start).to(int32)
    stop = gl.minimum(first + run * TOKENS, new)
    shared = group_memory(dtype, DIM)
    copy_group(shared, x_ptr, first, stop, new, stride_t)
    mean_ptr += row * segments * DIM
    mean = ()
    if HAS_MEAN:
        mean = rotated_mean(mean_ptr, start + first, segments, operands, DIM, MMA)
    for at in range(first, stop, TOKENS):
        token = at + column
        position = start + at
        page = locate_page(position, batch, head, cache_stride_b, cache_stride_h, page_size)[0]
        page_ptr = cache_ptr + page
        if HAS_EXACT:
            exists = (token >= 0) & (token < new)
            room = locate_page(start + token, batch, head, cache_stride_b, cache_stride_h, page_size)[1]
            if (position < SINKS) | (position + TOKENS > seq_len - RECENT) | (block == 0):
                to, kept = locate_exact(
                    exact_ptr, exact_from_ptr, from_stride, row, batch + 0 * token, start + token, seq_len,
                    new, exists, exists & room, SINKS, RECENT, WIDTH,
                )  # fmt: skip
                near = gl.minimum(gl.maximum(token, 0), new - 1).to(gl.int64)[:, None]
                ptr = x_ptr + near * stride_t + dims
                for i in gl.static_range(DIM // 32):
                    copy = gl.load(ptr + 32 * i).to(exact_ptr.dtype.element_ty)
                    gl.store(to[:, None] + dims + 32 * i, copy, mask=kept[:, None] & (dims >= 0))

        y = group_products(shared, operands, MMA)
        copy_group(shared, x_ptr, at + TOKENS, stop, new, stride_t)
        if HAS_MEAN:
            if position % MEAN_OF == 0:
                mean = rotated_mean(mean_ptr, position, segments, operands, DIM, MMA)
            less = ()
            for i in gl.static_range(COUNT):
                less += (y[i] - mean[i],)
            y = less
        y, peak = last_butterflies(butterflies(y, COUNT, COUNT // 2), COUNT)
        squares, peak = over_rows(squares_of(y, COUNT), False), over_rows(peak, True)
        LANES: gl.constexpr = squares.type.layout
        unit = gl.full([8, 4], 1.0, float32, LANES)
        ordinary = (squares > SMALL) & (squares < LARGE)
        if gl.min(gl.reshape(ordinary.to(int32), [32]), axis=0) == 0:
            y, squares, peak, unit = to_ordinary(y, COUNT, MMA)

        root = gl.rsqrt(squares)
        to_steps = root * (UNIT[0] * STEPS[0] * DIM**0.5)
        if UNIT[1] > 0:
            over = gl.rsqrt(gl.maximum(peak.to(float32, bitcast=True), SMALL))
            to_steps += over * over * (UNIT[1] * STEPS[0])
        out = encode(y, to_columns(to_steps, MMA), BITS, DIM, ASM)
        WORDS: gl.constexpr = words_of_call(BITS, DIM)
        numerator = over_rows(out[WORDS], False).to(float32)
        over = gl.rsqrt(over_rows(out[WORDS + 1], False).to(float32) * to_steps)
        scale = unit * (numerator * over * over * (STEPS[1] * DIM**0.5))
        scale = gl.where(squares * root * unit * DIM**0.5 < TINY, 0.0, scale)

        lane_row, own = rows_and_tokens(LANES)
        mask = (at + own >= low) & (at + own < high) & (lane_row % 2 == 0)
        scale_ptr = (page_ptr + scales_offset).to(gl.pointer_type(gl.bfloat16)) + position
        gl.store(scale_ptr + own, scale.to(gl.bfloat16), mask=mask)
        here = at + token_of(gl.arange(0, TOKENS, layout=COLUMNS))
        valid = (here >= low) & (here < high)
        whole = (at >= low) & (at + TOKENS <= high)
        for w in gl.static_range(WORDS):
            row_ptr = page_ptr + position * ROW
            if INTERLEAVED:
                group_ptr = row_ptr + (rows_offset + first_byte(BITS, DIM, w) * TOKENS)
                write_value_words(group_ptr, out[w], valid, whole, ROW >= 64, lanes_apart(BITS, w))
            else:
                row_ptr += first_byte(BITS, DIM, w)
                write_key_words(row_ptr, out[w], valid, ROW, ROW >= 64, lanes_apart(BITS, w))


@gluon.jit
def prompt_kernel(
    cache_ptr, k_ptr, v_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr,
    exact_from_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h, k_stride_b,
    k_stride_h, k_stride_t, k_stride_d, v_stride_b, v_stride_h, v_stride_t, v_stride_d, lens_stride,
    from_stride, v_rows_offset, k_scales_offset, v_scales_offset, vectors, kv_heads, new, page_size,
    segments, blocks, run,
    HAS_MEAN: gl.constexpr, HAS_EXACT: gl.constexpr, SINKS: gl.constexpr, RECENT: gl.constexpr,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr, K_UNIT: gl.constexpr, V_UNIT: gl.constexpr,
    K_DIM: gl.constexpr, V_DIM: gl.constexpr, K_STEPS: gl.constexpr, V_STEPS: gl.constexpr,
    K_ASM: gl.constexpr, V_ASM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (rows * `blocks`, 2): values, keys. The arguments are `store_kernel`'s, a block table unread.

    With PDL the means may still be in the making, for which only keys wait.
    """
    row, block = (gl.program_id(0) // blocks).to(gl.int64), gl.program_id(0) % blocks
    batch, head = row // kv_heads, row % kv_heads
    seq_len = gl.load(seq_lens_ptr + batch * lens_stride)
    if gl.program_id(1) == 1:
        if PDL:
            gl.inline_asm_elementwise(WAIT, "=r", [], gl.int32, False, 1)
        store_side(
            cache_ptr, k_ptr + batch * k_stride_b + head * k_stride_h, seq_len, k_rotation_ptr, mean_ptr,
            exact_ptr, exact_from_ptr, cache_stride_b, cache_stride_h, k_stride_t, from_stride, 0,
            k_scales_offset, kv_heads, new, page_size, segments, row, block, run, HAS_MEAN, HAS_EXACT,
            SINKS, RECENT, K_BITS, K_UNIT, K_STEPS, K_DIM, K_DIM + V_DIM, K_ASM, False,
        )  # fmt: skip
    else:
        store_side(
            cache_ptr, v_ptr + batch * v_stride_b + head * v_stride_h, seq_len, v_rotation_ptr, mean_ptr,
            exact_ptr + K_DIM, exact_from_ptr, cache_stride_b, cache_stride_h, v_stride_t, from_stride,
            v_rows_offset, v_scales_offset, kv_heads, new, page_size, segments, row, block, run, False,
            HAS_EXACT, SINKS, RECENT, V_BITS, V_UNIT, V_STEPS, V_DIM, K_DIM + V_DIM, V_ASM, True,
        )  # fmt: skip


def copies_whole(x: torch.Tensor) -> bool:
    """Whether `copy_group` can copy x `[B, Hkv, q, D]`: by 16 bytes, which Triton must know."""
    return x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(s % 16 == 0 for s in x.stride()[:-1])


def takes(
    k: torch.Tensor, v: torch.Tensor, fmt: KVFormat, beside: Beside, block_table: torch.Tensor | None
) -> bool:
    """Whether this kernel stores k `[B, Hkv, q, D]` and v.

    Not by a block table: the place of a group is a product here, and the next is not known to be beside it.
    """
    sides = ((k, fmt.k_bits), (v, fmt.v_bits))
    return (
        k.shape[2] >= LEAST_TOKENS
        and block_table is None
        and all(x.shape[-1] == 128 or (x.shape[-1] == 64 and bits in (4, 8)) for x, bits in sides)
        and k.dtype == v.dtype
        and k.dtype in (torch.bfloat16, torch.float16)
        and (beside.k_mean is None or beside.k_mean.dtype == k.dtype)
        and copies_whole(k)
        and copies_whole(v)
        and k.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(k.device) >= (8, 9)
    )


def store_prompt(arguments: tuple, constants: dict, k: torch.Tensor, fmt: KVFormat) -> None:
    """Store what this kernel `takes`; arguments and constants are `store_kernel`'s.

    If keys have means, the launch before this one is that of `mean_kernel`.
    """
    rows, groups = k.shape[0] * k.shape[1], triton.cdiv(k.shape[2] + PAGE_ALIGNMENT - 1, PAGE_ALIGNMENT)
    run = min(MOST_GROUPS, triton.cdiv(2 * rows * groups, WARPS * sm_count(k.device)))
    blocks = triton.cdiv(groups, run)
    names = [name for name in constants if name in prompt_kernel.arg_names]
    prompt_kernel[(rows * blocks, 2)](
        *arguments, blocks, run, **{name: constants[name] for name in names},
        K_STEPS=code_steps(fmt.k_bits), V_STEPS=code_steps(fmt.v_bits),
        K_ASM=encode_asm(fmt.k_bits, fmt.head_dim), V_ASM=encode_asm(fmt.v_bits, fmt.v_head_dim),
        num_warps=1, maxnreg=REGISTERS,
        **(early_launch(k.device) if constants["HAS_MEAN"] else {"PDL": False}),
    )  # fmt: skip
