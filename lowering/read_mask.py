"""Read a mask off the graph: the expression of its indices that a tensor node computes.

`MaskReader.read(node, at, reader)` goes from a node backwards through broadcasting, indexing,
comparisons and logic to `arange`s, sizes and the tensors that it cannot look into, which stay as
`Element`s. It is exact or it does not look: an operation not known here, a dtype that could round, an
index that could wrap around, a tensor that was written to after it was computed end as `Element`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import index_expr as ix
from .find_calls import value_of
from .index_expr import Constant, Element, Expr
from .mask_arithmetic import (
    INTEGERS,
    NotReadable,
    converted,
    elementwise,
    is_bool,
    is_integer,
    rounded,
)
from .writes import Writes

ZERO = Constant(0)
SHAPE_ONLY = {
    "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as",
}  # fmt: skip
SAME_VALUES = {
    "to", "bool", "long", "int", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone",
    "detach", "cpu", "cuda", "expand", "expand_as", "broadcast_to",
}  # fmt: skip
IN_PLACE = {
    "masked_fill_", "tril_", "triu_", "logical_and_", "logical_or_", "logical_not_", "bitwise_and_",
    "bitwise_or_", "bitwise_not_", "add_", "sub_", "mul_",
}  # fmt: skip
CREATION = {"ones": 1, "zeros": 0, "new_ones": 1, "new_zeros": 0, "ones_like": 1, "zeros_like": 0}
FILL_POSITION = {"full": 1, "new_full": 2, "full_like": 1, "tensor": 0, "scalar_tensor": 0}


def is_one(size: Any) -> bool:
    """Whether a size is known to be 1; adds no guard."""
    return isinstance(size, int) and size == 1


class MaskReader:
    """Reads expressions off one graph."""

    def __init__(self, writes: Writes) -> None:
        self._writes = writes
        self._known: dict[tuple[fx.Node, tuple[Expr, ...], fx.Node], Expr] = {}

    def read(self, node: fx.Node, at: tuple[Expr, ...], reader: fx.Node) -> Expr:
        """The element `at` of a tensor node, as `reader` sees it."""
        key = (node, at, reader)
        if key not in self._known:
            self._known[key] = self._read(node, at, reader)
        return self._known[key]

    def broadcast(self, x: Any, at: tuple[Expr, ...], reader: fx.Node) -> Expr:
        """As `read`, of an operand (a node or a number) that broadcasts to the shape that `at` indexes."""
        if isinstance(x, bool | int | float):
            return Constant(x)
        if not isinstance(x, fx.Node):
            raise NotReadable
        value = value_of(x)
        if not isinstance(value, torch.Tensor):
            return Element(x, (), 0)  # a size: never written to
        if value.dim() > len(at):
            raise NotReadable
        tail = at[len(at) - value.dim() :]
        inner = tuple(ZERO if is_one(s) else i for s, i in zip(value.shape, tail, strict=True))
        return self.read(x, inner, reader)

    def _read(self, node: fx.Node, at: tuple[Expr, ...], reader: fx.Node) -> Expr:
        computed_only = node.op in ("call_function", "call_method")
        if computed_only and not self._writes.between(node, reader, node):
            try:
                return self._look_into(node, at)
            except NotReadable:
                pass
        return Element(node, at, self._writes.before(reader, node))

    def _look_into(self, node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_method" and name in IN_PLACE:
            name = name[:-1]  # what it read, it read before it wrote
        out, args, kwargs = value_of(node), node.args, node.kwargs
        if not isinstance(out, torch.Tensor) or out.dim() != len(at) or "out" in kwargs:
            raise NotReadable
        if name == "arange":
            return self._arange(node, at)
        if name in CREATION or name in FILL_POSITION:
            return self._filled(name, node)
        if name in SAME_VALUES and isinstance(args[0], fx.Node):
            return converted(self.broadcast(args[0], at, node), value_of(args[0]).dtype, out.dtype)
        if name in SHAPE_ONLY:
            return self._reshaped(node, at)
        if name in ("transpose", "swapaxes", "permute"):
            return self._permuted(name, node, at)
        if name == "getitem":
            return self._indexed(node, at)
        if name in ("tril", "triu"):
            return self._triangle(name, node, at)
        if name in ("where", "masked_fill"):
            return self._choice(name, node, at)
        if kwargs:
            raise NotReadable
        return elementwise(name, list(args), [self.broadcast(x, at, node) for x in args], out.dtype)

    def _arange(self, node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        start = node.args[0] if len(node.args) >= 2 else node.kwargs.get("start", 0)
        step = node.args[2] if len(node.args) == 3 else node.kwargs.get("step", 1)
        if not isinstance(step, int) or value_of(node).dtype not in INTEGERS or not is_integer(start):
            raise NotReadable
        return ix.add(self.broadcast(start, (), node), ix.scaled(at[0], step))

    def _filled(self, name: str, node: fx.Node) -> Expr:
        dtype = value_of(node).dtype
        fill: Any = CREATION.get(name)
        if fill is None:
            rest = node.args[FILL_POSITION[name] :]
            fill = rest[0] if rest else node.kwargs.get("fill_value")
        if not isinstance(fill, bool | int | float):
            if dtype in INTEGERS and is_integer(fill):
                return self.broadcast(fill, (), node)
            raise NotReadable
        if dtype == torch.bool:
            return Constant(bool(fill))
        return Constant(int(fill)) if dtype in INTEGERS else Constant(rounded(float(fill), dtype))

    def _choice(self, name: str, node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        if len(node.args) != 3 or node.kwargs:
            raise NotReadable
        x, y, z = node.args
        condition, a, b = (y, z, x) if name == "masked_fill" else (x, y, z)
        if name == "where" and node.op == "call_method":  # a.where(condition, b)
            condition, a = a, condition
        if not is_bool(condition):
            raise NotReadable
        dtype = value_of(node).dtype
        branches = [self.broadcast(v, at, node) for v in (a, b)]
        if dtype.is_floating_point:
            branches = [
                Constant(rounded(float(v.value), dtype)) if isinstance(v, Constant) else v for v in branches
            ]
        return ix.where(self.broadcast(condition, at, node), *branches)

    def _reshaped(self, node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        """Dimensions of size 1 come and go; the others must keep their sizes and order."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or value_of(source).dtype != value_of(node).dtype:
            raise NotReadable
        before, after = value_of(source).shape, value_of(node).shape
        if [str(s) for s in before if not is_one(s)] != [str(s) for s in after if not is_one(s)]:
            raise NotReadable
        kept = [i for s, i in zip(after, at, strict=True) if not is_one(s)]
        return self.read(source, tuple(ZERO if is_one(s) else kept.pop(0) for s in before), node)

    def _permuted(self, name: str, node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        source, *dims = node.args
        if len(dims) == 1 and isinstance(dims[0], tuple | list):
            dims = list(dims[0])
        if not isinstance(source, fx.Node) or not all(isinstance(d, int) for d in dims):
            raise NotReadable
        order = list(range(len(at)))
        if name == "permute" and len(dims) == len(at):
            order = [d % len(at) for d in dims]  # type: ignore[operator, misc]
        elif name != "permute" and len(dims) == 2:
            a, b = dims
            order[a], order[b] = order[b], order[a]  # type: ignore[index]
        else:
            raise NotReadable
        inner: list[Expr] = [ZERO] * len(at)
        for place, source_dim in enumerate(order):
            inner[source_dim] = at[place]
        return self.read(source, tuple(inner), node)

    def _triangle(self, name: str, node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        row, column = at[-2:]
        edge = ix.add(row, self.broadcast(diagonal, (), node))
        inside = ix.at_most(column, edge) if name == "tril" else ix.at_most(edge, column)
        x = self.broadcast(node.args[0], at, node)
        dtype = value_of(node).dtype
        if dtype == torch.bool:
            return ix.and_(inside, x)
        return ix.where(inside, x, ZERO if dtype in INTEGERS else Constant(0.0))

    def _indexed(self, node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        source, index = node.args
        if not isinstance(source, fx.Node) or not isinstance(value_of(source), torch.Tensor):
            raise NotReadable
        items = list(index) if isinstance(index, tuple) else [index]
        tensors = [i for i in items if isinstance(value_of(i), torch.Tensor)]
        if len(tensors) > 1:
            return self._gathered(source, items, node, at)
        taken = sum(i is not None and i is not Ellipsis for i in items)
        if Ellipsis not in items:
            items.append(Ellipsis)
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (value_of(source).dim() - taken)
        inner: list[Expr] = []
        rest = list(at)
        for item in items:
            if item is None:
                rest.pop(0)
            elif isinstance(item, int) and not isinstance(item, bool) and item >= 0:
                inner.append(Constant(item))
            elif isinstance(item, slice) and item.step in (None, 1):
                start = item.start or 0
                if not isinstance(start, int) or start < 0:
                    raise NotReadable
                inner.append(ix.add(rest.pop(0), Constant(start)))
            elif item in tensors and is_integer(item):
                dims = value_of(item).dim()
                size = value_of(source).shape[len(inner)]
                inner.append(_wrapped(self.broadcast(item, tuple(rest[:dims]), node), size))
                rest = rest[dims:]
            else:
                raise NotReadable
        return self.read(source, tuple(inner), node)

    def _gathered(self, source: fx.Node, items: list[Any], node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        """`table[i, j]` with an integer for every dimension."""
        if len(items) != value_of(source).dim() or not all(is_integer(i) for i in items):
            raise NotReadable
        indices = [self.broadcast(i, at, node) for i in items]
        sizes = value_of(source).shape
        return self.read(source, tuple(map(_wrapped, indices, sizes)), node)


def _wrapped(index: Expr, size: Any) -> Expr:
    """An index into a dimension of `size`, a negative one counted from the end."""
    if _never_negative(index):
        return index
    if not isinstance(size, int):
        raise NotReadable
    return ix.where(ix.at_most(ZERO, index), index, ix.add(index, Constant(size)))


def _never_negative(x: Expr) -> bool:
    """Whether this sum of indices, sizes and numbers cannot be below zero."""
    total = ix.linear(x)
    known = all(isinstance(t, ix.Index) or _is_size(t) for t in total.terms)
    return known and total.constant >= 0 and all(c > 0 for c in total.terms.values())


def _is_size(x: Expr) -> bool:
    """Whether this is a symbolic size or count, known not to be negative."""
    value = value_of(x.node) if isinstance(x, Element) else None
    return isinstance(value, torch.SymInt) and statically_known_true(value >= 0)
