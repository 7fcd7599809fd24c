"""Keys and values as other programs keep them: in fp8 bytes, in pages; made plain for `varlen_attn`.

What bytes are is declared, never guessed: fp8 e4m3, fp8 e5m2, nvfp4 and our formats all lie in uint8.
"""

from __future__ import annotations

import torch

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def check_stored(
    x: torch.Tensor, dtype: torch.dtype, kv_format: str | None, block_table: torch.Tensor | None
) -> None:
    """Refuse keys or values that are not as `varlen_attn` was told, beside queries of `dtype`.

    Raises:
        ValueError: bytes of no declared or of another format; pages without a block table.
    """
    if kv_format is None and x.element_size() == 1:
        names = ", ".join(FP8)
        raise ValueError(f"keys and values are {x.dtype}, queries {dtype}: say kv_format ({names})")
    if kv_format is not None and kv_format not in FP8:
        raise ValueError(f"kv_format={kv_format!r} is none of {', '.join(FP8)}")
    if kv_format is not None and x.dtype not in (torch.uint8, FP8[kv_format]):
        raise ValueError(f"kv_format={kv_format!r} of a tensor of {x.dtype}")
    if x.dim() != (3 if block_table is None else 4):
        raise ValueError("pages [pages, page_size, heads, D] and a block_table belong together")


def plain_tokens(
    x: torch.Tensor,
    dtype: torch.dtype,
    kv_format: str | None,
    cu_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    longest: int,
) -> torch.Tensor:
    """Tokens `[T, heads, D]` of `dtype`, exactly, of what `check_stored` lets pass.

    See `without_pages` for the last three arguments.

    Args:
        x: `[T, heads, D]`, or `[pages, page_size, heads, D]` with a block table.
        kv_format: a name in `FP8`, of bytes or of a tensor of that fp8 dtype; None of 16 or 32 bits.
    """
    if kv_format is not None:
        x = x.view(torch.uint8)
    if block_table is not None:
        x = without_pages(x, cu_seqlens, block_table, longest)
    return x if kv_format is None else x.view(FP8[kv_format]).to(dtype)


def without_pages(
    pages: torch.Tensor, cu_seqlens: torch.Tensor, block_table: torch.Tensor, longest: int
) -> torch.Tensor:
    """The tokens of all sequences, one behind the other, and after them any; shapes are static.

    Args:
        pages: `[pages, page_size, heads, D]`.
        cu_seqlens: int32 `[sequences + 1]`, on the device.
        block_table: int32 `[sequences, n]`, the pages of each sequence; those not needed may be anything.
        longest: the length of the longest sequence, at most.
    """
    sequences, width = block_table.shape
    page_size = pages.shape[1]
    token = torch.arange(sequences * min(longest, width * page_size), device=pages.device)
    row = torch.searchsorted(cu_seqlens[1:].long(), token, right=True).clamp(max=sequences - 1)
    place = token - cu_seqlens[row]
    page = block_table[row, (place // page_size).clamp(0, width - 1)].long()
    return pages[page.clamp(0, pages.shape[0] - 1), place % page_size]
