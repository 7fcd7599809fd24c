"""The decode step of a packed cache: append the new tokens and attend."""

import torch

from ..beside import NOTHING, Beside
from ..format import KVFormat
from ..results import empty_result
from .decode import decode
from .decode_query import store_and_rotate
from .decode_warp import attend_by_warps, takes
from .exact import exact_work
from .pages import tokens_of_page
from .scores import expand_bounds
from .store import store


def append_and_attend(
    cache: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    fmt: KVFormat,
    max_len: int,
    scale: float,
    beside: Beside = NOTHING,
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
    own: bool = False,
) -> torch.Tensor:
    """`store`, then `decode`, if `own` with k and v as they came."""
    page = tokens_of_page(cache, fmt, block_table)
    by_warps = not own and takes(q, fmt, cache.shape[1], attn_mask, bounds, page, beside)
    if q.numel() == 0 or q.shape[2] != k.shape[2] or not by_warps:
        store(cache, k, v, seq_lens, k_rotation, v_rotation, fmt, beside, block_table)
        visible = (attn_mask, bounds, sinks)
        return decode(
            q, cache, seq_lens, k_rotation, v_rotation, *visible, fmt, max_len, scale, beside, softcap,
            block_table, own=(k, v) if own else None,
        )  # fmt: skip
    out = empty_result(q, fmt.v_head_dim)
    with torch.cuda.device_of(q):
        bounds = expand_bounds(bounds, q)
        work = exact_work(q, cache.shape[1], fmt.v_head_dim, scale, beside, (k, v))
        queries = store_and_rotate(
            cache, q, k, v, seq_lens, k_rotation, v_rotation, fmt, scale, beside, block_table
        )
        attend_by_warps(
            out, q, queries, work, cache, seq_lens, v_rotation, attn_mask, bounds, sinks, fmt,
            max_len, scale, beside, softcap, block_table,
        )  # fmt: skip
    return out
