"""Insert nodes before another, and take back what turns out not to be needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .find_calls import SPELLED_OTHERWISE, value_of
from .graph_writer import GraphWriter
from .left_alone import LeftAloneError
from .operations import same_layout

BROADCASTING = (torch.add, torch.mul, torch.where, torch.logical_and)


class NewNodes:
    """Calls inserted before one node, as if the user's code at that node had made them."""

    def __init__(self, before: fx.Node) -> None:
        self.before = before
        self._inserted: list[fx.Node] = []
        value = value_of(before)
        if not isinstance(value[0] if isinstance(value, tuple) else value, FakeTensor):
            raise LeftAloneError(f"{before.name} is no plain tensor (inside vmap, or a subclass)")
        self._writer = GraphWriter(before.graph, before)

    def __call__(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of a function, or of a tensor's method; its value comes from the fake values.

        Raises:
            LeftAloneError: operands whose sizes are not known to fit: running it would add a guard.
        """
        if function in BROADCASTING:
            _check_sizes([v.shape for v in map(value_of, args) if isinstance(v, torch.Tensor)])
        with self.before.graph.inserting_before(self.before):
            node = self._writer.call(function, *args, **kwargs)
        if function is F.scaled_dot_product_attention:
            node.meta[SPELLED_OTHERWISE] = True
        self._inserted.append(node)
        return node

    def erase_unused(self) -> None:
        """Take back what was inserted, as far as nothing uses it."""
        for node in reversed(self._inserted):
            if not node.users:
                self.before.graph.erase_node(node)


def _check_sizes(shapes: list[torch.Size]) -> None:
    for a, b in itertools.combinations(shapes, 2):
        for x, y in zip(reversed(a), reversed(b), strict=False):
            if not (_is_one(x) or _is_one(y) or statically_known_true(x == y)):
                raise LeftAloneError(f"sizes {x} and {y} are not known to be equal")


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def in_layout_of(old: fx.Node, result: fx.Node, new: NewNodes) -> fx.Node:
    """`result`, made contiguous unless it has the strides of `old`, whose `view`s must stay possible."""
    fits = (
        same_layout(value_of(old), value_of(result))
        or value_of(result).is_contiguous()
        or _only_copied(old)
    )
    return result if fits else new("contiguous", result)


def _only_copied(node: fx.Node) -> bool:
    """Whether all that happens to a result is to be transposed and then copied, as heads are merged."""
    transposed = list(node.users)
    return all(user.target in ("transpose", "permute", torch.transpose) for user in transposed) and all(
        copy.target in ("contiguous", "reshape") for user in transposed for copy in user.users
    )
