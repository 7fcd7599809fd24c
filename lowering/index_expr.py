"""Values of mask tensors as expressions of their indices, and the algebra that keeps them simple.

A mask `[B, H, q, L]` is a function of (batch, head, query, key). `read_mask` reads that function off the
graph as an expression of the classes below; the constructors simplify what they build, so that a
condition such as `~((k + 3) > (q + off))` always ends as one form, `le`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

BATCH, HEAD, QUERY, KEY = range(4)


@dataclass(frozen=True)
class Index:
    """The index along one axis of the mask."""

    axis: int


@dataclass(frozen=True)
class Constant:
    """A number or a truth value."""

    value: bool | int | float


@dataclass(frozen=True)
class Element:
    """One element of a tensor of the graph, or a scalar node (no indices), that is not looked into.

    Attributes:
        version: writes to the tensor's memory before it was read; elements of one tensor that were
            read before and after a write are different values.
    """

    node: fx.Node
    at: tuple[Expr, ...]
    version: int


@dataclass(frozen=True)
class Apply:
    """`add`, `mul`, `le`, `eq`, `not`, `and`, `or`, `where`, `max`, `min` of expressions.

    "float add" and "float mul" are of floating-point values and stay as they are written.
    """

    op: str
    args: tuple[Expr, ...]


Expr = Index | Constant | Element | Apply
TRUE, FALSE = Constant(True), Constant(False)


@dataclass(frozen=True)
class Linear:
    """An integer expression as `sum(coefficient * term) + constant`; terms are not sums themselves."""

    terms: dict[Expr, int]
    constant: int

    def without(self, term: Expr) -> Linear:
        """The rest after leaving `term` out."""
        return Linear({t: c for t, c in self.terms.items() if t != term}, self.constant)

    def times(self, factor: int) -> Linear:
        """All of it times a number."""
        return Linear({t: c * factor for t, c in self.terms.items()}, self.constant * factor)

    def expr(self) -> Expr:
        """Back to an expression, terms in a fixed order."""
        parts: list[Expr] = [t if c == 1 else Apply("mul", (Constant(c), t)) for t, c in self.terms.items()]
        parts.sort(key=repr)
        if self.constant or not parts:
            parts.append(Constant(self.constant))
        return parts[0] if len(parts) == 1 else Apply("add", tuple(parts))


def linear(x: Expr) -> Linear:
    """`x` as a sum; what cannot be taken apart becomes a term."""
    if isinstance(x, Constant):
        return Linear({}, int(x.value))
    if isinstance(x, Apply) and x.op == "add":
        return sum_of(*map(linear, x.args))
    if isinstance(x, Apply) and x.op == "mul" and isinstance(x.args[0], Constant):
        return linear(x.args[1]).times(int(x.args[0].value))
    return Linear({x: 1}, 0)


def sum_of(*parts: Linear) -> Linear:
    """The sum, without terms that cancel."""
    terms: dict[Expr, int] = {}
    for part in parts:
        for term, coefficient in part.terms.items():
            terms[term] = terms.get(term, 0) + coefficient
    return Linear({t: c for t, c in terms.items() if c}, sum(part.constant for part in parts))


def add(*args: Expr) -> Expr:
    """Sum of integers."""
    return sum_of(*map(linear, args)).expr()


def scaled(x: Expr, factor: int) -> Expr:
    """Integer `x` times a number."""
    return linear(x).times(factor).expr()


def at_most(a: Expr, b: Expr) -> Expr:
    """`a <= b` of integers, as `0 <= sum`."""
    gap = sum_of(linear(b), linear(a).times(-1))
    for term, count in gap.terms.items():  # 0 <= s - max(x, y)  is  0 <= s - x and 0 <= s - y
        if isinstance(term, Apply) and term.op == ("max" if count < 0 else "min"):
            rest = gap.without(term)
            parts = (sum_of(rest, linear(x).times(count)).expr() for x in term.args)
            return and_(*(at_most(Constant(0), part) for part in parts))
    indices = all(isinstance(term, Index) for term in gap.terms)  # none is negative
    if indices and gap.constant >= 0 and all(c > 0 for c in gap.terms.values()):
        return TRUE
    if indices and gap.constant < 0 and all(c < 0 for c in gap.terms.values()):
        return FALSE
    return Apply("le", (Constant(0), gap.expr()))


def equal(a: Expr, b: Expr) -> Expr:
    """`a == b` of integers, as `sum == 0` with the first coefficient positive."""
    for x, y in ((a, b), (b, a)):  # a truth value made a number, compared with one
        if isinstance(x, Apply) and x.op == "where" and isinstance(y, Constant):
            return where(x.args[0], equal(x.args[1], y), equal(x.args[2], y))
    gap = sum_of(linear(b), linear(a).times(-1))
    if not gap.terms:
        return Constant(gap.constant == 0)
    if gap.terms[min(gap.terms, key=repr)] < 0:
        gap = gap.times(-1)
    return Apply("eq", (Constant(0), gap.expr()))


def not_(x: Expr) -> Expr:
    """Negation, pushed inwards."""
    if isinstance(x, Constant):
        return Constant(not x.value)
    if isinstance(x, Apply):
        if x.op == "not":
            return x.args[0]
        if x.op == "le":  # not 0 <= s  is  0 <= -s - 1
            return at_most(x.args[1], Constant(-1))
        if x.op == "and":
            return or_(*map(not_, x.args))
        if x.op == "or":
            return and_(*map(not_, x.args))
        if x.op == "where":
            return where(x.args[0], not_(x.args[1]), not_(x.args[2]))
    return Apply("not", (x,))


def and_(*args: Expr) -> Expr:
    """Conjunction, flat and without repetition."""
    return _lattice("and", args, TRUE, FALSE)


def or_(*args: Expr) -> Expr:
    """Disjunction, flat and without repetition."""
    return _lattice("or", args, FALSE, TRUE)


def _lattice(op: str, args: tuple[Expr, ...], neutral: Expr, absorbing: Expr) -> Expr:
    parts: dict[Expr, None] = {}
    for x in args:
        for part in x.args if isinstance(x, Apply) and x.op == op else (x,):
            parts[part] = None
    if absorbing in parts:
        return absorbing
    parts.pop(neutral, None)
    if not parts:
        return neutral
    return next(iter(parts)) if len(parts) == 1 else Apply(op, tuple(parts))


def where(condition: Expr, a: Expr, b: Expr) -> Expr:
    """`a` where the condition holds, else `b`; of truth values a formula."""
    if isinstance(condition, Constant):
        return a if condition.value else b
    if a == b:
        return a
    if _is(a, True) and _is(b, False):
        return condition
    if _is(a, False) and _is(b, True):
        return not_(condition)
    if _is(a, True):
        return or_(condition, b)
    if _is(b, False):
        return and_(condition, a)
    if _is(a, False):
        return and_(not_(condition), b)
    if _is(b, True):
        return or_(not_(condition), a)
    return Apply("where", (condition, a, b))


def _is(x: Expr, value: bool) -> bool:
    return isinstance(x, Constant) and x.value is value


def number(x: Expr) -> Expr:
    """A truth value as 1 or 0."""
    if isinstance(x, Constant):
        return Constant(int(x.value))
    return where(x, Constant(1), Constant(0))


def extreme(op: str, *args: Expr) -> Expr:
    """`max` or `min`, flat; numbers taken together."""
    parts: dict[Expr, None] = {}
    numbers = []
    for x in args:
        for part in x.args if isinstance(x, Apply) and x.op == op else (x,):
            if isinstance(part, Constant):
                numbers.append(part.value)
            else:
                parts[part] = None
    if numbers:
        parts[Constant((max if op == "max" else min)(numbers))] = None
    return next(iter(parts)) if len(parts) == 1 else Apply(op, tuple(parts))


def walk(x: Expr) -> Iterator[Expr]:
    """`x` and all that it is made of."""
    yield x
    if isinstance(x, Apply | Element):
        for part in x.args if isinstance(x, Apply) else x.at:
            yield from walk(part)


def axes(x: Expr) -> set[int]:
    """The axes of the mask on which `x` depends."""
    return {part.axis for part in walk(x) if isinstance(part, Index)}


def conjuncts(x: Expr) -> tuple[Expr, ...]:
    """The parts that must all hold."""
    return x.args if isinstance(x, Apply) and x.op == "and" else (x,)


def is_minus_infinity(x: Any) -> bool:
    """Whether `x` is the number -inf."""
    return isinstance(x, float) and math.isinf(x) and x < 0
