"""Which nodes of a graph write to which memory.

Dynamo's graph says nothing about aliasing: a cache is written by `index_copy_` and then read through
its placeholder. Whoever moves a read, or takes a tensor for the value it had when it was computed,
asks here whether its memory changed meanwhile.
"""

from __future__ import annotations

import inspect
import operator
from types import FunctionType
from typing import Any

import torch
from torch import fx

from .find_calls import value_of

IN_PLACE_OPERATORS = {
    "setitem",
    "delitem",
    "iadd",
    "iand",
    "iconcat",
    "ifloordiv",
    "ilshift",
    "imatmul",
    "imod",
    "imul",
    "ior",
    "ipow",
    "irshift",
    "isub",
    "itruediv",
    "ixor",
}  # of `operator`


def storages(*nodes: Any) -> set[int]:
    """The memory of the tensors that Dynamo saw at these nodes."""
    tensors = [v for v in map(value_of, nodes) if isinstance(v, torch.Tensor)]
    return {_unwrapped(t).untyped_storage()._cdata for t in tensors}


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that has memory, inside `vmap` and `grad` (flex_attention makes its masks in a vmap)."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node may write to; all of them when in doubt."""
    if node.op == "call_method":
        in_place = str(node.target).endswith("_") and not str(node.target).endswith("__")
        return node.all_input_nodes[:1] if in_place else []
    if node.op != "call_function":
        return node.all_input_nodes if node.op == "call_module" else []
    target = node.target
    overload = getattr(target, "default", target)
    if isinstance(overload, torch._ops.OpOverload):
        arguments = overload._schema.arguments
        named = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
        found = [named.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
        given = [x for x in found if x is not None]  # an optional argument may be left out
        plain = [x for x in given if isinstance(x, fx.Node)]
        return plain if len(plain) == len(given) else node.all_input_nodes
    if isinstance(target, torch._ops.HigherOrderOperator) or "out" in node.kwargs:
        return node.all_input_nodes
    name = getattr(target, "__name__", "")
    in_place = name in IN_PLACE_OPERATORS or (
        name.endswith("_") and target not in (operator.and_, operator.or_)
    )
    if isinstance(target, FunctionType) and _inplace_argument(node, target):
        return node.all_input_nodes[:1]
    return node.all_input_nodes if in_place else []


def _inplace_argument(node: fx.Node, function: FunctionType) -> Any:
    """What a function such as `F.relu` was given as `inplace`; False if it has no such argument."""
    names = list(inspect.signature(function).parameters)
    return (dict(zip(names, node.args, strict=False)) | node.kwargs).get("inplace", False)


class Writes:
    """The writes of one graph, as it was when this was made.

    Nodes inserted later are unknown to it: ask about original nodes only, and insert none that write
    to memory other than the node it replaces does.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        found = ((node, storages(*written(node))) for node in graph.nodes)
        self._writers = [(node, memory) for node, memory in found if memory]

    def between(self, first: fx.Node, last: fx.Node, *tensors: Any) -> list[fx.Node]:
        """Nodes after `first` and before `last` that may write to the memory of any of `tensors`."""
        memory = storages(*tensors)
        start, end = self._order[first], self._order[last]
        return [n for n, written in self._writers if start < self._order[n] < end and memory & written]

    def before(self, node: fx.Node, tensor: fx.Node) -> int:
        """How often the memory of `tensor` may have been written when `node` starts."""
        return self._count(self._order[node], tensor)

    def until(self, node: fx.Node, tensor: fx.Node) -> int:
        """How often the memory of `tensor` may have been written when `node` is done."""
        return self._count(self._order[node] + 1, tensor)

    def _count(self, end: int, tensor: fx.Node) -> int:
        memory = storages(tensor)
        return sum(self._order[n] < end and bool(memory & written) for n, written in self._writers)
