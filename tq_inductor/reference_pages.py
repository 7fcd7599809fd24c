"""Where the tokens of a packed cache lie, in plain torch: in one page a batch row, or by a block table.

Part of the specification in `reference`. `P` pages, `B` batch rows.
"""

from __future__ import annotations

import torch


def place(
    rows: torch.Tensor, positions: torch.Tensor, block_table: torch.Tensor | None, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The page, -1 if it has none, and the slot in it of tokens `[n]`, all within the table."""
    if block_table is None:
        return rows, positions
    return block_table[rows, positions // page_size].long(), positions % page_size


def capacity(block_table: torch.Tensor | None, page_size: int) -> int:
    """Tokens of a row."""
    return page_size * (1 if block_table is None else block_table.shape[1])


def rows_of(plane: torch.Tensor, block_table: torch.Tensor | None) -> torch.Tensor:
    """A plane `[P, Hkv, n, ...]` of pages as one of batch rows `[B, Hkv, pages of a row * n, ...]`.

    What has no page shows some other's.
    """
    if block_table is None:
        return plane
    return plane[block_table.clamp(min=0)].transpose(1, 2).flatten(2, 3)


def has_no_page(block_table: torch.Tensor, page_size: int, tokens: int) -> torch.Tensor:
    """Which of the first tokens of each row have none, bool `[B, tokens]`."""
    return (block_table < 0).repeat_interleave(page_size, 1)[:, :tokens]
