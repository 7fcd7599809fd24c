"""What elementwise operations do to expressions of mask elements: comparisons, logic, numbers.

Floating-point values are followed only where nothing can round unseen: numbers, and choices between
numbers such as `(1.0 - mask) * finfo.min`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from . import index_expr as ix
from .find_calls import value_of
from .index_expr import Constant, Element, Expr

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
POSITIONS = (torch.int64, torch.int32)  # wide enough for sums of positions
COMPARISONS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "le": ix.at_most,
    "lt": lambda a, b: ix.at_most(ix.add(a, Constant(1)), b),
    "ge": lambda a, b: ix.at_most(b, a),
    "gt": lambda a, b: ix.at_most(ix.add(b, Constant(1)), a),
    "eq": ix.equal,
    "ne": lambda a, b: ix.not_(ix.equal(a, b)),
}
COMPARISONS |= {"less_equal": COMPARISONS["le"], "less": COMPARISONS["lt"], "greater": COMPARISONS["gt"],
                "greater_equal": COMPARISONS["ge"], "not_equal": COMPARISONS["ne"]}  # fmt: skip
FLOAT_COMPARISONS = {name: getattr(operator, name) for name in ("le", "lt", "ge", "gt", "eq", "ne")}
CONJUNCTIONS, DISJUNCTIONS = {"and_", "bitwise_and", "logical_and"}, {"or_", "bitwise_or", "logical_or"}
NEGATIONS = {"invert", "logical_not", "bitwise_not", "inv"}
NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
}
FLOAT_OPS = {"add": "float add", "mul": "float mul"}  # kept apart from sums of integers
SPELLED = {"subtract": "sub", "multiply": "mul", "negative": "neg"}


class NotReadable(Exception):
    """This node cannot be looked into."""


def dtype_of(x: Any) -> torch.dtype | None:
    """Of a tensor, a number, or a node that gives one."""
    value = value_of(x)
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, bool | torch.SymBool):
        return torch.bool
    return torch.int64 if isinstance(value, int | torch.SymInt) else None


def is_bool(x: Any) -> bool:
    """Whether `x` holds truth values."""
    return dtype_of(x) == torch.bool


def is_integer(x: Any) -> bool:
    """Whether `x` holds integers."""
    return dtype_of(x) in INTEGERS


def _is_float(x: Any) -> bool:
    dtype = dtype_of(x)
    return dtype is not None and dtype.is_floating_point


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as `dtype` holds it."""
    return float(torch.tensor(value, dtype=dtype))


def elementwise(name: str, operands: list[Any], read: list[Expr], out: torch.dtype) -> Expr:
    """The result of an operation on `operands` (nodes or numbers), which were read as `read`."""
    name = SPELLED.get(name, name)
    if name in NEGATIONS and is_bool(operands[0]):
        return ix.not_(read[0])
    if name == "neg":
        return (
            ix.scaled(read[0], -1) if out in POSITIONS else of_choices(lambda x: rounded(-x, out), read[0])
        )
    if name in ("abs", "absolute") and out in POSITIONS:
        return ix.extreme("max", read[0], ix.scaled(read[0], -1))
    if len(read) != 2:
        raise NotReadable
    if all(map(is_bool, operands)):
        if name in CONJUNCTIONS or name == "mul":
            return ix.and_(*read)
        if name in DISJUNCTIONS:
            return ix.or_(*read)
        raise NotReadable
    if name in COMPARISONS and all(map(is_integer, operands)):
        return COMPARISONS[name](read[0], read[1])
    if name in FLOAT_COMPARISONS and isinstance(read[1], Constant) and _is_float(operands[0]):
        return of_choices(lambda x: FLOAT_COMPARISONS[name](x, read[1].value), read[0])  # type: ignore[union-attr]
    if name not in NUMBERS:
        raise NotReadable
    pairs = zip(read, operands, strict=True)
    if out in POSITIONS:
        a, b = (ix.number(x) if is_bool(operand) else x for x, operand in pairs)
        return _of_integers(name, a, b)
    if out.is_floating_point:
        a, b = (_float(x, out) if is_bool(operand) else x for x, operand in pairs)
        return _of_floats(name, a, b, out)
    raise NotReadable


def converted(x: Expr, source: torch.dtype, target: torch.dtype) -> Expr:
    """`x` of dtype `source` as `target`."""
    if source == target or (source in POSITIONS and target in POSITIONS):
        return x
    if source == torch.bool:
        return ix.number(x) if target in INTEGERS else _float(x, target)
    if target == torch.bool and source.is_floating_point:
        return of_choices(bool, x)
    if target == torch.bool and source in INTEGERS and not isinstance(x, Element):
        return ix.not_(ix.equal(x, Constant(0)))
    if target.is_floating_point:
        return of_choices(lambda value: rounded(float(value), target), x)
    raise NotReadable


def of_choices(function: Callable[[Any], Any], x: Expr) -> Expr:
    """`function` of a number, or of each branch of a choice between numbers."""
    if isinstance(x, Constant):
        return Constant(function(x.value))
    if isinstance(x, ix.Apply) and x.op == "where":
        return ix.where(x.args[0], *(of_choices(function, branch) for branch in x.args[1:]))
    raise NotReadable


def _float(x: Expr, dtype: torch.dtype) -> Expr:
    return ix.where(x, Constant(rounded(1.0, dtype)), Constant(rounded(0.0, dtype)))


def _of_integers(name: str, a: Expr, b: Expr) -> Expr:
    if name == "mul":
        if isinstance(a, Constant):
            return ix.scaled(b, int(a.value))
        if isinstance(b, Constant):
            return ix.scaled(a, int(b.value))
        raise NotReadable
    if name == "rsub":
        a, b = b, a
    return ix.add(a, b if name == "add" else ix.scaled(b, -1))


def _of_floats(name: str, a: Expr, b: Expr, out: torch.dtype) -> Expr:
    function = NUMBERS[name]
    try:
        if isinstance(b, Constant):
            return of_choices(lambda x: rounded(function(x, b.value), out), a)
        if isinstance(a, Constant):
            return of_choices(lambda x: rounded(function(a.value, x), out), b)
    except NotReadable:
        pass  # of a tensor's values: kept as it is
    if name not in FLOAT_OPS:
        raise NotReadable
    return ix.Apply(FLOAT_OPS[name], (a, b))
