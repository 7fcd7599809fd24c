"""Insert nodes into a Dynamo graph as Dynamo would have: with fake values, module path and stack trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .find_calls import value_of
from .left_alone import LeftAloneError
from .operations import same_sizes


class NewNodes:
    """Calls inserted before one node, as if the user's code at that node had made them."""

    def __init__(self, before: fx.Node) -> None:
        self.before = before
        self._inserted: list[fx.Node] = []
        value = value_of(before)
        first = value[0] if isinstance(value, tuple) else value
        if not isinstance(first, FakeTensor):
            raise LeftAloneError(f"{before.name} is no plain tensor (inside vmap, or a subclass)")
        self._fake_mode, self._grad = first.fake_mode, first.requires_grad

    def __call__(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of a function, or of a tensor's method; its value comes from the fake values."""
        graph = self.before.graph
        with graph.inserting_before(self.before):
            insert = graph.call_method if isinstance(function, str) else graph.call_function
            node = insert(function, args, kwargs)  # type: ignore[arg-type]
        node.meta = dict(self.before.meta)
        call = getattr(torch.Tensor, function) if isinstance(function, str) else function
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), value_of)  # type: ignore[misc]
        with self._fake_mode, torch.set_grad_enabled(self._grad):
            node.meta["example_value"] = call(*fake_args, **fake_kwargs)
        self._inserted.append(node)
        return node

    def erase_unused(self) -> None:
        """Take back what was inserted, as far as nothing uses it."""
        for node in reversed(self._inserted):
            if not node.users:
                self.before.graph.erase_node(node)


def in_layout_of(old: fx.Node, result: fx.Node, new: NewNodes) -> fx.Node:
    """`result`, made contiguous unless it has the strides of `old`, whose `view`s must stay possible."""
    strides = value_of(old).stride(), value_of(result).stride()
    fits = same_sizes(*strides) or value_of(result).is_contiguous() or _only_copied(old)
    return result if fits else new("contiguous", result)


def _only_copied(node: fx.Node) -> bool:
    """Whether all that happens to a result is to be transposed and then copied, as heads are merged."""
    transposed = list(node.users)
    return all(user.target in ("transpose", "permute", torch.transpose) for user in transposed) and all(
        copy.target in ("contiguous", "reshape") for user in transposed for copy in user.users
    )
