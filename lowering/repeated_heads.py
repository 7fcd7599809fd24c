"""Undo the repetition of KV heads.

    k[:, :, None].expand(B, Hkv, n, L, D).reshape(B, Hkv * n, L, D)   (transformers' repeat_kv)
    k.repeat_interleave(n, dim=1)                                      ->  k

`k.repeat(1, n, 1, 1)` is left alone: it puts the heads in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .find_calls import value_of
from .operations import same_sizes
from .writes import Writes

FULL = slice(None)


def _method(node: Any, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in names


def _new_head_axis(node: Any) -> fx.Node | None:
    """`x` of `x[:, :, None]` (with or without trailing colons) or `x.unsqueeze(2)`."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        index = node.args[1]
        if isinstance(index, tuple) and index[:3] == (FULL, FULL, None):
            return node.args[0] if all(i in (FULL, ...) for i in index[3:]) else None  # type: ignore[return-value]
    if (_method(node, "unsqueeze") or node.target is torch.unsqueeze) and node.args[1:] == (2,):
        return node.args[0]  # type: ignore[return-value]
    return None


def strip_repeated_heads(node: fx.Node, attention: fx.Node, writes: Writes) -> tuple[fx.Node, int]:
    """`(the tensor before repetition, how often each head was repeated)`; `(node, 1)` if none was.

    A repetition is a copy: one that is written to before `attention`, or whose source is, stays.
    """
    base, first, repeats = _before_repetition(node)
    if repeats == 1 or writes.between(first, attention, base, node):
        return node, 1
    return base, repeats


def _before_repetition(node: fx.Node) -> tuple[fx.Node, fx.Node, int]:
    """(the tensor before repetition, the first node that reads it, how often)."""
    if _method(node, "contiguous"):
        return _before_repetition(node.args[0])  # type: ignore[arg-type]
    if _method(node, "reshape", "view", "flatten"):
        expand = node.args[0]
        base = _new_head_axis(expand.args[0]) if _method(expand, "expand") else None  # type: ignore[union-attr]
        if base is not None:
            before, repeated, after = value_of(base), value_of(expand), value_of(node)
            n = repeated.shape[2]
            expected = [*before.shape[:1], before.shape[1] * n, *before.shape[2:]]
            if isinstance(n, int) and same_sizes(after.shape, expected):
                return base, expand.args[0], n  # type: ignore[union-attr, return-value]
    if _method(node, "repeat_interleave") or node.target is torch.repeat_interleave:
        named = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | node.kwargs
        if named.get("dim") in (1, -3) and isinstance(named.get("repeats"), int):
            return named["input"], node, named["repeats"]  # type: ignore[return-value]
    return node, node, 1
