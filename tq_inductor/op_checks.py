"""What the ops refuse, before they change anything."""

from __future__ import annotations

import torch

from .format import KVFormat


def check_softcap(softcap: float | None) -> None:
    """A softcap is a positive number, or None.

    Raises:
        ValueError: it is not.
    """
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap}: needs a positive number, or None for none")


def check_block_table(
    block_table: torch.Tensor | None, cache: torch.Tensor, fmt: KVFormat, batch: int, max_len: int = 0
) -> None:
    """A block table is int32 `[batch, n]` beside a cache in pages, with room for `max_len` tokens.

    Raises:
        ValueError: it is not; FormatError: a page is not of a multiple of 16 tokens.
    """
    if block_table is None:
        return
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        given = f"{block_table.dtype} {list(block_table.shape)}"
        raise ValueError(f"block_table is {given}: needs torch.int32 [{batch}, pages of a row]")
    if block_table.device != cache.device:
        raise ValueError(f"block_table is on {block_table.device}, the cache on {cache.device}")
    page_size = fmt.page_size(cache.shape[-1])
    fmt.planes(page_size)
    if page_size == 0 or cache.shape[-1] % fmt.slot_bytes:
        raise ValueError(f"pages of {cache.shape[-1]} bytes: needs a multiple of {16 * fmt.slot_bytes}")
    if not 0 < max(1, max_len) <= page_size * block_table.shape[1]:
        pages = f"{block_table.shape[1]} pages of {page_size} tokens"
        raise ValueError(f"max_len={max_len}: a row of the block table has {pages}")
