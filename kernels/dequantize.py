"""Unpack a cache into 16-bit or float32 keys and values, rotated back.

Grid (batch rows x KV heads, runs of tiles of 64 or 32 tokens, 2), the last axis keys and values. A tile's
centroids are multiplied by the transposed rotation on the tensor cores, both exact in float16: of a power
of two the rotation is one number with signs, which a program loads once, of other dimensions two float16
terms. Keys get their mean back, and exact tokens are read as they came. Without a page a key is NaN and a
value zero. Past the length zeros are written without reading. The last tokens, if they are given as they
came, are written over it. Bytes: reads the packed cache up to the length, writes max_len vectors.
"""

import torch
import triton
import triton.language as tl

from ..beside import NOTHING, Beside, Chunk
from ..format import PAGE_ALIGNMENT, KVFormat
from .bits import (
    FP16_UNIT,
    codes_per_byte,
    load_centroids,
    lookup_words,
    magnitude_words,
    nan_if_overfull,
    sm_count,
)
from .centroids import asm_for, centroids, unit_of
from .pages import find_tokens, table_arguments, tokens_of_page
from .segments import MEAN_OF

BLOCK_N = 64  # tokens of a tile: 64 x 128 float32 sums are 64 registers of 128 threads
# Of sums of several products, too few for wgmma: Triton 3.6 lets one still read the registers of its first
# operand while the next operand is put into them (wrong keys of 512 dims on an H200).
FEW_TOKENS = 32
MOST_TILES = 16  # of a program, which loads a rotation of 64 KiB first
PROGRAMS_PER_SM = 6  # two waves of three


@triton.constexpr_function
def block_of(dim):
    """Dims of a tile of results, and if the rotation fits one, of the sums of these."""
    return min(128, max(16, triton.next_power_of_2(dim)))


@triton.constexpr_function
def is_hadamard(dim):
    """Whether the rotation is a Hadamard matrix with signs, over the root of `dim`."""
    return dim & (dim - 1) == 0


@triton.jit
def locate_tile(table_ptr, stride_b, stride_n, batch, tokens, filled, PAGE: tl.constexpr):
    """The page of these tokens of a row, -1 if they have none, and their slots in it."""
    if PAGE > 0:
        return find_tokens(table_ptr + batch * stride_b, stride_n, tokens, tokens < filled, PAGE)
    else:
        return batch, tokens


@triton.jit
def key_codes(
    row_ptr, known, first, PLACES: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Centroids [tokens, PLACES] of the key rows at `row_ptr` [tokens], from byte `first`: `dims_of`."""
    CODES: tl.constexpr = codes_per_byte(BITS)
    PLANE: tl.constexpr = DIM // CODES // 4  # in words
    word = (first // 4 + tl.arange(0, PLACES // CODES // 4))[None, :]
    row_ptr = row_ptr.to(tl.pointer_type(tl.int32))[:, None]
    mask = known[:, None] & (word < PLANE)
    words = tl.load(row_ptr + word, mask=mask, other=0)
    signs = words
    if BITS == 3:
        SIGNS: tl.constexpr = DIM // 32
        signs = tl.load(row_ptr + PLANE + word % SIGNS, mask=mask, other=0) >> word // SIGNS
    x = centroids(words, signs, BITS, LO, HI, TABLE, ASM)  # [tokens, words, 4, CODES]
    return tl.reshape(tl.permute(x, [0, 1, 3, 2]), [known.shape[0], PLACES])


@triton.jit
def value_codes(
    group_ptr, known, first, PLACES: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, LO: tl.constexpr,
    HI: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The same of values: of the groups of 16 tokens at `group_ptr` [groups]."""
    CODES: tl.constexpr = codes_per_byte(BITS)
    PLANE: tl.constexpr = DIM // CODES
    BYTES: tl.constexpr = PLACES // CODES
    GROUPS: tl.constexpr = known.shape[0]
    quad = tl.arange(0, 4)[None, None, :]  # of tokens of a group, a word
    byte = (first + tl.arange(0, BYTES))[:, None, None] + 0 * quad
    group_ptr = group_ptr.to(tl.pointer_type(tl.int32))[None, :, None] + quad
    mask = known[None, :, None] & (byte < PLANE)
    words = tl.load(group_ptr + byte * 4, mask=mask, other=0)
    signs = words
    if BITS == 3:
        SIGNS: tl.constexpr = DIM // 8
        signs = tl.load(group_ptr + (PLANE + byte % SIGNS) * 4, mask=mask, other=0) >> byte // SIGNS
        signs = tl.reshape(signs, [BYTES, GROUPS * 4])
    words = tl.reshape(words, [BYTES, GROUPS * 4])
    if BITS != 3:
        signs = words
    x = centroids(words, signs, BITS, LO, HI, TABLE, ASM)  # [bytes, quads, 4, CODES]
    x = tl.reshape(x, [BYTES // 4, 4, GROUPS * 16, CODES])
    return tl.trans(tl.reshape(tl.permute(x, [0, 3, 1, 2]), [PLACES, GROUPS * 16]))


@triton.jit
def dims_of(first, PLACES: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr):
    """Which dim each place of `key_codes` and `value_codes` is; DIM or more: none.

    Of four bytes the low codes come first, then those above: as a word is unpacked.
    """
    CODES: tl.constexpr = codes_per_byte(BITS)
    place = tl.arange(0, PLACES)
    byte = first + place // (4 * CODES) * 4 + place % 4
    return tl.where(byte < DIM // CODES, place // 4 % CODES * (DIM // CODES) + byte, DIM)


@triton.jit
def columns_of(first, BLOCK: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr):
    """The dims of `dims_of`, of BLOCK places, in ascending order."""
    PART: tl.constexpr = BLOCK // codes_per_byte(BITS)
    place = tl.arange(0, BLOCK)
    return place // PART * (DIM // codes_per_byte(BITS)) + first + place % PART


@triton.jit
def load_rotation(rotation_ptr, dims, columns, DIM: tl.constexpr):
    """The transposed rotation [dims, columns], zero outside of it."""
    mask = (dims < DIM)[:, None] & (columns < DIM)[None, :]
    return tl.load(rotation_ptr + columns[None, :] * DIM + dims[:, None], mask=mask, other=0.0)


@triton.jit
def signs_of(rotation):
    """Of a Hadamard matrix with signs, and zero where there is none, in float16."""
    return tl.where(rotation == 0, 0.0, tl.where(rotation < 0, -1.0, 1.0)).to(tl.float16)


@triton.jit
def copy_exact(row_ptr, out_ptr, wanted, dropped, DIM: tl.constexpr):
    """Copy the rows at `row_ptr` [tokens] that are `wanted` to `out_ptr` [tokens]; `dropped` is added."""
    for first in range(0, DIM, block_of(DIM)):
        dims = (first + tl.arange(0, block_of(DIM)))[None, :]
        mask = wanted[:, None] & (dims < DIM)
        x = tl.load(row_ptr[:, None] + dims, mask=mask, other=0.0).to(tl.float32) + dropped
        tl.store(out_ptr[:, None] + dims, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_zeros(out_ptr, wanted, DIM: tl.constexpr):
    """Zero the rows at `out_ptr` [tokens] that are `wanted`."""
    dims = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    zeros = tl.zeros([wanted.shape[0], dims.shape[1]], out_ptr.dtype.element_ty)
    tl.store(out_ptr[:, None] + dims, zeros, mask=wanted[:, None] & (dims < DIM))


@triton.jit
def dequantize_side(
    cache_ptr, table_ptr, table_stride_b, table_stride_n, batch, cache_stride_b, rows_offset, scales_offset,
    rotation_ptr, mean_ptr, exact_ptr, exact_from, out_ptr, begin, end, seq_len, max_len,
    INTERLEAVED: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
    TABLE: tl.constexpr, ASM: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys or, if `INTERLEAVED`, values of tokens `begin` .. `end` - 1 of one row and KV head.

    The pointers are those of the head: `cache_ptr` in every page, `out_ptr` [max_len, DIM].
    """
    ROW: tl.constexpr = DIM * BITS // 8
    CODES: tl.constexpr = codes_per_byte(BITS)
    BY_WORDS: tl.constexpr = DIM % 32 == 0  # 3 bits have a plane of DIM / 8 bytes
    BLOCK_D: tl.constexpr = block_of(DIM)
    SIGNS: tl.constexpr = is_hadamard(DIM)
    BLOCK_K: tl.constexpr = BLOCK_D if SIGNS else 32
    filled = tl.minimum(seq_len, max_len).to(tl.int32)
    dropped = nan_if_overfull(seq_len, max_len)
    unit = unit_of(ASM) if BY_WORDS else FP16_UNIT
    if SIGNS:
        unit = unit * tl.abs(tl.load(rotation_ptr))
        dims, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
        if BY_WORDS:
            dims, columns = dims_of(0, BLOCK_K, BITS, DIM), columns_of(0, BLOCK_D, BITS, DIM)
        turn = signs_of(load_rotation(rotation_ptr, dims, columns, DIM))
        sign = tl.load(rotation_ptr + columns * DIM, mask=columns < DIM, other=0.0)
    for start in range(begin, tl.minimum(end, filled), BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        page, slots = locate_tile(table_ptr, table_stride_b, table_stride_n, batch, tokens, filled, PAGE)
        page_ptr = cache_ptr + page * cache_stride_b
        missing = page + 0 * tokens < 0  # a mask for each token: Triton 3.9 interprets no other
        known = (tokens < filled) & (missing == 0)
        scale_ptr = (page_ptr + scales_offset).to(tl.pointer_type(tl.bfloat16)) + slots
        scale = tl.load(scale_ptr, mask=known, other=0.0).to(tl.float32) * unit
        scale = tl.where(missing, 0.0 if INTERLEAVED else float("nan"), scale) + dropped
        row_ptr = page_ptr + rows_offset + slots * ROW
        if INTERLEAVED and not BY_WORDS:
            row_ptr = page_ptr + rows_offset + slots // GROUP * GROUP * ROW + slots % GROUP
        if INTERLEAVED and BY_WORDS:
            heads = start + tl.arange(0, BLOCK_N // GROUP).to(tl.int64) * GROUP
            page, slots = locate_tile(table_ptr, table_stride_b, table_stride_n, batch, heads, filled, PAGE)
            known_groups = (heads < filled) & (page + 0 * heads >= 0)
            row_ptr = cache_ptr + page * cache_stride_b + rows_offset + slots * ROW
        written = tokens < filled
        if HAS_EXACT:
            is_exact = written & ((tokens < SINKS) | (tokens >= exact_from))
            written &= is_exact == 0
            if tl.max(is_exact.to(tl.int32), axis=0) == 1:
                place = tl.where(tokens < SINKS, tokens, SINKS + (tokens - SINKS) % max(RECENT, 1))
                copy_exact(exact_ptr + place * WIDTH, out_ptr + tokens * DIM, is_exact, dropped, DIM)
        for first in range(0, DIM, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            if SIGNS and BY_WORDS:
                columns = columns_of(first // CODES, BLOCK_D, BITS, DIM)
            x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for at in range(0, DIM, BLOCK_K):
                byte = at // CODES
                if BY_WORDS and INTERLEAVED:
                    codes = value_codes(row_ptr, known_groups, byte, BLOCK_K, BITS, DIM, LO, HI, TABLE, ASM)
                elif BY_WORDS:
                    codes = key_codes(row_ptr, known, byte, BLOCK_K, BITS, DIM, LO, HI, TABLE, ASM)
                else:
                    dims = at + tl.arange(0, BLOCK_K)
                    codes = load_centroids(
                        row_ptr[:, None], dims[None, :], known[:, None] & (dims < DIM)[None, :], BITS, DIM,
                        LO, HI, GROUP if INTERLEAVED else 1,
                    )  # fmt: skip
                if SIGNS:
                    if DIM > BLOCK_D:  # of each two blocks `turn` or its negative
                        ptr = rotation_ptr + first // CODES * DIM
                        turned = tl.load(ptr) * tl.load(ptr + byte) < 0
                        codes *= tl.where(turned, -1.0, 1.0).to(tl.float16)
                    x = tl.dot(codes, turn, x)
                else:
                    if BY_WORDS:
                        dims = dims_of(byte, BLOCK_K, BITS, DIM)
                    rotation = load_rotation(rotation_ptr, dims, columns, DIM)
                    high = rotation.to(tl.float16)
                    x = tl.dot(codes, high, x)
                    x = tl.dot(codes, (rotation - high.to(tl.float32)).to(tl.float16), x)
            if SIGNS and DIM > BLOCK_D:
                x *= tl.where(sign * tl.load(rotation_ptr + columns * DIM) < 0, -1.0, 1.0)[None, :]
            x *= scale[:, None]
            if HAS_MEAN:
                mean_ptrs = mean_ptr + start // MEAN_OF * DIM + columns
                x += tl.load(mean_ptrs, mask=columns < DIM, other=0.0).to(tl.float32)[None, :]
            mask = written[:, None] & (columns < DIM)[None, :]
            out_ptrs = out_ptr + tokens[:, None] * DIM + columns[None, :]
            tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=mask)
    for start in range(tl.maximum(begin, filled // BLOCK_N * BLOCK_N), end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        write_zeros(out_ptr + tokens * DIM, (tokens >= filled) & (tokens < max_len), DIM)


@triton.jit
def dequantize_kernel(
    cache_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr, exact_from_ptr, k_ptr,
    v_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h, lens_stride,
    from_stride, v_rows_offset, k_scales_offset, v_scales_offset, kv_heads, segments, max_len,
    run, HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_LO: tl.constexpr, K_HI: tl.constexpr,
    V_LO: tl.constexpr, V_HI: tl.constexpr, K_TABLE: tl.constexpr, V_TABLE: tl.constexpr,
    K_ASM: tl.constexpr, V_ASM: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // kv_heads
    begin = tl.program_id(1) * run
    end = tl.minimum(begin + run, max_len)
    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    cache_ptr += row % kv_heads * cache_stride_h
    exact_from = seq_len
    if HAS_EXACT:
        exact_from = tl.maximum(tl.load(exact_from_ptr + batch * from_stride), seq_len - RECENT)
        exact_from = tl.maximum(exact_from, SINKS)
        exact_ptr += row * ((SINKS + RECENT) * (K_DIM + V_DIM))
    if tl.program_id(2) == 0:
        dequantize_side(
            cache_ptr, table_ptr, table_stride_b, table_stride_n, batch, cache_stride_b, 0, k_scales_offset,
            k_rotation_ptr, mean_ptr + row * segments * K_DIM, exact_ptr, exact_from,
            k_ptr + row * max_len * K_DIM, begin, end, seq_len, max_len, False, HAS_MEAN, HAS_EXACT, SINKS,
            RECENT, K_DIM + V_DIM, K_BITS, K_LO, K_HI, K_TABLE, K_ASM, K_DIM, GROUP, PAGE, BLOCK_N,
        )  # fmt: skip
    else:
        dequantize_side(
            cache_ptr, table_ptr, table_stride_b, table_stride_n, batch, cache_stride_b, v_rows_offset,
            v_scales_offset, v_rotation_ptr, mean_ptr, exact_ptr + K_DIM, exact_from,
            v_ptr + row * max_len * V_DIM, begin, end, seq_len, max_len, True, False, HAS_EXACT, SINKS,
            RECENT, K_DIM + V_DIM, V_BITS, V_LO, V_HI, V_TABLE, V_ASM, V_DIM, GROUP, PAGE, BLOCK_N,
        )  # fmt: skip


@triton.jit
def copy_tile(
    row_ptr, out_ptr, tokens, missing, seq_len, max_len, MISSING: tl.constexpr, DIM: tl.constexpr
):
    """Convert the rows at `row_ptr` [tokens] to the type of, and write them to, `out_ptr`."""
    dims = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    known = tokens < tl.minimum(seq_len, max_len)
    mask = (known & (missing == 0))[:, None] & (dims < DIM)
    x = tl.load(row_ptr[:, None] + dims, mask=mask, other=0.0)
    x = tl.where((known & (missing != 0))[:, None], MISSING, x)
    x += nan_if_overfull(seq_len, max_len)
    mask = (tokens < max_len)[:, None] & (dims < DIM)
    tl.store(out_ptr[:, None] + dims, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_lossless_kernel(
    cache_ptr, seq_lens_ptr, k_ptr, v_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b,
    cache_stride_h, lens_stride, v_rows_offset, kv_heads, max_len, ROW_DTYPE: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // kv_heads
    seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    page, slots = locate_tile(
        table_ptr, table_stride_b, table_stride_n, batch, tokens, tl.minimum(seq_len, max_len), PAGE
    )
    page_ptr = cache_ptr + page * cache_stride_b + row % kv_heads * cache_stride_h
    missing = page + 0 * tokens < 0  # a mask for each token: Triton 3.9 interprets no other
    if tl.program_id(2) == 0:
        row_ptr = page_ptr.to(tl.pointer_type(ROW_DTYPE)) + slots * K_DIM
        out_ptr = k_ptr + (row * max_len + tokens) * K_DIM
        copy_tile(row_ptr, out_ptr, tokens, missing, seq_len, max_len, float("nan"), K_DIM)
    else:
        row_ptr = (page_ptr + v_rows_offset).to(tl.pointer_type(ROW_DTYPE)) + slots * V_DIM
        out_ptr = v_ptr + (row * max_len + tokens) * V_DIM
        copy_tile(row_ptr, out_ptr, tokens, missing, seq_len, max_len, 0.0, V_DIM)


@triton.jit
def copy_own_kernel(
    own_ptr, seq_lens_ptr, out_ptr, stride_b, stride_h, stride_t, stride_d, lens_stride, heads, own,
    max_len, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The last `own` tokens of each row to their slots of `out` [B, H, max_len, DIM]; no overfull row."""
    row = tl.program_id(0).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + row // heads * lens_stride)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    slots = seq_len - own + tokens
    exists = (tokens < own) & (slots >= 0) & (seq_len + 0 * tokens <= max_len)
    mask = exists[:, None] & (dims < DIM)
    own_ptr += row // heads * stride_b + row % heads * stride_h
    x = tl.load(own_ptr + tokens[:, None] * stride_t + dims * stride_d, mask=mask, other=0.0)
    out_ptr += (row * max_len + slots[:, None]) * DIM + dims
    tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize(
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    max_len: int,
    dtype: torch.dtype,
    beside: Beside = NOTHING,
    block_table: torch.Tensor | None = None,
    own: Chunk | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[B, Hkv, max_len, D]` of `dtype`; zero past `seq_lens`.

    `own`: the last tokens of each row as they came, which are then returned so.
    """
    k, v = dequantize_stored(
        cache, seq_lens, k_rotation, v_rotation, fmt, max_len, dtype, beside, block_table
    )
    lens_stride = seq_lens.expand(k.shape[0]).stride(0)
    for x, new in zip((k, v), own or (), strict=False):
        batch, heads, tokens, dim = new.shape
        if x.numel() and tokens:
            with torch.cuda.device_of(x):
                copy_own_kernel[(batch * heads, triton.cdiv(tokens, 32))](
                    new, seq_lens, x, *new.stride(), lens_stride, heads, tokens, max_len,
                    DIM=dim, BLOCK_N=32,
                )  # fmt: skip
    return k, v


def dequantize_stored(
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    max_len: int,
    dtype: torch.dtype,
    beside: Beside,
    block_table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the packed bytes and what lies beside them say; see `dequantize`."""
    batch, kv_heads, page_bytes = cache.shape
    if block_table is not None:
        batch = block_table.shape[0]
    k = cache.new_empty((batch, kv_heads, max_len, fmt.head_dim), dtype=dtype)
    v = cache.new_empty((batch, kv_heads, max_len, fmt.v_head_dim), dtype=dtype)
    if batch * kv_heads * max_len == 0:
        return k, v
    _, v_rows, k_scales, v_scales = fmt.planes(fmt.page_size(page_bytes))
    lens_stride = seq_lens.expand(batch).stride(0)
    strides = (*table_arguments(block_table, seq_lens), *cache.stride()[:2], lens_stride)
    page = tokens_of_page(cache, fmt, block_table)
    rows = batch * kv_heads
    with torch.cuda.device_of(cache):
        if fmt.is_lossless:
            block_n = 32
            dequantize_lossless_kernel[(rows, triton.cdiv(max_len, block_n), 2)](
                cache, seq_lens, k, v, *strides, v_rows.offset, kv_heads, max_len,
                ROW_DTYPE=tl.bfloat16 if fmt.dtype == torch.bfloat16 else tl.float16,
                K_DIM=fmt.head_dim, V_DIM=fmt.v_head_dim, PAGE=page, BLOCK_N=block_n,
            )  # fmt: skip
            return k, v
        (k_lo, k_hi), (v_lo, v_hi) = magnitude_words(fmt.k_bits), magnitude_words(fmt.v_bits)
        k_mean, exact, exact_from, sink_tokens = beside
        from_stride = 0 if exact_from is None else exact_from.expand(batch).stride(0)
        one_product = all(is_hadamard(d) and d == block_of(d) for d in (fmt.head_dim, fmt.v_head_dim))
        block_n = BLOCK_N if one_product else FEW_TOKENS
        tiles = triton.cdiv(max_len, block_n)
        run = min(MOST_TILES, triton.cdiv(2 * rows * tiles, PROGRAMS_PER_SM * sm_count(cache.device)))
        dequantize_kernel[(rows, triton.cdiv(tiles, run), 2)](
            cache, seq_lens, k_rotation, v_rotation, k if k_mean is None else k_mean,
            k if exact is None else exact, seq_lens if exact_from is None else exact_from, k, v, *strides,
            from_stride, v_rows.offset, k_scales.offset, v_scales.offset, kv_heads, beside.segments,
            max_len, run * block_n, HAS_MEAN=k_mean is not None, HAS_EXACT=exact is not None,
            SINKS=sink_tokens, RECENT=beside.recent_tokens, K_BITS=fmt.k_bits, V_BITS=fmt.v_bits,
            K_LO=k_lo, K_HI=k_hi, V_LO=v_lo, V_HI=v_hi, K_TABLE=lookup_words(fmt.k_bits)[0],
            V_TABLE=lookup_words(fmt.v_bits)[0], K_ASM=asm_for(fmt.k_bits, cache.device),
            V_ASM=asm_for(fmt.v_bits, cache.device), K_DIM=fmt.head_dim, V_DIM=fmt.v_head_dim,
            GROUP=PAGE_ALIGNMENT, PAGE=page, BLOCK_N=block_n, num_warps=4, num_stages=2,
        )  # fmt: skip
    return k, v
