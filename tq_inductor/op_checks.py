"""What the ops refuse, before they change anything."""

from __future__ import annotations

import torch

from .beside import SEGMENT
from .errors import CacheMismatchError
from .format import KVFormat


def check_softcap(softcap: float | None) -> None:
    """A softcap is a positive number, or None.

    Raises:
        ValueError: it is not.
    """
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap}: needs a positive number, or None for none")


def check_bool_mask(attn_mask: torch.Tensor) -> None:
    """A mask to pack is bool, of one to four dimensions.

    Raises:
        ValueError: it is not.
    """
    if attn_mask.dtype != torch.bool or not 1 <= attn_mask.dim() <= 4:
        given = f"{attn_mask.dtype} {list(attn_mask.shape)}"
        raise ValueError(f"attn_mask is {given}: needs torch.bool, broadcastable to [B, H, q, keys]")


def check_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> None:
    """Keys and values are of the same tokens and heads, and q of keys' size and a multiple of their heads.

    Args:
        heads: the dimension of heads; values may have another size.

    Raises:
        ValueError: they are not.
    """
    alike = q.dim() > 2 and k.dim() > 2 and k.shape[:-1] == v.shape[:-1] and q.shape[-1] == k.shape[-1]
    if not alike or k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]:
        given = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(
            f"{given}: needs as many tokens and heads in k as in v, a size of q like that of k, and a "
            "multiple of k's heads in q"
        )


def check_append(cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fmt: KVFormat, paged: bool) -> None:
    """New tokens `[B, Hkv, q, D]` have the cache's rows, heads and sizes.

    Raises:
        CacheMismatchError: they have not.
    """
    rows = k.shape[0] if paged or not k.dim() else cache.shape[0]
    for name, x, size in (("k", k, fmt.head_dim), ("v", v, fmt.v_head_dim)):
        if x.dim() != 4 or x.shape != (rows, cache.shape[1], k.shape[2], size):
            raise CacheMismatchError(
                f"{name} has shape {list(x.shape)}: needs [{rows}, {cache.shape[1]}, new tokens (as many "
                f"in k as in v), {size}]. Nothing was written."
            )


def check_means(
    k_mean: torch.Tensor | None, batch: int, kv_heads: int, head_dim: int, max_len: int = 0
) -> None:
    """Means of keys are `[batch, KV heads, segments, D]`, contiguous, with segments for `max_len` tokens.

    Raises:
        ValueError: they are not.
    """
    if k_mean is None:
        return
    segments = max(1, -(-max_len // SEGMENT))
    shape = (batch, kv_heads, max(segments, k_mean.shape[2] if k_mean.dim() == 4 else 0), head_dim)
    if k_mean.shape != shape or not k_mean.is_contiguous():
        raise ValueError(
            f"k_mean is {list(k_mean.shape)}, contiguous={k_mean.is_contiguous()}: needs "
            f"[{batch}, {kv_heads}, at least {segments} segments of {SEGMENT} tokens, {head_dim}], and that"
        )


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
