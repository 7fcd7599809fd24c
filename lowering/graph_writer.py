"""Insert nodes into a Dynamo graph with what Dynamo would have noted about them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .find_calls import value_of


class GraphWriter:
    """Calls functions on nodes: each call becomes a node, and runs on the fake values of its arguments."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        """New nodes take module path and source line of `like`, a plain tensor, and live on its device."""
        self.graph = graph
        self.meta = {k: v for k, v in like.meta.items() if k != "example_value"}
        fake = value_of(like)
        fake = fake[0] if isinstance(fake, tuple) else fake
        self.device, self._grad = fake.device, fake.requires_grad
        self._mode = fake.fake_mode if isinstance(fake, FakeTensor) else None

    def call(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls a function, or the method of that name of its first argument."""
        method = isinstance(function, str)
        create = self.graph.call_method if method else self.graph.call_function
        node = create(function, args, kwargs)  # type: ignore[arg-type]
        values = fx.node.map_arg((args, kwargs), value_of)
        with self._mode or nullcontext(), torch.set_grad_enabled(self._grad):
            if isinstance(function, str):
                result = getattr(values[0][0], function)(*values[0][1:], **values[1])
            else:
                result = function(*values[0], **values[1])
        node.meta.update(self.meta, example_value=result)
        return node

    def size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """A size of a tensor: a number if it is known, else a node."""
        size = value_of(node).shape[dim]
        return size if isinstance(size, int) else self.call("size", node, dim)
