"""The decode step of a packed cache: append the new tokens and attend."""

import torch

from ..beside import NOTHING, Beside
from ..format import KVFormat
from .decode import decode
from .decode_query import store_and_rotate
from .decode_warp import attend_by_warps, takes
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
    own: bool = False,
) -> torch.Tensor:
    """`store`, then `decode`, if `own` with k and v as they came."""
    if own or q.numel() == 0 or q.shape[2] != k.shape[2] or not takes(q, fmt, cache.shape[1], attn_mask):
        store(cache, k, v, seq_lens, k_rotation, v_rotation, fmt, beside)
        visible = (attn_mask, bounds, sinks)
        last = (beside, (k, v) if own else None)
        return decode(q, cache, seq_lens, k_rotation, v_rotation, *visible, fmt, max_len, scale, *last)
    out = q.new_empty((*q.shape[:-1], fmt.v_head_dim))
    with torch.cuda.device_of(q):
        queries = store_and_rotate(cache, q, k, v, seq_lens, k_rotation, v_rotation, fmt, scale, beside)
        attend_by_warps(
            out, q, queries, cache, seq_lens, v_rotation, bounds, sinks, fmt, max_len, scale, beside
        )
    return out
