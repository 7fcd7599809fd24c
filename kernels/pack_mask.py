"""A bool mask as words of 32 bits, which a kernel reads for a row at once.

A tile of a mask of bytes costs a load for each score where rows do not start at a multiple of 16 bytes, and
so many addresses that registers spill: five times the time of attention (docs/kernel-notes.md).
Bytes: the mask once, and an eighth of it written.
"""

import torch
import triton
import triton.language as tl

WORD = tl.constexpr(32)
BLOCK = 128  # words a program


@triton.jit
def pack_mask_kernel(
    mask_ptr, words_ptr, stride_b, stride_h, stride_t, stride_n, heads, q_len, length, row_words, total,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, word = index // row_words, index % row_words
    batch, head, token = row // q_len // heads, row // q_len % heads, row % q_len
    bit = tl.arange(0, WORD)
    key = (word * WORD)[:, None] + bit[None, :]
    row_ptrs = mask_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    row_ptrs += token.to(tl.int64) * stride_t
    inside = (index < total)[:, None] & (key < length)
    seen = tl.load(row_ptrs[:, None] + key.to(tl.int64) * stride_n, mask=inside, other=0) != 0
    words = tl.sum(seen.to(tl.int32) << bit[None, :], axis=1)
    tl.store(words_ptr + index, words, mask=index < total)


def pack_mask(attn_mask: torch.Tensor) -> torch.Tensor:
    """int32 `[..., ceil(L / 32)]` of bool `[..., L]`, of at most four dimensions: `reference_masks`'s."""
    row_words = triton.cdiv(attn_mask.shape[-1], WORD.value)
    words = attn_mask.new_empty((*attn_mask.shape[:-1], row_words), dtype=torch.int32)
    total = words.numel()
    if total:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())].view(torch.uint8)
        _, heads, q_len, length = mask.shape
        with torch.cuda.device_of(mask):
            pack_mask_kernel[(triton.cdiv(total, BLOCK),)](
                mask, words, *mask.stride(), heads, q_len, length, row_words, total, BLOCK=BLOCK
            )
    return words
