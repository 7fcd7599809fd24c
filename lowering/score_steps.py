"""Hand-written attention, first half: from the product of queries and keys to the softmax.

    matmul(q, k.transpose(-2, -1)) -> * scale -> + bias -> masked_fill(mask, -inf) -> softmax

is read backwards from the softmax into the two operands and a list of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .attention_sinks import appended_sinks
from .find_calls import value_of
from .left_alone import LeftAloneError
from .operations import arguments, in_place, known_number, name_of, operation, same_sizes, untransposed

UNCHANGED = {
    "clone", "contiguous", "to", "type", "type_as", "float", "half", "bfloat16", "double",
}  # fmt: skip
REGROUPED = {"reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
PRODUCTS = {"matmul", "baddbmm", "einsum"}
SEARCHED_NODES = 32  # how far to look for a product


@dataclass(frozen=True)
class Operand:
    """A factor of a product: `node` with its axes in the order `dims` (None: as they are)."""

    node: fx.Node
    dims: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Scale:
    """The scores times a number."""

    node: fx.Node
    factor: float


@dataclass(frozen=True)
class Add:
    """The scores plus `factor` times a tensor."""

    node: fx.Node
    bias: fx.Node
    factor: float


@dataclass(frozen=True)
class Fill:
    """The scores replaced by `number` where `mask` is `where`."""

    node: fx.Node
    mask: fx.Node
    where: bool
    number: float


@dataclass(frozen=True)
class Squash:
    """The scores' tanh."""

    node: fx.Node


Step = Scale | Add | Fill | Squash


@dataclass
class Scores:
    """Scores `[..., q, k]` as they enter the softmax.

    Attributes:
        query, key: factors in the order `[..., q, d]` and `[..., k, d]`.
        steps: what happens to their product, in order.
        nodes: the product and all that follows up to the softmax (exclusive), last one first.
        sinks: one more score per head `[H]`, appended as the last column.
    """

    query: Operand
    key: Operand
    steps: list[Step] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    sinks: fx.Node | None = None


def read_scores(node: fx.Node) -> Scores | None:
    """The scores that a softmax reads; None if they come from no product of two tensors.

    Raises:
        LeftAloneError: they do, but something else happens to them.
    """
    steps: list[Step] = []
    nodes: list[fx.Node] = []
    sinks = None
    shifts: list[int] = []  # how many steps follow one
    while operation(node) not in PRODUCTS:
        nodes.append(node)
        sink = appended_sinks(node)
        shifted = _less_maximum(node)
        if sink is not None and sinks is None:
            node, sinks = sink
        elif shifted is not None:
            if any(isinstance(step, Squash) for step in steps):
                raise LeftAloneError("scores become the tanh of what they are less their maximum")
            if sinks is not None:
                raise LeftAloneError("sinks are appended to scores less their maximum")
            shifts.append(len(steps))
            nodes += shifted[1:]
            node = shifted[0]
        else:
            before, step = _step(node)
            if before is None:
                return None
            if step is not None:
                steps.append(step)
                nodes += [x for x in node.all_input_nodes if operation(x) == "expand_as"]
            node = before
    scores = _product(node)
    nodes.append(node)
    steps = scores.steps + steps[::-1]
    for later in shifts:
        # A row of nothing but a lowest number is zeros then, of which a mask leaves some: no one mask does.
        parts = steps[: len(steps) - later], steps[len(steps) - later :]
        if all(any(isinstance(step, Add | Fill) for step in part) for part in parts):
            raise LeftAloneError("scores are masked before and after their maximum is taken from them")
    return Scores(scores.query, scores.key, steps, nodes, sinks)


def reaches_product(node: Any) -> bool:
    """Whether a product of two tensors of at least two dimensions is near, before `node`."""
    near = [node]
    for candidate in near:
        if operation(candidate) in PRODUCTS:
            return _multiplies(candidate)
        if len(near) < SEARCHED_NODES:
            near += [x for x in _of_same_sizes(candidate) if x not in near]
    return False


def _multiplies(product: fx.Node) -> bool:
    """Not a projection, one of whose factors has no batch."""
    dims = [value_of(x).dim() for x in product.all_input_nodes if isinstance(value_of(x), torch.Tensor)]
    name = operation(product)
    return name == "baddbmm" or (min(dims, default=0) >= 3 if name == "einsum" else len(set(dims)) == 1)


def _of_same_sizes(node: fx.Node) -> Iterator[fx.Node]:
    """Inputs whose last two sizes are the node's, but for one more or less column of sinks."""
    value = value_of(node)
    for x in node.all_input_nodes if isinstance(value, torch.Tensor) else []:
        other = value_of(x)
        if not isinstance(other, torch.Tensor) or min(other.dim(), value.dim()) < 2:
            continue
        if same_sizes(other.shape[-2:], value.shape[-2:]) or operation(node) == "cat":
            yield x


def _step(node: fx.Node) -> tuple[fx.Node | None, Step | None]:
    """The scores before `node` (None if they come from no product) and what `node` does to them."""
    before = next(filter(reaches_product, _of_same_sizes(node)), None)
    if before is None:
        return None, None
    name = operation(node)
    if name in UNCHANGED or name in REGROUPED:
        return before, None
    reason = f"the scores are changed by {name_of(node)}"
    if not same_sizes(value_of(node).shape, value_of(before).shape):
        raise LeftAloneError(f"{reason}, which gives them another shape")
    if in_place(node) and node.args[0] is not before:
        raise LeftAloneError(f"{reason}, in place of a mask")
    if name == "tanh":
        return before, Squash(node)
    named = arguments(node, "input", "other")
    if name in ("mul", "div", "add", "sub") and set(named) == {"input", "other"}:
        first, second = named["input"], named["other"]
        other = second if first is before else first
        if name == "mul" or (name == "div" and first is before):
            return before, Scale(node, _factor(other, divide=name == "div"))
        if isinstance(value_of(other), torch.Tensor) and (name == "add" or first is before):
            return before, Add(node, _unexpanded(other), 1.0 if name == "add" else -1.0)
    if name == "masked_fill":
        named = arguments(node, "input", "mask", "value")
        if named["input"] is before:
            return before, Fill(node, _unexpanded(named["mask"]), True, _fill_number(named["value"]))
    if name == "where" and len(node.args) == 3:
        mask, if_true, if_false = node.args
        other = if_false if if_true is before else if_true
        return before, Fill(node, _unexpanded(mask), other is if_true, _fill_number(other))  # type: ignore[arg-type]
    raise LeftAloneError(reason)


def _factor(x: Any, divide: bool) -> float:
    number = known_number(x)
    if number is None:
        raise LeftAloneError("scale is not known at compile time")
    return 1.0 / number if divide and number else number


def _fill_number(x: Any) -> float:
    number = known_number(x)
    if number is None:
        raise LeftAloneError("masked scores become a number that is not known at compile time")
    return number


def _unexpanded(mask: Any) -> Any:
    """`x` of `x.expand_as(scores)`, which would keep the scores alive only for their shape."""
    return mask.args[0] if operation(mask) == "expand_as" else mask


def _less_maximum(node: fx.Node) -> list[fx.Node] | None:
    """`[x, the nodes of its maximum]` for `x - x.max(dim=-1, keepdim=True)`: a softmax ignores it."""
    if operation(node) != "sub" or len(node.args) != 2:
        return None
    x, maximum = node.args
    nodes = []
    while operation(maximum) in ("detach", "getitem"):
        if operation(maximum) == "getitem" and maximum.args[1] != 0:  # type: ignore[union-attr]
            return None
        nodes.append(maximum)
        maximum = maximum.args[0]  # type: ignore[union-attr]
    if operation(maximum) not in ("max", "amax"):
        return None
    named = arguments(maximum, "input", "dim", "keepdim")  # type: ignore[arg-type]
    rows = named.get("dim") in (-1, (-1,), [-1]) and named.get("keepdim") is True
    return [x, *nodes, maximum] if named["input"] is x and rows else None  # type: ignore[list-item]


def _product(node: fx.Node) -> Scores:
    """The factors of a product of queries and keys, and the bias that `baddbmm` adds to it."""
    if operation(node) == "einsum":
        return Scores(*_einsum_factors(node))
    if operation(node) == "matmul":
        if len(node.args) != 2 or node.kwargs:
            raise LeftAloneError(f"{name_of(node)} with other arguments than two tensors")
        return Scores(Operand(node.args[0]), _transposed(node.args[1]))  # type: ignore[arg-type]
    if in_place(node) or "out" in node.kwargs:
        raise LeftAloneError(f"{name_of(node)} writes the scores over another tensor")
    named = {"beta": 1, "alpha": 1} | arguments(node, "input", "batch1", "batch2")
    beta, alpha = known_number(named["beta"]), known_number(named["alpha"])
    if beta is None or alpha is None:
        raise LeftAloneError("scale is not known at compile time")
    steps: list[Step] = [Scale(node, alpha)]
    if beta:
        steps.append(Add(node, named["input"], beta))
    return Scores(Operand(named["batch1"]), _transposed(named["batch2"]), steps)


def _transposed(node: fx.Node) -> Operand:
    """The keys `[..., k, d]` of a factor `[..., d, k]`."""
    keys = untransposed(node)
    dims = value_of(node).dim()
    return Operand(keys) if keys is not None else Operand(node, (*range(dims - 2), dims - 1, dims - 2))


def _einsum_factors(node: fx.Node) -> tuple[Operand, Operand]:
    """The factors of an einsum like "bhid,bhjd->bhij", in any order of axes."""
    axes, factors = einsum_axes(node)
    *batch, i, j = list(axes[2])
    query, key = (0, 1) if i in axes[0] else (1, 0)
    contracted = sorted(set(axes[query]) - set(axes[2]))
    if len(contracted) != 1 or set(axes[query]) != {*batch, i, *contracted}:
        raise LeftAloneError(f"the scores are the einsum {node.args[0]!r}")
    if set(axes[key]) != {*batch, j, *contracted}:
        raise LeftAloneError(f"the scores are the einsum {node.args[0]!r}")
    return (
        ordered(factors[query], axes[query], [*batch, i, *contracted]),
        ordered(factors[key], axes[key], [*batch, j, *contracted]),
    )


def einsum_axes(node: fx.Node) -> tuple[list[str], tuple[fx.Node, fx.Node]]:
    """The letters of both factors and of the result, and the factors, of a plain einsum of two tensors."""
    equation, *factors = node.args
    axes = str(equation).replace(" ", "").replace("->", ",").split(",")
    plain = len(factors) == 2 and len(axes) == 3 and "->" in str(equation)
    if not plain or any(len(set(a)) != len(a) or not a.isalpha() or len(a) < 3 for a in axes):
        raise LeftAloneError(f"the einsum {equation!r} is not a plain product of two tensors")
    return axes, (factors[0], factors[1])  # type: ignore[return-value]


def ordered(node: fx.Node, axes: str, wanted: list[str]) -> Operand:
    """`node`, whose axes have these letters, in the wanted order."""
    dims = tuple(axes.index(letter) for letter in wanted)
    return Operand(node) if dims == tuple(range(len(dims))) else Operand(node, dims)
