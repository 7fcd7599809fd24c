"""What happens to scores between the product and the softmax, as SDPA's `scale` and `attn_mask`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .find_calls import value_of
from .head_axes import HeadAxes
from .left_alone import LeftAloneError
from .new_nodes import NewNodes
from .operations import arguments, known_number, operation
from .score_steps import Add, Fill, Scale, Squash, Step

# A number whose rounding error swallows any score: to add it is to replace the score by it.
SWALLOWS_SCORES = 1e30
VIEWS = {"expand", "getitem", "unsqueeze", "contiguous", "clone", "reshape"}


@dataclass(frozen=True)
class Mask:
    """SDPA's arguments.

    Attributes:
        scale: factor of the product.
        node: `attn_mask`, bool or of the queries' type; None if there is none.
        empty_rows: bool `[..., q, 1]`, rows whose scores all become -inf; None if there is none such.
    """

    scale: float
    node: fx.Node | None
    empty_rows: fx.Node | None


def mask_of(steps: list[Step], dtype: torch.dtype, heads: HeadAxes, new: NewNodes) -> Mask:
    """The mask that does what `steps` do in order.

    Args:
        dtype: of the queries, and so of a float mask: SDPA's memory-efficient kernel takes no other.

    Raises:
        LeftAloneError: no mask does exactly that.
    """
    scores = _Scores(dtype, new)
    for step in steps:
        assert not isinstance(step, Squash), "see beyond_sdpa.py"
        if isinstance(step, Scale):
            scores.times(step)
        elif isinstance(step, Add):
            term = _of_type(heads.of_mask(step.bias, step.node), dtype, new)
            scores.plus(step, new(torch.mul, term, step.factor) if step.factor != 1 else term)
        else:
            scores.filled(step, heads.of_mask(_bool(step.mask), step.node))
    return scores.mask()


class _Scores:
    """Scores so far: `scale * product + bias` where `visible`, and -inf elsewhere."""

    def __init__(self, dtype: torch.dtype, new: NewNodes) -> None:
        self._dtype, self._new = dtype, new
        self._scale = 1.0
        self._bias: fx.Node | None = None
        self._visible: fx.Node | None = None
        self._finite = True  # no score is -inf
        self._replaced = False  # by a finite number

    def times(self, step: Scale) -> None:
        if step.factor <= 0 or not math.isfinite(step.factor):
            raise LeftAloneError(f"scale={step.factor} (needs a positive number)")
        if self._replaced:
            raise LeftAloneError("the scores are scaled after masked ones became a finite number")
        self._scale *= step.factor
        if self._bias is not None:
            self._check_precision(step.node)
            self._bias = self._new(torch.mul, self._bias, step.factor)

    def plus(self, step: Add, term: fx.Node) -> None:
        self._finite = self._finite and self._bias is None and _is_finite(step.bias)
        before = self._float()
        if before is not None:
            self._check_precision(step.node)
        self._bias = self._new(torch.add, before, term) if before is not None else term

    def filled(self, step: Fill, mask: fx.Node) -> None:
        new = self._new
        if step.number == -math.inf:
            visible = _negated(mask, new) if step.where else mask
            both = (self._visible, visible)
            self._visible = new(torch.logical_and, *both) if self._visible is not None else visible
            self._finite = False
            return
        lowest = max(step.number, torch.finfo(self._dtype).min)
        if lowest > -SWALLOWS_SCORES:
            raise LeftAloneError(f"masked scores become {step.number}, which no mask does exactly")
        before = self._float()
        others = before if before is not None else self._number(0.0, mask)
        choices = (self._number(lowest, mask), others)
        self._bias = new(torch.where, mask, *(choices if step.where else choices[::-1]))
        self._replaced = True

    def mask(self) -> Mask:
        visible, bias = self._visible, self._bias
        if visible is None and bias is None:
            return Mask(self._scale, None, None)
        new, node = self._new, self._float() if bias is not None else visible
        assert node is not None
        empty_rows = None
        if not self._finite:
            hidden = new(torch.eq, node, -math.inf) if bias is not None else new(torch.logical_not, node)
            empty_rows = new(torch.all, hidden, -1, True)
        return Mask(self._scale, bounded(node, new) if bias is not None else node, empty_rows)

    def _float(self) -> fx.Node | None:
        """All that was masked and added so far as a float mask, which becomes the bias."""
        if self._visible is not None:
            seen = self._bias if self._bias is not None else self._number(0.0, self._visible)
            hidden = self._number(-math.inf, self._visible)
            self._bias = self._new(torch.where, self._visible, seen, hidden)
            self._visible = None
        return self._bias

    def _number(self, number: float, like: fx.Node) -> fx.Node:
        return self._new(torch.full, (), number, dtype=self._dtype, device=value_of(like).device)

    def _check_precision(self, node: fx.Node) -> None:
        if value_of(node).dtype != self._dtype:
            raise LeftAloneError(f"the mask is computed in {value_of(node).dtype}, but q is {self._dtype}")


def bounded(bias: fx.Node, new: NewNodes) -> fx.Node:
    """A float mask without the lowest finite numbers, for which half as low ones do as well.

    CUDA kernels multiply masks by log2(e): what overflows there is -inf, and a row of such numbers gives
    0 instead of the mean of the values.
    """
    dtype, device = value_of(bias).dtype, value_of(bias).device
    if dtype not in (torch.float32, torch.bfloat16):  # float16's lowest is far from float32's
        return bias
    lowest = torch.finfo(dtype).min / 2
    if operation(bias) == "where" and len(bias.args) == 3:
        numbers = [known_number(x) for x in bias.args[1:]]
        if None not in numbers:
            if not any(-math.inf < x < lowest for x in numbers):  # type: ignore[operator]
                return bias
            kept = [x if x == -math.inf else max(x, lowest) for x in numbers]  # type: ignore[type-var]
            choices = [new(torch.full, (), x, dtype=dtype, device=device) for x in kept]
            return new(torch.where, bias.args[0], *choices)
    clamped = new(torch.clamp, bias, min=lowest)
    return new(torch.where, new(torch.eq, bias, -math.inf), bias, clamped)


def _of_type(bias: fx.Node, dtype: torch.dtype, new: NewNodes) -> fx.Node:
    given = value_of(bias).dtype
    if given == dtype:
        return bias
    if not given.is_floating_point or torch.promote_types(given, dtype) != dtype:
        raise LeftAloneError(f"a mask of {given} is added to the scores, but q is {dtype}")
    return new("to", bias, dtype)


def _bool(mask: Any) -> fx.Node:
    if not isinstance(value_of(mask), torch.Tensor) or value_of(mask).dtype != torch.bool:
        raise LeftAloneError("scores are masked where something is true that is no bool tensor")
    return mask


def _negated(mask: fx.Node, new: NewNodes) -> fx.Node:
    """`~mask`, or `x` where `mask` is `~x`."""
    if operation(mask) == "logical_not" and value_of(mask.args[0]).dtype == torch.bool:
        return mask.args[0]  # type: ignore[return-value]
    return new(torch.logical_not, mask)


def _is_finite(bias: Any) -> bool:
    """Whether a mask is seen to have finite elements only, as transformers' eager masks are."""
    number = known_number(bias)
    if number is not None:
        return math.isfinite(number)
    name = operation(bias)
    if name in VIEWS:
        return _is_finite(bias.args[0])
    if name == "where" and len(bias.args) == 3:
        return _is_finite(bias.args[1]) and _is_finite(bias.args[2])
    if name == "masked_fill":
        named = arguments(bias, "input", "mask", "value")
        return _is_finite(named["input"]) and _is_finite(named["value"])
    return name == "zeros"
