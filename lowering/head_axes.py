"""The batch and head axes of hand-written attention: SDPA's are `[B, H, n, d]`, `bmm`'s `[B * H, n, d]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .find_calls import static_size, value_of
from .left_alone import LeftAloneError
from .new_nodes import NewNodes
from .operations import operation, same_sizes
from .writes import Writes


class HeadAxes:
    """Brings factors and masks of 3-D and 4-D scores to four axes, and the result back.

    Scores that are 4-D somewhere say what `[B * H]` stands for; scores that are 3-D throughout are those
    of N heads of one batch.
    """

    def __init__(self, scores: list[fx.Node], new: NewNodes, writes: Writes) -> None:
        """Args: `scores` are all nodes whose values are `[..., q, k]`; `new` inserts what is needed."""
        self._new, self._writes = new, writes
        leads = [value_of(node).shape[:-2] for node in scores]
        dims = {len(lead) + 2 for lead in leads} - {3, 4}
        if dims:
            raise LeftAloneError(f"the scores have {dims.pop()} dimensions (needs 3 or 4)")
        grouped = [lead for lead in leads if len(lead) == 2]
        if any(not same_sizes(lead, grouped[0]) for lead in grouped):
            raise LeftAloneError("the scores' heads are grouped in two ways")
        self._group = grouped[0] if grouped else None

    def of_factor(self, node: fx.Node, dims: tuple[int, ...] | None, scores: fx.Node) -> fx.Node:
        """A factor with four axes, first put in the order `dims`; `scores` has the axes of its product."""
        value = value_of(node)
        if value.dim() != value_of(scores).dim():
            raise LeftAloneError(f"a factor has {value.dim()} dimensions, the scores others")
        if value.dim() == 3 and dims is None and self._group is not None:
            source: Any = node.args[0] if operation(node) in ("reshape", "flatten") else None
            expected = (*self._group, *value.shape[1:])
            regrouped = source is not None and same_sizes(value_of(source).shape, expected)
            if regrouped and not self._writes.between(node, self._new.before, source):
                return source
        if dims is not None:
            node = self._new(torch.permute, node, dims)
        return node if value.dim() == 4 else self._split(node)

    def of_mask(self, mask: fx.Node, scores: fx.Node) -> fx.Node:
        """A mask that broadcasts with `scores`, so that it broadcasts with `[B, H, q, k]`."""
        dims = value_of(mask).dim()
        if dims == 0:
            raise LeftAloneError(f"{mask.name}, a single number, masks the scores or is added to them")
        if dims == 3 and value_of(scores).dim() == 3 and static_size(value_of(mask), -3) != 1:
            return self._split(mask)
        return self._new(torch.unsqueeze, mask, 0) if dims in (1, 3) else mask

    def back(self, result: fx.Node, weights: fx.Node) -> fx.Node:
        """SDPA's result with the axes of the attention weights' product."""
        if value_of(weights).dim() == 4:
            return result
        if self._group is None:
            return self._new(torch.squeeze, result, 0)
        return self._new(torch.flatten, result, 0, 1)

    def _split(self, node: fx.Node) -> fx.Node:
        """`[B * H, ...]` to `[B, H, ...]`."""
        if self._group is None:
            return self._new(torch.unsqueeze, node, 0)
        batch, heads = self._group
        if not same_sizes(value_of(node).shape[:1], [batch * heads]):
            raise LeftAloneError(f"{node.name} has {value_of(node).shape[0]} heads in all")
        if not isinstance(heads, int):
            raise LeftAloneError("the number of heads is not known at compile time")
        return self._new("unflatten", node, 0, (batch if isinstance(batch, int) else -1, heads))


def grouped_heads(query: fx.Node, key: fx.Node, value: fx.Node) -> bool:
    """Whether one KV head serves all of the query's (SDPA's `enable_gqa`).

    Raises:
        LeftAloneError: shapes broadcast in a way that SDPA does not.
    """
    q, k, v = (value_of(x).shape[:2] for x in (query, key, value))
    if same_sizes(k, v) and same_sizes(q, k):
        return False
    if same_sizes(k, v) and same_sizes(q[:1], k[:1]) and same_sizes(k[1:], [1]):
        return True
    shapes = ", ".join(f"{name}={list(lead)}" for name, lead in (("q", q), ("k", k), ("v", v)))
    raise LeftAloneError(f"batches and heads broadcast: {shapes}")
