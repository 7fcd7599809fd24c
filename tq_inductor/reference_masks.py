"""What masks and bounds let a query see: the specification of those arguments of the ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

WORD = 32  # keys whose bits a word has


def pack_mask(attn_mask: torch.Tensor) -> torch.Tensor:
    """int32 `[..., ceil(L / 32)]` of bool `[..., L]`: bit j of word w is key 32 w + j, 0 past the last."""
    bits = F.pad(attn_mask, (0, -attn_mask.shape[-1] % WORD)).unflatten(-1, (-1, WORD)).to(torch.int32)
    return (bits << _places(attn_mask)).sum(-1, dtype=torch.int32)


def unpack_mask(words: torch.Tensor, max_len: int) -> torch.Tensor:
    """Bool `[..., max_len]` of what `pack_mask` gave."""
    return ((words[..., None] >> _places(words)) & 1).flatten(-2)[..., :max_len] != 0


def visible_keys(
    attn_mask: torch.Tensor | None, bounds: torch.Tensor | None, max_len: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What mask and bounds let each query see: `(visible [B|1, H|1, q|1, max_len], bias or None)`."""
    visible, bias = torch.ones(1, 1, 1, max_len, dtype=torch.bool), None
    if attn_mask is not None:
        visible = attn_mask[(None,) * (4 - attn_mask.dim())]
        if visible.dtype == torch.int32:
            visible = unpack_mask(visible, max_len)
        visible = visible.expand(*visible.shape[:-1], max_len)
        if visible.dtype != torch.bool:
            visible, bias = ~visible.isneginf(), visible.to(torch.float32)
    if bounds is not None:
        slot = torch.arange(max_len, device=bounds.device)
        first, end = bounds[:, None, :, :1], bounds[:, None, :, 1:2]
        visible = visible & (first <= slot) & (slot < end)
    return visible, bias


def last_tokens(seq_lens: torch.Tensor, batch: int, q_len: int) -> torch.Tensor:
    """Bounds of queries that are the last `q_len` tokens of each row: causal, aligned bottom-right."""
    ends = seq_lens.reshape(-1, 1) - q_len + 1 + torch.arange(q_len, device=seq_lens.device)
    return torch.stack((torch.zeros_like(ends), ends), -1).expand(batch, q_len, 2)


def visible_range(visible: torch.Tensor) -> slice:
    """The slots between the first and the last that anything sees; one if nothing is seen."""
    columns = visible.flatten(0, -2).any(0).nonzero().flatten().tolist() or [0]
    return slice(columns[0], columns[-1] + 1)


def _places(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(WORD, dtype=torch.int32, device=like.device)
