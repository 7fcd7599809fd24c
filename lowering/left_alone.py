"""Attention that is not rewritten into `scaled_dot_product_attention`, and its row in the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..attention.call import AttentionCall
from ..attention.select import Choice
from ..report import CallRow, row_of


class LeftAloneError(Exception):
    """This is attention, but it cannot be rewritten exactly; the message is the reason."""


def sizes_of(q: Any, k: Any, v: Any) -> dict[str, Any]:
    """Sizes of `AttentionCall` from shapes `[B, H, n, d]`."""
    names = ("batch_size", "num_heads", "q_len", "head_dim")
    sizes = dict(zip(names, q, strict=True))
    return sizes | {"num_kv_heads": k[1], "kv_len": k[2], "v_head_dim": v[3]}


def row_of_left(node: fx.Node, value: Any, sizes: dict[str, Any], reason: str) -> CallRow:
    """The row of a call that stays as it is.

    Args:
        node: where it happens.
        value: one of its (fake) tensors, for dtype and device.
        sizes: those sizes of `AttentionCall` that are known; symbolic ones count as unknown.
    """
    names = ("batch_size", "q_len", "kv_len", "num_heads", "num_kv_heads", "head_dim", "v_head_dim")
    known: dict[str, Any] = {name: sizes.get(name) for name in names}
    known = {name: size if isinstance(size, int) else None for name, size in known.items()}
    is_tensor = isinstance(value, torch.Tensor)
    call = AttentionCall(
        **known,
        dtype=value.dtype if is_tensor else torch.get_default_dtype(),
        device=value.device.type if is_tensor else "?",
        visible="not looked at",
        kv_source="not looked at",
    )
    return row_of(node, call, Choice("none", {"sdpa": [reason]})).with_rewritten(False)
