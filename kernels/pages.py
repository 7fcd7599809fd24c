"""A cache in pages: the block table of a batch row says in which page a token lies."""

import torch
import triton
import triton.language as tl

from ..format import PAGE_ALIGNMENT, KVFormat

TOGETHER = tl.constexpr(PAGE_ALIGNMENT)  # tokens that are in one page


@triton.jit
def find_tokens(table_ptr, stride, tokens, wanted, PAGE: tl.constexpr):
    """The page (int64) and the slot in it of tokens of one row; page -1: none, or not `wanted`."""
    page = tl.load(table_ptr + tokens // PAGE * stride, mask=wanted, other=-1).to(tl.int64)
    return page, tokens % PAGE


def tokens_of_page(cache: torch.Tensor, fmt: KVFormat, block_table: torch.Tensor | None) -> int:
    """Tokens of a page; 0 without a block table, where a page is all of a batch row."""
    return 0 if block_table is None else fmt.page_size(cache.shape[-1])


def table_arguments(block_table: torch.Tensor | None, other: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The block table and its strides for a kernel; without one any tensor."""
    return (other, 0, 0) if block_table is None else (block_table, *block_table.stride())
