"""What a mask says: an interval of keys for each query, a mask over keys, and the rest.

    visible(b, h, q, k)  =  lower(b, q) <= k < upper(b, q)   and   keys(b, k)   and   the rest

Causal masks with any offset, sliding windows, key lengths and prefix-LM are intervals; padding is a
mask over keys; packed documents and whatever else is "the rest", for which the tensor itself is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import index_expr as ix
from .find_calls import SDPANode, value_of
from .index_expr import BATCH, HEAD, KEY, QUERY, Apply, Constant, Element, Expr, Index
from .read_mask import ZERO, MaskReader, is_one

EVERYTHING = Constant(2**31 - 1)  # as an upper end: all keys
NEVER_VISIBLE = -3e4  # an addend at or below it (float16's lowest is -65504) hides a key
Interval = tuple[Expr | None, Expr | None]  # None: no limit on that side


@dataclass(frozen=True)
class MaskForm:
    """A mask, understood as far as it goes.

    Attributes:
        lower, upper: the first visible key and one past the last, over (batch, query); None: no limit.
        keys: truth value over (batch, key); None: all.
        rest: conditions over query and key together that are not intervals.
        bias: what is added to the scores that is neither 0 nor -inf, term by term.
        soft: whether hidden keys get a large negative number rather than -inf, so that a query that
            sees nothing attends to everything.
    """

    lower: Expr | None = None
    upper: Expr | None = None
    keys: Expr | None = None
    rest: tuple[Expr, ...] = ()
    bias: tuple[Expr, ...] = ()
    soft: bool = False

    @property
    def exact(self) -> bool:
        """Whether interval and keys say all that the mask says."""
        return not (self.rest or self.bias or self.soft)


def mask_form(sdpa: SDPANode, reader: MaskReader) -> MaskForm:
    """The form of an attention call's `attn_mask` and `is_causal`."""
    q_len, kv_len = (value_of(n).shape[-2] for n in (sdpa.query, sdpa.key))
    formula: Expr = ix.TRUE
    if sdpa.is_causal is True:  # SDPA's flag aligns query 0 with key 0
        formula = ix.at_most(Index(KEY), Index(QUERY))
    bias: tuple[Expr, ...] = ()
    soft = False
    if sdpa.attn_mask is not None:
        mask = value_of(sdpa.attn_mask)
        axes = range(4 - mask.dim(), 4)
        at = tuple(ZERO if is_one(s) else Index(a) for s, a in zip(mask.shape, axes, strict=True))
        read = reader.read(sdpa.attn_mask, at, sdpa.node)
        if mask.dtype == torch.bool:
            formula = ix.and_(formula, read)
        else:
            visible, bias = _visible_and_bias(read)
            soft = sdpa.sinks is None and _is_soft(read)  # with sinks, a row that sees nothing gives zeros
            formula = ix.and_(formula, visible)
    form = replace(_classify(formula, q_len, kv_len), bias=bias)
    return replace(form, soft=soft and not _never_empty(form, q_len, kv_len))


def _visible_and_bias(x: Expr) -> tuple[Expr, tuple[Expr, ...]]:
    """What is added to a score: where it is not (nearly) -inf, and the terms that are not 0 there."""
    if isinstance(x, Constant) and (x.value == 0 or x.value <= NEVER_VISIBLE):
        return Constant(x.value == 0), ()
    if isinstance(x, Apply) and x.op == "where":
        (a, a_bias), (b, b_bias) = (_visible_and_bias(branch) for branch in x.args[1:])
        return ix.where(x.args[0], a, b), a_bias + b_bias
    if isinstance(x, Apply) and x.op == "float add":
        (a, a_bias), (b, b_bias) = map(_visible_and_bias, x.args)
        return ix.and_(a, b), a_bias + b_bias
    return ix.TRUE, (x,)


def _is_soft(x: Expr) -> bool:
    return any(
        isinstance(part, Constant) and -float("inf") < part.value <= NEVER_VISIBLE for part in ix.walk(x)
    )


def _classify(formula: Expr, q_len: Any, kv_len: Any) -> MaskForm:
    lowers: list[Expr] = []
    uppers: list[Expr] = []
    keys: list[Expr] = []
    rest: list[Expr] = []
    for part in ix.conjuncts(formula):
        interval = _interval(part)
        if interval is not None:
            lowers += [] if interval[0] is None else [interval[0]]
            uppers += [] if interval[1] is None else [interval[1]]
        elif ix.axes(part) <= {BATCH, KEY}:
            keys.append(part)
        else:
            rest.append(part)
    lowers = [x for x in lowers if not _at_most_statically(x, 0, q_len)]
    uppers = [x for x in uppers if not _at_least_statically(x, kv_len)]
    return MaskForm(
        ix.extreme("max", *lowers) if lowers else None,
        ix.extreme("min", *uppers) if uppers else None,
        ix.and_(*keys) if keys else None,
        tuple(rest),
    )


def _interval(x: Expr) -> Interval | None:
    """The interval of keys in which `x` holds, for each (batch, query); None if it is not one."""
    if isinstance(x, Constant):
        return (None, None) if x.value else (None, ZERO)
    if ix.axes(x) <= {BATCH, QUERY}:
        return None, ix.where(x, EVERYTHING, ZERO)
    if not isinstance(x, Apply):
        return None
    if x.op in ("le", "eq"):
        return _of_comparison(x)
    if x.op == "and":
        parts = [_interval(part) for part in x.args]
        return None if None in parts else _combine(parts, "max", "min")  # type: ignore[arg-type]
    if x.op == "or":
        return _union(x.args)
    if x.op == "where" and ix.axes(x.args[0]) <= {BATCH, QUERY}:
        parts = [_interval(part) for part in x.args[1:]]
        if None not in parts:
            (a_low, a_high), (b_low, b_high) = parts  # type: ignore[misc]
            lower = ix.where(x.args[0], a_low or ZERO, b_low or ZERO)
            upper = ix.where(x.args[0], a_high or EVERYTHING, b_high or EVERYTHING)
            return lower, upper
    return None


def _of_comparison(x: Apply) -> Interval | None:
    """Of `0 <= sum` or `0 == sum` where the key index counts once."""
    total = ix.linear(x.args[1])
    sign = total.terms.get(Index(KEY), 0)
    rest = total.without(Index(KEY))
    if sign not in (1, -1) or not ix.axes(rest.expr()) <= {BATCH, QUERY}:
        return None
    place = rest.times(-sign)  # of equality
    after = ix.add(place.expr(), Constant(1))
    if x.op == "eq":
        return place.expr(), after
    return (None, after) if sign < 0 else (place.expr(), None)


def _combine(parts: list[Interval], lower_by: str, upper_by: str) -> Interval:
    lowers = [low for low, _ in parts if low is not None]
    uppers = [high for _, high in parts if high is not None]
    return (
        ix.extreme(lower_by, *lowers) if lowers else None,
        ix.extreme(upper_by, *uppers) if uppers else None,
    )


def _union(args: tuple[Expr, ...]) -> Interval | None:
    """Of conditions on the row and of intervals open on one and the same side."""
    rows = [x for x in args if ix.axes(x) <= {BATCH, QUERY}]
    parts = [_interval(x) for x in args if x not in rows]
    if None in parts:
        return None
    if all(low is None for low, _ in parts) or all(high is None for _, high in parts):  # type: ignore[misc]
        lower, upper = _combine(parts, "min", "max")  # type: ignore[arg-type]
    elif len(parts) == 1:
        lower, upper = parts[0]  # type: ignore[misc]
    else:
        return None
    if rows:
        full = ix.or_(*rows)
        lower = None if lower is None else ix.where(full, ZERO, lower)
        upper = None if upper is None else ix.where(full, EVERYTHING, upper)
    return lower, upper


def static_end(x: Expr | None) -> tuple[int, Any] | None:
    """`(a, b)` if an end of an interval is `a * query + b`, b a number or a symbolic size; else None."""
    if x is None:
        return None
    total = ix.linear(x)
    slope = total.terms.get(Index(QUERY), 0)
    value: Any = total.constant
    for term, coefficient in total.without(Index(QUERY)).terms.items():
        size = value_of(term.node) if isinstance(term, Element) and not term.at else None
        if not isinstance(size, int | torch.SymInt):
            return None
        value = value + coefficient * size
    return slope, value


def _at_most_statically(lower: Expr, limit: int, q_len: Any) -> bool:
    """Whether `lower` is at most `limit` for every query."""
    end = static_end(lower)
    if end is None or end[0] < 0:
        return False
    return statically_known_true(end[0] * (q_len - 1) + end[1] <= limit)


def _at_least_statically(upper: Expr, kv_len: Any) -> bool:
    """Whether `upper` is past the last key for every query."""
    end = static_end(upper)
    return end is not None and end[0] >= 0 and statically_known_true(end[1] >= kv_len)


def _never_empty(form: MaskForm, q_len: Any, kv_len: Any) -> bool:
    """Whether every query is known to see a key."""
    if form.keys is not None or form.rest:
        return False
    lower = static_end(form.lower) if form.lower is not None else (0, 0)
    upper = static_end(form.upper) if form.upper is not None else (0, kv_len)
    if lower is None or upper is None or lower[0] not in (0, 1) or upper[0] not in (0, 1):
        return False
    first, last = 0, q_len - 1
    return all(
        statically_known_true(upper[0] * q + upper[1] >= 1)
        and statically_known_true(lower[0] * q + lower[1] < kv_len)
        and statically_known_true(upper[0] * q + upper[1] > lower[0] * q + lower[1])
        for q in (first, last)
    )


def name_of(form: MaskForm, mask: Any, q_len: Any, kv_len: Any) -> str:
    """The mask in words, for reports."""
    names = []
    lower, upper = static_end(form.lower), static_end(form.upper)
    if form.upper is not None:
        if QUERY not in ix.axes(form.upper):
            names.append(f"kv_len={upper[1]}" if upper else "key length")
        elif upper is None:
            names.append("causal, offset on the device")
        elif statically_known_true(upper[1] - 1 == kv_len - q_len):
            names.append("causal" if statically_known_true(kv_len == q_len) else "causal bottom-right")
        else:
            names.append("causal top-left" if upper[1] == 1 else f"causal, offset {upper[1] - 1}")
    if form.lower is not None:
        names.append(_window_name(form, lower))
    if form.keys is not None:
        names.append("padding")
    if any(_is_documents(part) for part in form.rest):
        names.append("packed documents")
    if form.bias:
        names.append("ALiBi" if all(map(_is_alibi, form.bias)) else "float")
    elif form.soft:
        names.append("float")
    elif any(not _is_documents(part) for part in form.rest):
        names.append("bool" if value_of(mask).dtype == torch.bool else "float")
    return " + ".join(names) or "none"


def _window_name(form: MaskForm, lower: tuple[int, Any] | None) -> str:
    if form.upper is not None:
        width = static_end(ix.add(form.upper, ix.scaled(form.lower, -1)))  # type: ignore[arg-type]
        if width is not None and width[0] == 0:
            return f"window {width[1]}"
    if lower is None:
        return "first key"
    return f"at most {-lower[1]} back" if lower[0] == 1 else f"keys from {lower[1]}"


def _is_alibi(x: Expr) -> bool:
    """`slope[head] * distance`: a number per head times one that depends on the key's place."""
    if not isinstance(x, Apply) or x.op != "float mul":
        return False
    slope, distance = sorted(x.args, key=lambda part: KEY in ix.axes(part))
    return ix.axes(slope) == {HEAD} and KEY in ix.axes(distance) and HEAD not in ix.axes(distance)


def _is_documents(x: Expr) -> bool:
    """`ids[b, q] == ids[b, k]`."""
    if not isinstance(x, Apply) or x.op != "eq":
        return False
    terms = ix.linear(x.args[1]).terms
    tables = {t.node for t in terms if isinstance(t, Element)}
    return len(terms) == 2 and len(tables) == 1 and sorted(terms.values()) == [-1, 1]


def parts(form: MaskForm) -> list[Expr]:
    """All that interval and key mask are made of."""
    return [part for x in (form.lower, form.upper, form.keys) if x is not None for part in ix.walk(x)]


def elements(form: MaskForm) -> list[Element]:
    """The tensor elements of the graph on which interval and key mask depend."""
    return [part for part in parts(form) if isinstance(part, Element)]


def is_plain_causal(form: MaskForm, q_len: Any, kv_len: Any) -> bool:
    """Whether query i sees keys 0..i of as many keys as queries, and nothing else is asked."""
    if not form.exact or form.lower is not None or form.keys is not None:
        return False
    return static_end(form.upper) == (1, 1) and statically_known_true(q_len == kv_len)
