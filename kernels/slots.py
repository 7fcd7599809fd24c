"""Where a new token goes: its place in the cache, and in the copies of exact tokens.

The functions take tensors of any shape, or numbers, and are used by Triton's and Gluon's kernels alike.
"""

import triton
import triton.language as tl


@triton.jit
def locate_page(position, batch, head, cache_stride_b, cache_stride_h, page_size):
    """The offset of the page of these positions, and which of them have a place there."""
    return batch * cache_stride_b + head * cache_stride_h, (position >= 0) & (position < page_size)


@triton.jit
def locate_vectors(
    seq_lens_ptr, lens_stride, cache_stride_b, cache_stride_h, vectors, kv_heads, new, page_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Batch row, KV head, token, position and page offset of this program's vectors.

    And which exist, which is known before the length is read, and which of these are stored.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = index % new
    head = index // new % kv_heads
    batch = index // new // kv_heads
    exists = index < vectors
    length = tl.load(seq_lens_ptr + batch * lens_stride, mask=exists, other=0)
    position = length - new + token
    page, room = locate_page(position, batch, head, cache_stride_b, cache_stride_h, page_size)
    return batch, head, token, position, page, exists, exists & room


@triton.jit
def locate_exact(
    exact_ptr, exact_from_ptr, from_stride, row, batch, position, length, new, exists, valid,
    SINKS: tl.constexpr, RECENT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where copies of the tokens of these vectors go, and of which; sets `exact_from`."""
    from_ptr = exact_from_ptr + batch * from_stride
    exact_from = tl.minimum(tl.load(from_ptr, mask=exists, other=0), length - new)
    tl.store(from_ptr, tl.maximum(exact_from, length - RECENT), mask=exists)
    kept = valid & ((position < SINKS) | (position >= length - RECENT))
    recent = SINKS + (position - SINKS) % max(RECENT, 1)
    slot = tl.where(position < SINKS, position, recent)
    return exact_ptr + (row * (SINKS + RECENT) + slot) * WIDTH, kept
