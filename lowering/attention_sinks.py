"""Attention sinks: one more score per head, appended before the softmax and dropped after it (gpt-oss).

    sinks.reshape(1, -1, 1, 1).expand(B, -1, q, -1)
    cat([scores, sinks], dim=-1) -> softmax -> [..., :-1] -> matmul

The sink of a head takes its share of the attention and has no value.
"""

from __future__ import annotations

from torch import fx

from .find_calls import value_of
from .operations import arguments, operation


def appended_sinks(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """`(scores, sinks [H])` of `cat([scores, sinks], -1)`; None if the last column is anything else."""
    if operation(node) != "cat":
        return None
    named = arguments(node, "tensors", "dim")
    parts, dims = named["tensors"], value_of(node).dim()
    if len(parts) != 2 or dims != 4 or named.get("dim") not in (-1, 3):
        return None
    scores, column = parts
    if value_of(column).shape[-1] != 1:
        return None
    if operation(column) == "expand":
        column = column.args[0]
    heads = column.args[0] if operation(column) in ("reshape", "getitem") else None
    if not isinstance(heads, fx.Node) or value_of(heads).dim() != 1:
        return None
    one_per_head = [1, value_of(heads).shape[0], 1, 1]
    return (scores, heads) if list(value_of(column).shape) == one_per_head else None


def drops_last_column(node: fx.Node) -> bool:
    """`x[..., :-1]`."""
    return operation(node) == "getitem" and node.args[1] in (
        (..., slice(None, -1)),
        (slice(None), slice(None), slice(None), slice(None, -1)),
    )
