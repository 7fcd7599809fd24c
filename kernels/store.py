"""Append new keys and values to a packed cache: rotate, quantise, pack.

A program takes a few vectors (one new token of one KV head each) of keys or of values: grid (vectors /
a few, 2), one launch for both. It brings each vector to magnitudes below 4, rotates it in float32 (by
sums and differences if D is a power of two), and holds the result as 8 octants of D / 8 coordinates, padded
to a power of two. Every byte of a row collects whole codes of the same place in several octants (`format`
has the table), so packing is a sum over octants for any D that is a multiple of 8. A byte belongs to one
token: nothing is read back. Keys are less the mean of their segment (`key_means`), and tokens that are now
exact are copied as they came: `beside` says which.

Bytes: reads the new vectors and the rotation (which stays in the cache of the GPU), writes packed
rows and scales. A lossless format is a plain copy.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..beside import NOTHING, Beside
from ..format import PAGE_ALIGNMENT, KVFormat
from .bits import TINY, early_launch, encode, hadamard, magnitude_words, quantiser
from .key_means import find_means, take_means
from .pages import table_arguments, tokens_of_page
from .slots import locate_exact, locate_vectors
from .store_prompt import store_prompt, takes

BLOCK_VECTORS = 16  # the least number of rows of a dot
WARP_VECTORS = 4  # of at most 256 coordinates, without a dot: 32 coordinates a lane
FEW_VECTORS = 2048  # so many have a warp each, which is done sooner


@triton.jit
def pack_plane(row_ptr, codes, valid, BITS: tl.constexpr, STRIDE: tl.constexpr, EIGHTH: tl.constexpr):
    """Write one plane of `BITS`-bit codes [vectors, 8, octant] at `row_ptr` [vectors]."""
    VECTORS: tl.constexpr = codes.shape[0]
    OCTANT: tl.constexpr = codes.shape[2]
    groups = tl.reshape(codes, [VECTORS, 8 // BITS, BITS, OCTANT])
    shift = tl.arange(0, 8 // BITS)[None, :, None, None] * BITS
    packed = tl.sum(groups << shift, axis=1)  # [vectors, BITS, octant]
    place = tl.arange(0, OCTANT)[None, None, :]
    byte = tl.arange(0, BITS)[None, :, None] * EIGHTH + place
    mask = valid[:, None, None] & (place < EIGHTH)
    tl.store(row_ptr[:, None, None] + byte * STRIDE, packed.to(tl.uint8), mask=mask)


@triton.jit
def store_vectors(
    x_ptr, stride_d, rotation_ptr, mean_ptr, row_ptr, scale_ptr, exact_ptr, exists, valid, kept,
    HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, BITS: tl.constexpr, MAGNITUDES: tl.constexpr,
    UNIT: tl.constexpr, DIM: tl.constexpr, BYTE_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Quantise vectors at `x_ptr` [vectors] into rows at `row_ptr` and scales at `scale_ptr`.

    Less the means at `mean_ptr` [vectors]. Those that are `kept` are copied to `exact_ptr` [vectors] too:
    after the loads, none of which an assembler moves before a store.
    """
    VECTORS: tl.constexpr = valid.shape[0]
    EIGHTH: tl.constexpr = DIM // 8
    OCTANT: tl.constexpr = triton.next_power_of_2(EIGHTH)
    dims = tl.arange(0, triton.next_power_of_2(DIM))
    mask = exists[:, None] & (dims < DIM)[None, :]
    x = tl.load(x_ptr[:, None] + dims[None, :] * stride_d, mask=mask, other=0.0)
    if HAS_MEAN:
        mean = tl.load(mean_ptr[:, None] + dims[None, :], mask=mask, other=0.0)
    if DIM == 8 * OCTANT:
        signs = tl.load(rotation_ptr + dims * DIM)
    if HAS_EXACT:
        copy = x.to(exact_ptr.dtype.element_ty)
        tl.store(exact_ptr[:, None] + dims[None, :], copy, mask=kept[:, None] & (dims < DIM)[None, :])
    x = x.to(tl.float32)
    if HAS_MEAN:
        x -= mean.to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)  # [vectors]
    # A power of two: dividing by it is exact, and neither it nor its inverse overflows.
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = (254 - exponent << 23).to(tl.float32, bitcast=True) + (largest - largest)  # NaN if infinite

    place = tl.arange(0, 8 * OCTANT) % OCTANT
    if DIM == 8 * OCTANT:  # a power of two: the rotation is its first column times the Hadamard matrix
        y = hadamard(x * inverse[:, None] * signs[None, :])
    else:
        columns = tl.arange(0, 8 * OCTANT) // OCTANT * EIGHTH + place
        y = tl.zeros([VECTORS, 8 * OCTANT], tl.float32)
        for start in range(0, DIM, BLOCK_K):
            rows = start + tl.arange(0, BLOCK_K)
            known = exists[:, None] & (rows < DIM)[None, :]
            chunk = tl.load(x_ptr[:, None] + rows[None, :] * stride_d, mask=known, other=0.0)
            chunk = chunk.to(tl.float32)
            if HAS_MEAN:
                chunk -= tl.load(mean_ptr[:, None] + rows[None, :], mask=known, other=0.0).to(tl.float32)
            chunk *= inverse[:, None]  # [vectors, BLOCK_K]
            inside = (rows < DIM)[:, None] & (place < EIGHTH)[None, :]
            rotation_ptrs = rotation_ptr + rows[:, None] * DIM + columns[None, :]
            rotation = tl.load(rotation_ptrs, mask=inside, other=0.0)
            y = tl.dot(chunk, rotation, y, input_precision="ieee")

    rms = tl.maximum(tl.sqrt_rn(tl.sum(y * y, axis=1) / DIM), TINY)
    to_grid = tl.div_rn(UNIT[0], rms)
    if UNIT[1] > 0:
        to_grid += tl.div_rn(UNIT[1], tl.maximum(tl.max(tl.abs(y), axis=1), TINY))
    codes, centroids = encode(y, to_grid[:, None], BITS, MAGNITUDES)
    codes = tl.where((place < EIGHTH)[None, :], codes, 0)
    centroids = tl.where((place < EIGHTH)[None, :], centroids, 0.0)
    square = tl.maximum(tl.sum(centroids * centroids, axis=1), TINY)
    fit = tl.div_rn(tl.sum(y * centroids, axis=1), square)
    # A maximum may drop NaN; the fit never does.
    scale = tl.where((largest < TINY) & (fit == fit), 0.0, fit * unit)
    tl.store(scale_ptr, scale.to(tl.bfloat16), mask=valid)

    codes = tl.reshape(codes, [VECTORS, 8, OCTANT])
    if BITS == 3:
        pack_plane(row_ptr, codes & 3, valid, 2, BYTE_STRIDE, EIGHTH)
        pack_plane(row_ptr + 2 * EIGHTH * BYTE_STRIDE, codes >> 2, valid, 1, BYTE_STRIDE, EIGHTH)
    else:
        pack_plane(row_ptr, codes, valid, BITS, BYTE_STRIDE, EIGHTH)


@triton.jit
def store_kernel(
    cache_ptr, k_ptr, v_ptr, seq_lens_ptr, k_rotation_ptr, v_rotation_ptr, mean_ptr, exact_ptr,
    exact_from_ptr, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h, k_stride_b,
    k_stride_h, k_stride_t, k_stride_d, v_stride_b, v_stride_h, v_stride_t, v_stride_d, lens_stride,
    from_stride, v_rows_offset, k_scales_offset, v_scales_offset, vectors, kv_heads, new, capacity,
    segments, HAS_MEAN: tl.constexpr, HAS_EXACT: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    K_LO: tl.constexpr, K_HI: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_MAGNITUDES: tl.constexpr,
    V_MAGNITUDES: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    batch, head, token, position, page, slot, exists, inside, valid = locate_vectors(
        seq_lens_ptr, lens_stride, table_ptr, table_stride_b, table_stride_n, cache_stride_b,
        cache_stride_h, vectors, kv_heads, new, capacity, PAGE, BLOCK,
    )  # fmt: skip
    page_ptr = cache_ptr + page
    row = batch * kv_heads + head
    kept = valid
    if HAS_EXACT:
        exact_ptr, kept = locate_exact(
            exact_ptr, exact_from_ptr, from_stride, row, batch, position, position - token + new, new,
            exists, inside, SINKS, RECENT, K_DIM + V_DIM,
        )  # fmt: skip
    if tl.program_id(1) == 0:
        x_ptr = k_ptr + batch * k_stride_b + head * k_stride_h + token * k_stride_t
        row_ptr = page_ptr + slot * (K_DIM * K_BITS // 8)
        scale_ptr = (page_ptr + k_scales_offset).to(tl.pointer_type(tl.bfloat16)) + slot
        mean_ptrs = mean_ptr
        if HAS_MEAN:
            where = (table_ptr + batch * table_stride_b, table_stride_n, cache_stride_b, cache_stride_h)
            mean_ptrs = find_means(
                mean_ptr, cache_ptr, k_scales_offset, where, k_rotation_ptr, batch, head, row, position,
                position - token, new, segments, inside, K_BITS, K_LO, K_HI, K_DIM, PAGE, BLOCK_K,
            )  # fmt: skip
        store_vectors(
            x_ptr, k_stride_d, k_rotation_ptr, mean_ptrs, row_ptr, scale_ptr, exact_ptr, exists, valid,
            kept, HAS_MEAN, HAS_EXACT, K_BITS, K_MAGNITUDES, K_UNIT, K_DIM, 1, BLOCK_K,
        )  # fmt: skip
    else:
        x_ptr = v_ptr + batch * v_stride_b + head * v_stride_h + token * v_stride_t
        row_ptr = page_ptr + v_rows_offset + slot // GROUP * GROUP * (V_DIM * V_BITS // 8)
        scale_ptr = (page_ptr + v_scales_offset).to(tl.pointer_type(tl.bfloat16)) + slot
        store_vectors(
            x_ptr, v_stride_d, v_rotation_ptr, mean_ptr, row_ptr + slot % GROUP, scale_ptr,
            exact_ptr + K_DIM, exists, valid, kept, False, HAS_EXACT, V_BITS, V_MAGNITUDES, V_UNIT,
            V_DIM, GROUP, BLOCK_K,
        )  # fmt: skip


@triton.jit
def copy_vectors(x_ptr, stride_d, row_ptr, exists, valid, DIM: tl.constexpr):
    """Convert vectors at `x_ptr` [vectors] to the type of, and write them to, `row_ptr`."""
    dims = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    inside = dims < DIM
    x = tl.load(x_ptr[:, None] + dims * stride_d, mask=exists[:, None] & inside, other=0.0)
    tl.store(row_ptr[:, None] + dims, x.to(row_ptr.dtype.element_ty), mask=valid[:, None] & inside)


@triton.jit
def store_lossless_kernel(
    cache_ptr, k_ptr, v_ptr, seq_lens_ptr, table_ptr, table_stride_b, table_stride_n,
    cache_stride_b, cache_stride_h, k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d, lens_stride,
    v_rows_offset, vectors, kv_heads, new, capacity,
    ROW_DTYPE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    batch, head, token, _, page, slot, exists, _, valid = locate_vectors(
        seq_lens_ptr, lens_stride, table_ptr, table_stride_b, table_stride_n, cache_stride_b,
        cache_stride_h, vectors, kv_heads, new, capacity, PAGE, BLOCK,
    )  # fmt: skip
    page_ptr = cache_ptr + page
    if tl.program_id(1) == 0:
        x_ptr = k_ptr + batch * k_stride_b + head * k_stride_h + token * k_stride_t
        row_ptr = page_ptr.to(tl.pointer_type(ROW_DTYPE)) + slot * K_DIM
        copy_vectors(x_ptr, k_stride_d, row_ptr, exists, valid, K_DIM)
    else:
        x_ptr = v_ptr + batch * v_stride_b + head * v_stride_h + token * v_stride_t
        row_ptr = (page_ptr + v_rows_offset).to(tl.pointer_type(ROW_DTYPE)) + slot * V_DIM
        copy_vectors(x_ptr, v_stride_d, row_ptr, exists, valid, V_DIM)


def store(
    cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    beside: Beside = NOTHING,
    block_table: torch.Tensor | None = None,
) -> None:
    """Write new tokens as the last `q` of each row's `seq_lens` tokens, in place.

    The arguments are those of `reference.store`.
    """
    batch, kv_heads, new, _ = k.shape
    page_size = fmt.page_size(cache.shape[-1])
    v_rows = fmt.planes(page_size)[1]
    vectors = batch * kv_heads * new
    if vectors == 0:
        return
    with torch.cuda.device_of(cache):
        if fmt.is_lossless:
            store_lossless_kernel[(triton.cdiv(vectors, BLOCK_VECTORS), 2)](
                cache, k, v, seq_lens, *table_arguments(block_table, seq_lens), *cache.stride()[:2],
                *k.stride(), *v.stride(), seq_lens.expand(batch).stride(0), v_rows.offset, vectors,
                kv_heads, new, page_size * (1 if block_table is None else block_table.shape[1]),
                ROW_DTYPE=tl.bfloat16 if fmt.dtype == torch.bfloat16 else tl.float16,
                K_DIM=fmt.head_dim, V_DIM=fmt.v_head_dim, PAGE=tokens_of_page(cache, fmt, block_table),
                BLOCK=BLOCK_VECTORS, **early_launch(cache.device),
            )  # fmt: skip
            return
        take_means(k, seq_lens, beside)
        arguments, constants = store_arguments(
            cache, k, v, seq_lens, k_rotation, v_rotation, fmt, beside, block_table
        )
        if takes(k, v, fmt, beside, block_table):
            store_prompt(arguments, constants, k, fmt)
            return
        wide = max(fmt.head_dim, fmt.v_head_dim) > 256
        store_kernel[(triton.cdiv(vectors, constants["BLOCK"]), 2)](
            *arguments, **constants,
            # 16 x 1024 coordinates are 64 registers of 256 threads.
            num_warps=1 if constants["BLOCK"] < BLOCK_VECTORS else 8 if wide else 4,
            num_stages=1,
        )  # fmt: skip


def store_arguments(
    cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    beside: Beside,
    block_table: torch.Tensor | None,
) -> tuple[tuple, dict]:
    """Arguments and constants of `store_kernel`; a program is a warp if it can be."""
    batch, kv_heads, new, _ = k.shape
    page_size = fmt.page_size(cache.shape[-1])
    offsets = [plane.offset for plane in fmt.planes(page_size)[1:]]
    vectors = batch * kv_heads * new
    lens_stride = seq_lens.expand(batch).stride(0)
    k_mean, exact, exact_from, sink_tokens = beside
    arguments = (
        cache, k, v, seq_lens, k_rotation, v_rotation, k if k_mean is None else k_mean,
        k if exact is None else exact, seq_lens if exact_from is None else exact_from,
        *table_arguments(block_table, seq_lens), *cache.stride()[:2], *k.stride(), *v.stride(), lens_stride,
        0 if exact_from is None else exact_from.expand(batch).stride(0), *offsets, vectors, kv_heads, new,
        page_size * (1 if block_table is None else block_table.shape[1]), beside.segments,
    )  # fmt: skip
    k_lo, k_hi = magnitude_words(fmt.k_bits)
    k_magnitudes, k_unit = quantiser(fmt.k_bits)
    v_magnitudes, v_unit = quantiser(fmt.v_bits)
    dims = (fmt.head_dim, fmt.v_head_dim)
    block = BLOCK_VECTORS
    if all(dim <= 256 and dim & dim - 1 == 0 for dim in dims):
        block = WARP_VECTORS if vectors > FEW_VECTORS else 1
    constants = dict(
        HAS_MEAN=k_mean is not None, HAS_EXACT=exact is not None, SINKS=sink_tokens,
        RECENT=beside.recent_tokens, K_LO=k_lo, K_HI=k_hi,
        K_BITS=fmt.k_bits, V_BITS=fmt.v_bits, K_MAGNITUDES=k_magnitudes,
        V_MAGNITUDES=v_magnitudes, K_UNIT=k_unit, V_UNIT=v_unit, K_DIM=fmt.head_dim,
        V_DIM=fmt.v_head_dim, GROUP=PAGE_ALIGNMENT, PAGE=tokens_of_page(cache, fmt, block_table),
        BLOCK=block,
        BLOCK_K=16,  # with 1024 columns of float32, 64 KiB of shared memory
    )  # fmt: skip
    return arguments, constants
