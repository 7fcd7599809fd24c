"""Which torch operation a node is, however it is spelled: operator, function, method, in place or not."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .find_calls import value_of
from .writes import IN_PLACE_OPERATORS, storages, written

_SAME = {
    "bmm": "matmul",
    "truediv": "div", "true_divide": "div", "divide": "div", "itruediv": "div",
    "multiply": "mul", "imul": "mul", "iadd": "add", "subtract": "sub", "isub": "sub",
    "swapaxes": "transpose", "swapdims": "transpose",
    "invert": "logical_not", "bitwise_not": "logical_not",
    "concat": "cat", "concatenate": "cat", "view": "reshape",
}  # fmt: skip
_NAMES = {
    *_SAME, *_SAME.values(),
    "add", "amax", "baddbmm", "clone", "contiguous", "detach", "dropout", "einsum", "eq", "expand",
    "expand_as", "flatten", "full", "getitem", "masked_fill", "max", "permute", "scalar_tensor",
    "softmax", "squeeze", "tanh", "tensor", "unflatten", "unsqueeze", "where", "zeros",
}  # fmt: skip
_METHODS = _NAMES | {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_FUNCTIONS = {
    getattr(owner, name): _SAME.get(name, name)
    for owner in (torch, F, operator)
    for name in sorted(_NAMES)
    if hasattr(owner, name)
} | {torch.special.softmax: "softmax", torch.ops.aten._safe_softmax: "_safe_softmax"}


def operation(node: Any) -> str | None:
    """The operation's plain name, e.g. "add" for `a + b`, `a += b`, `torch.add` and `a.add_`; or None."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_method":
        name = str(node.target)
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        return _SAME.get(name, name) if name in _METHODS else None
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def in_place(node: fx.Node) -> bool:
    """Whether a node that has an `operation` writes its result into its first argument."""
    name = str(node.target) if node.op == "call_method" else name_of(node)
    return name.endswith("_") if node.op == "call_method" else name in IN_PLACE_OPERATORS


def name_of(node: fx.Node) -> str:
    """What to call a node's operation in a reason."""
    return getattr(node.target, "__name__", str(node.target)).strip("_")


def arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """Arguments by name, however they were passed."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def same_sizes(first: Any, second: Any) -> bool:
    """Whether two shapes are known to be equal; adds no guard."""
    return len(first) == len(second) and all(
        statically_known_true(a == b) for a, b in zip(first, second, strict=True)
    )


def same_layout(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape are known to lie alike; adds no guard."""
    steps = zip(first.shape, first.stride(), second.stride(), strict=True)
    return all(statically_known_true(size == 1) or statically_known_true(a == b) for size, a, b in steps)


def known_number(x: Any) -> float | None:
    """The value of a number, or of a tensor that the graph makes from one number, if known here."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    name = operation(x)
    if name == "full":
        number = arguments(x, "size", "fill_value").get("fill_value")
    elif name in ("tensor", "scalar_tensor"):
        number = x.args[0] if x.args else None
    else:
        return None
    value = value_of(x)
    if not isinstance(number, (int, float)) or value.dim() != 0:
        return None
    if any(x in written(user) or storages(user) & storages(x) for user in x.users):
        return None  # changed in place, or perhaps through a view
    return float(torch.tensor(number, dtype=value.dtype))


def untransposed(node: fx.Node) -> fx.Node | None:
    """`x` of `x.transpose(-2, -1)`, in any spelling; None for anything else."""
    dims = value_of(node).dim()
    x: Any = node.args[0] if node.args else None
    if node.target is getattr and node.args[1] in ("mT", "T"):
        return x if node.args[1] == "mT" or dims == 2 else None
    name = operation(node)
    if name == "transpose":
        swapped = {node.args[1] % dims, node.args[2] % dims} if len(node.args) == 3 else set()  # type: ignore[operator]
        return x if swapped == {dims - 2, dims - 1} else None
    if name == "permute":
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        wanted = [*range(dims - 2), dims - 1, dims - 2]
        return x if [d % dims for d in order] == wanted else None  # type: ignore[operator]
    return None
