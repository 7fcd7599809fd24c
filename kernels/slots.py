"""Where a new token goes: its place in the cache, paged or not, and in the copies of exact tokens.

The functions take tensors of any shape, or numbers, and are used by Triton's and Gluon's kernels alike.
"""

import triton
import triton.language as tl

from .pages import find_tokens


@triton.jit
def locate_page(position, batch, head, cache_stride_b, cache_stride_h, page_size):
    """Of one page a batch row: its offset, and for which of these positions there is room."""
    return batch * cache_stride_b + head * cache_stride_h, (position >= 0) & (position < page_size)


@triton.jit
def locate_vectors(
    seq_lens_ptr, lens_stride, table_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h,
    vectors, kv_heads, new, capacity, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Batch row, KV head, token, position, page offset and slot in the page of this program's vectors.

    And which exist, which is known before the length is read, which of these a row of `capacity` tokens
    has room for, and which of these are stored.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = index % new
    head = index // new % kv_heads
    batch = index // new // kv_heads
    exists = index < vectors
    length = tl.load(seq_lens_ptr + batch * lens_stride, mask=exists, other=0)
    position = length - new + token
    page, room = locate_page(position, batch, head, cache_stride_b, cache_stride_h, capacity)
    inside = exists & room
    if PAGE > 0:
        number, slot = find_tokens(
            table_ptr + batch * table_stride_b, table_stride_n, position, inside, PAGE
        )
        page, valid = number * cache_stride_b + head * cache_stride_h, number >= 0
    else:
        slot, valid = position, inside
    return batch, head, token, position, page, slot, exists, inside, valid


@triton.jit
def locate_exact(
    exact_ptr, exact_from_ptr, from_stride, row, batch, position, length, new, exists, inside,
    SINKS: tl.constexpr, RECENT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where copies of the tokens of these vectors go, and of which; sets `exact_from`."""
    from_ptr = exact_from_ptr + batch * from_stride
    exact_from = tl.minimum(tl.load(from_ptr, mask=exists, other=0), length - new)
    tl.store(from_ptr, tl.maximum(exact_from, length - RECENT), mask=exists)
    kept = inside & ((position < SINKS) | (position >= length - RECENT))
    recent = SINKS + (position - SINKS) % max(RECENT, 1)
    slot = tl.where(position < SINKS, position, recent)
    return exact_ptr + (row * (SINKS + RECENT) + slot) * WIDTH, kept
