"""What a tile of `decode` reads: rows of queries, and rows of keys or values from wherever they lie."""

import triton
import triton.language as tl

from .bits import load_centroids


@triton.jit
def load_query(q_ptr, stride_d, valid, start, inv_peak, OPERAND: tl.constexpr, DIM: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """Coordinates `start`.. of the query rows at `q_ptr` [BLOCK_M], times `inv_peak` if converted."""
    dims = start + tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims < DIM)[None, :]
    q = tl.load(q_ptr[:, None] + dims[None, :] * stride_d, mask=mask, other=0.0)
    if q.dtype == OPERAND:
        return q  # [BLOCK_M, BLOCK_D]
    else:
        return (q * inv_peak[:, None]).to(OPERAND)


@triton.jit
def load_rows(rows_ptr, stride_p, stride_n, slots, start, filled, page, first, BITS: tl.constexpr,
              LO: tl.constexpr, HI: tl.constexpr, OPERAND: tl.constexpr, DIM: tl.constexpr,
              GROUP: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Coordinates `first`.. of the rows of slots `start + slots` of a plane of interleave `GROUP`.

    Zero at and past `filled`, or without a `page` [BLOCK_N], in a lossless format; a packed one yields
    finite centroids there.
    """
    dims = (first + tl.arange(0, BLOCK_D))[None, :]
    if BITS == 16:
        if PAGE > 0:
            known = (start + slots < filled) & (page >= 0)
            row_ptr = rows_ptr + (page * stride_p + (start + slots) % PAGE * stride_n)[:, None]
        else:
            known = start + slots < filled
            row_ptr = rows_ptr + (start + slots).to(tl.int64)[:, None] * stride_n
        x = tl.load(row_ptr + dims, mask=known[:, None] & (dims < DIM), other=0.0)
    else:
        ROW: tl.constexpr = DIM * BITS // 8
        if PAGE > 0:
            known = page >= 0
            slot = (start + slots) % PAGE
            offset = page * stride_p + slot // GROUP * GROUP * ROW + slot % GROUP
            if GROUP > 1:
                offset = tl.max_contiguous(tl.multiple_of(offset, GROUP), GROUP)
            row_ptr = rows_ptr + offset[:, None]
        else:
            # A mask per group of slots, for loads that are as wide as a group.
            group = slots // GROUP * GROUP
            known = start + group < filled
            row_ptr = rows_ptr + tl.cast(start, tl.int64) * ROW + (group * ROW + slots % GROUP)[:, None]
        mask = known[:, None] & (dims < DIM)
        x = load_centroids(row_ptr, dims, mask, BITS, DIM, LO, HI, GROUP)
    return x.to(OPERAND)  # [BLOCK_N, BLOCK_D]
