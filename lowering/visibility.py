"""Put what a mask says into the graph in the form that kernels take.

- bounds, int32 `[B, q, 2]` or broadcastable to it: query i of row b sees keys k with
  `bounds[b, i, 0] <= k < bounds[b, i, 1]`. Computed from a few numbers; where the mask is not understood,
  from the first and last key that it shows to each query (to a few queries: to any of them), so that no
  kernel reads what nobody sees. Then two more say between which keys it hides none: nearly always all of
  these, since masks are padding at one end, and no kernel need read the mask.
- a mask `[B, 1, 1, L]` over keys, or the mask itself where it is more than that; for many queries of
  `attend` as words of bits (`pack_mask`).

All are computed where the mask is, once for all layers that share it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from .find_calls import SDPANode, value_of
from .graph_writer import GraphWriter
from .index_expr import KEY, Apply, Constant, Element, Expr, Index
from .kv_source import OPS
from .mask_arithmetic import INTEGERS
from .mask_form import EVERYTHING, MaskForm, elements, parts
from .read_mask import ZERO, is_one
from .writes import Writes

MAX_JOINT_QUERIES = 16  # so many share a tile of any kernel: one extent for all of them
# Numbers beyond are taken for it ("no window" may be the largest int64), so that no sum of a few overflows.
FARTHEST = 1 << 61


class Visibility:
    """Builds bounds and key masks in one graph; the same one only once."""

    def __init__(self, graph: fx.Graph, writes: Writes) -> None:
        self._graph, self._writes = graph, writes
        self._built: dict[tuple[Any, ...], fx.Node] = {}
        self._last: dict[fx.Node, fx.Node] = {}  # the last node inserted behind a mask

    def can_build(self, sdpa: SDPANode, form: MaskForm) -> bool:
        """Whether what the form depends on still has its value where the mask is."""
        place = self._place(sdpa)
        if place is sdpa.node:
            return not elements(form)
        needed = {part.axis for part in parts(form) if isinstance(part, Index)}
        if any(_size_of_axis(sdpa, axis) is None for axis in needed | {KEY}):
            return False
        if self._writes.between(place, sdpa.node, place):
            return False  # the mask changes after this place
        tensors = [e for e in elements(form) if isinstance(value_of(e.node), torch.Tensor)]
        return all(self._writes.until(place, e.node) == e.version for e in tensors)

    def bounds(self, sdpa: SDPANode, form: MaskForm) -> fx.Node | None:
        """Bounds int32 `[B, q, 2]` of the call; None if nothing limits what is visible.

        Together with `mask` they say what the form says.
        """
        mask = sdpa.attn_mask
        scanned = None
        if form.exact and form.keys is not None:
            scanned = self.mask(sdpa, form)
        elif form.rest and not form.bias and not form.soft and value_of(mask).dtype == torch.bool:
            scanned = mask
        if scanned is not None and not _can_scan(scanned, sdpa):
            scanned = None
        if form.soft or (form.lower is None and form.upper is None and scanned is None):
            return None
        shape = tuple(str(s) for s in (*value_of(sdpa.query).shape, *value_of(sdpa.key).shape[-2:-1]))
        key = ("bounds", form.lower, form.upper, scanned, shape)
        if key not in self._built:
            with self.behind_mask(sdpa) as write:
                if scanned is None:
                    self._built[key] = self._of_interval(write, sdpa, form)
                else:
                    self._built[key] = self._of_extent(write, sdpa, form, scanned)
        return self._built[key]

    def mask(self, sdpa: SDPANode, form: MaskForm) -> fx.Node | None:
        """What the kernel must apply beside the bounds: None, a mask over keys, or the mask itself."""
        if not form.exact:
            return sdpa.attn_mask  # type: ignore[no-any-return]
        if form.keys is None:
            return None
        key = ("keys", form.keys, str(value_of(sdpa.key).shape[-2]))
        if key not in self._built:
            with self.behind_mask(sdpa) as write:
                self._built[key] = _Emitter(write, sdpa).tensor(form.keys)
        return self._built[key]

    def packs(self, sdpa: SDPANode, form: MaskForm) -> bool:
        """Whether `mask` gives the mask itself, and that is one which `packed` takes."""
        return not form.exact and self.can_build(sdpa, form) and _has_bits(sdpa)

    def packed(self, sdpa: SDPANode) -> fx.Node:
        """The mask as words of bits."""
        key = ("words", sdpa.attn_mask)
        if key not in self._built:
            with self.behind_mask(sdpa) as write:
                self._built[key] = write.call(OPS.pack_mask.default, sdpa.attn_mask)
        return self._built[key]

    @contextmanager
    def behind_mask(self, sdpa: SDPANode) -> Iterator[GraphWriter]:
        """Insert where the mask is; without one, before the call."""
        place = self._place(sdpa)
        following = place
        if place is not sdpa.node:
            following = self._last.get(place, place).next
            while following.op in ("placeholder", "get_attr"):
                following = following.next
        with self._graph.inserting_before(following):
            yield GraphWriter(self._graph, sdpa.query)
        self._last[place] = following.prev

    def _place(self, sdpa: SDPANode) -> fx.Node:
        return sdpa.attn_mask if sdpa.attn_mask is not None else sdpa.node

    def _of_interval(self, write: GraphWriter, sdpa: SDPANode, form: MaskForm) -> fx.Node:
        emit = _Emitter(write, sdpa)
        return _joined(write, emit.tensor(form.lower or ZERO), emit.tensor(form.upper or EVERYTHING))

    def _of_extent(self, write: GraphWriter, sdpa: SDPANode, form: MaskForm, mask: fx.Node) -> fx.Node:
        """The interval, cut to the first and last key that a mask shows to any head; and the whole part."""
        emit = _Emitter(write, sdpa)
        seen = mask
        if value_of(mask).dim() < 4:
            seen = write.call(operator.getitem, seen, (None,) * (4 - value_of(mask).dim()))
        heads, rows = value_of(seen).shape[1:3]
        alike = is_one(heads)  # what is seen is what each query sees
        if not is_one(heads):
            seen = write.call("any", seen, 1, keepdim=True)
        if isinstance(rows, int) and 1 < rows <= MAX_JOINT_QUERIES:
            seen = write.call("any", seen, 2, keepdim=True)
            alike = False
        key = emit.tensor(Index(KEY))
        last = write.call(torch.where, seen, write.call(operator.add, key, 1), 0)
        first = write.call(torch.where, seen, key, emit.size(KEY))
        upper = write.call("amax", last, -1, keepdim=True)
        lower = write.call("amin", first, -1, keepdim=True)
        whole: tuple[fx.Node, ...] = ()
        if alike:
            held = write.call("sum", seen, -1, keepdim=True)
            no_gap = write.call(operator.eq, held, write.call(operator.sub, upper, lower))
            whole = (lower, write.call(torch.where, no_gap, upper, 0))
        if form.lower is not None:
            lower = write.call(torch.maximum, lower, emit.tensor(form.lower))
        if form.upper is not None:
            upper = write.call(torch.minimum, upper, emit.tensor(form.upper))
        return _joined(write, lower, upper, *whole)


def _joined(write: GraphWriter, *ends: fx.Node) -> fx.Node:
    """Bounds of `[B|1, 1, q|1, 1]` ends."""
    alike = write.call(torch.broadcast_tensors, *ends)
    joined = write.call(torch.cat, [write.call(operator.getitem, alike, i) for i in range(len(ends))], -1)
    within = write.call("clamp", write.call("squeeze", joined, 1), 0, torch.iinfo(torch.int32).max)
    return write.call("to", within, torch.int32)


def _size_of_axis(sdpa: SDPANode, axis: int) -> tuple[fx.Node, int] | int | None:
    """The size of an axis as it is known where the mask is: a number, or that of a dimension."""
    node, dim = (sdpa.key, -2) if axis == KEY else (sdpa.query, (0, 1, -2)[axis])
    size = value_of(node).shape[dim]
    if isinstance(size, int):
        return size
    if sdpa.attn_mask is None:
        return node, dim
    shape = value_of(sdpa.attn_mask).shape
    place = axis - 4
    if len(shape) < -place or str(shape[place]) != str(size):
        return None
    return sdpa.attn_mask, place


def _has_bits(sdpa: SDPANode) -> bool:
    """Whether the mask is bool, of many queries, and has a column for every key."""
    mask = value_of(sdpa.attn_mask)
    if sdpa.attn_mask is None or mask.dtype != torch.bool or not _can_scan(sdpa.attn_mask, sdpa):
        return False
    rows = mask.shape[-2] if mask.dim() > 1 else 1
    return not isinstance(rows, int) or rows > MAX_JOINT_QUERIES


def _can_scan(mask: fx.Node, sdpa: SDPANode) -> bool:
    """Whether a mask has a column for every key."""
    columns = value_of(mask).shape[-1]
    return str(columns) == str(value_of(sdpa.key).shape[-2]) and not is_one(columns)


class _Emitter:
    """Writes expressions as nodes that broadcast to `[B, H, q, L]`."""

    def __init__(self, write: GraphWriter, sdpa: SDPANode) -> None:
        self._write, self._sdpa = write, sdpa
        self._known: dict[tuple[Expr, int | None], Any] = {}

    def size(self, axis: int) -> fx.Node | int:
        """The size of an axis."""
        size = _size_of_axis(self._sdpa, axis)
        assert size is not None, "can_build() was not asked"
        return size if isinstance(size, int) else self._write.size(*size)

    def tensor(self, x: Expr, farthest: int | None = FARTHEST) -> fx.Node:
        """`x` as a 4-D tensor, sizes 1 where it does not depend on the axis; integers as int64.

        Args:
            farthest: numbers of tensors beyond it are taken for it; None: they stay and sums may wrap
                around, which hides no difference.
        """
        value = self._emit(x, farthest)
        if isinstance(value, fx.Node) and isinstance(value_of(value), torch.Tensor):
            if value_of(value).dim() == 4:
                return value
            return self._write.call("view", value, 1, 1, 1, 1)
        dtype = torch.bool if isinstance(value, bool) else torch.int64
        return self._write.call(torch.full, (1, 1, 1, 1), value, dtype=dtype, device=self._write.device)

    def _emit(self, x: Expr, farthest: int | None) -> Any:
        if (x, farthest) not in self._known:
            self._known[x, farthest] = self._new(x, farthest)
        return self._known[x, farthest]

    def _new(self, x: Expr, farthest: int | None) -> Any:
        if isinstance(x, Constant):
            if isinstance(x.value, bool | float) or farthest is None:
                return x.value
            return max(-farthest, min(x.value, farthest))
        if isinstance(x, Index):
            size = self.size(x.axis)
            shape = [-1 if axis == x.axis else 1 for axis in range(4)]
            positions = self._write.call(torch.arange, size, device=self._write.device)
            return self._write.call("view", positions, *shape)
        if isinstance(x, Element):
            return self._number(self._element(x), farthest)
        return self._apply(x, farthest)

    def _number(self, node: Any, farthest: int | None) -> Any:
        """An element of any integer type, in which sums could wrap around, as an int64 of limited size."""
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or value.dtype not in INTEGERS:
            return node
        if value.dtype != torch.int64:
            return self._write.call("to", node, torch.int64)
        return node if farthest is None else self._write.call("clamp", node, -farthest, farthest)

    def _element(self, x: Element) -> Any:
        value = value_of(x.node)
        if not isinstance(value, torch.Tensor):
            return x.node
        node = (
            x.node
            if value.device == self._write.device
            else self._write.call("to", x.node, self._write.device)
        )
        if not x.at:
            return node
        index = self._view_index(x)
        if index is None:
            index = tuple(self.tensor(i) for i in x.at)
        return self._write.call(operator.getitem, node, index)

    def _view_index(self, x: Element) -> tuple[Any, ...] | None:
        """The index that only inserts and drops axes, if that is all that is asked."""
        items: list[Any] = []
        axis = 0
        for i, size in zip(x.at, value_of(x.node).shape, strict=True):
            if i == ZERO:
                items.append(0)
                continue
            if not isinstance(i, Index) or i.axis < axis:
                return None
            of_axis = _size_of_axis(self._sdpa, i.axis)
            if isinstance(of_axis, tuple):
                of_axis = value_of(of_axis[0]).shape[of_axis[1]]
            if str(of_axis) != str(size):
                return None
            items += [None] * (i.axis - axis) + [slice(None)]
            axis = i.axis + 1
        return tuple(items + [None] * (4 - axis))

    def _apply(self, x: Apply, farthest: int | None) -> fx.Node:
        call = self._write.call
        if x.op in ("add", "mul"):
            function = operator.add if x.op == "add" else operator.mul
            if x.op == "mul" and isinstance(x.args[0], Constant) and farthest is not None:
                farthest //= max(abs(int(x.args[0].value)), 1)
            total = self._emit(x.args[0], farthest)
            for part in x.args[1:]:
                total = call(function, total, self._emit(part, farthest))
            return total  # type: ignore[no-any-return]
        parts = [self.tensor(part, None if x.op == "eq" else FARTHEST) for part in x.args]
        if x.op == "le":  # 0 <= sum
            return call(operator.ge, parts[1], 0)
        if x.op == "not":
            return call(torch.logical_not, parts[0])
        if x.op == "where":
            return call(torch.where, *parts)
        function = {
            "eq": operator.eq,
            "and": operator.and_,
            "or": operator.or_,
            "max": torch.maximum,
            "min": torch.minimum,
        }[x.op]
        result = parts[0]
        for other in parts[1:]:
            result = call(function, result, other)
        return result
