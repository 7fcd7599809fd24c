"""Where an attention call's keys and values come from: a packed cache, or elsewhere.

A packed cache shows in a Dynamo graph as

    seq_length.add_(q)
    tq_store(cache, k, v, seq_length, k_rotation, v_rotation, format, *beside, table)
    both = tq_dequantize(cache, seq_length, k_rotation, v_rotation, format, max_len, dtype, *beside, table,
                         own_k=k, own_v=v)
    keys, values = both[0], both[1]

`beside`, what is kept beside the packed bytes, are tensors that only the store writes, like the cache. The
last two are given for chunks that attend to their own keys and values as they came. All of this, and the
block table, may be left out or given by name.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import ops  # noqa: F401  (defines torch.ops.tq_inductor)
from .find_calls import SDPANode, value_of
from .writes import Writes, storages

OPS = torch.ops.tq_inductor
COMPUTED_HERE = "computed here"
COMPUTED_FROM_CACHE = "computed here from a cache of something else (latents)"
BESIDE = ("k_mean", "exact", "exact_from", "sink_tokens")
MAX_STEPS_TO_CACHE = 12


@dataclass(frozen=True)
class PackedSource:
    """Keys and values that one `tq_dequantize` reads from a packed cache.

    Attributes:
        dequantize: that node; its arguments are the fields below.
        own: `own_k` and `own_v`, if given.
        store: the `tq_store` of this step's tokens, if attention can take it over.
        obstacles: why the packed bytes cannot be read at the attention call instead, if so.
    """

    dequantize: fx.Node
    cache: fx.Node
    seq_lens: fx.Node
    k_rotation: fx.Node
    v_rotation: fx.Node
    kv_format: str
    max_len: fx.Node | int
    dtype: torch.dtype
    beside: tuple[Any, ...]
    block_table: fx.Node | None
    own: dict[str, fx.Node]
    store: fx.Node | None
    obstacles: tuple[str, ...]


def calls_op(node: Any, op: Any) -> bool:
    """Whether `node` calls this op, as a packet (Dynamo's way) or as its default overload."""
    return isinstance(node, fx.Node) and node.target in (op, op.default)


def arguments_of(node: fx.Node, op: Any) -> dict[str, Any]:
    """All arguments of a node that calls `op`, by name, in the order of its schema."""
    schema = op.default._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def packed_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op over a packed cache by name; empty for any other node."""
    for op in (OPS.tq_store, OPS.tq_append_attend, OPS.tq_decode, OPS.tq_dequantize):
        if calls_op(node, op):
            return arguments_of(node, op)
    return {}


def packed_source(key: fx.Node, value: fx.Node, sdpa: SDPANode, writes: Writes) -> PackedSource | None:
    """The packed cache that `key` and `value` (heads not repeated) are read from; None if none."""
    attention = sdpa.node
    if not all(isinstance(n, fx.Node) and n.target is operator.getitem for n in (key, value)):
        return None
    dequantize = key.args[0]
    if not calls_op(dequantize, OPS.tq_dequantize) or value.args[0] is not dequantize:
        return None
    assert isinstance(dequantize, fx.Node)
    if (key.args[1], value.args[1]) != (0, 1):
        return None
    named = arguments_of(dequantize, OPS.tq_dequantize)
    cache, seq_lens, k_rotation, v_rotation, kv_format, max_len, dtype, *beside = named.values()
    beside, table, own = beside[: len(BESIDE)], named["block_table"], _own(named)
    obstacles = [
        f"{node.name} changes the cache between its reading and the attention call"
        for node in writes.between(dequantize, attention, cache, seq_lens, *beside, table, *own.values())
    ] + [
        f"{node.name} changes the keys or values that were read"
        for node in writes.between(dequantize, attention, key, value, sdpa.key, sdpa.value)
    ]
    store = _store_of(dequantize, attention, writes)
    return PackedSource(
        dequantize, cache, seq_lens, k_rotation, v_rotation, kv_format, max_len, dtype,  # type: ignore[arg-type]
        tuple(beside), table, own, store, tuple(obstacles),
    )  # fmt: skip


def _own(named: dict[str, Any]) -> dict[str, fx.Node]:
    """`own_k` and `own_v` of the arguments of a `tq_dequantize`, if given."""
    return {name: named[name] for name in ("own_k", "own_v") if named[name] is not None}


def _store_of(dequantize: fx.Node, attention: fx.Node, writes: Writes) -> fx.Node | None:
    """The store of this step, if nothing but this one attention call depends on its place.

    Taking it over moves the write down to the attention call: no other node in between may read the
    packed bytes, write the length, or change the new keys and values.
    """
    named = arguments_of(dequantize, OPS.tq_dequantize)
    cache, seq_lens, *_ = named.values()
    beside = [named[name] for name in BESIDE]
    store = dequantize.prev
    memory = storages(cache, *beside)
    while store.op != "placeholder" and store.op != "root":
        if calls_op(store, OPS.tq_store) and store.args[0] is cache:
            break
        if memory & storages(*store.all_input_nodes):
            return None
        store = store.prev
    if not calls_op(store, OPS.tq_store):
        return None
    stored = arguments_of(store, OPS.tq_store)
    if any(stored[name] != named[name] for name in stored if name in named):
        return None
    new_k, new_v = store.args[1:3]
    if tuple(_own(named).values()) not in ((), (new_k, new_v)):  # not those that it stores
        return None
    if writes.between(store, attention, seq_lens, named["block_table"], new_k, new_v):  # type: ignore[arg-type]
        return None
    node = dequantize.next
    while node is not attention:
        if memory & storages(*node.all_input_nodes):
            return None
        node = node.next
    return store


def origin_of(key: fx.Node, sdpa: SDPANode, writes: Writes) -> str:
    """Where the keys of a call come from, in words."""
    base = key
    while _is_view(base):
        base = base.args[0]  # type: ignore[assignment]
    if base.op in ("placeholder", "get_attr"):
        writers = writes.between(base, sdpa.node, base)
        if not writers:
            return "an input of the graph"
        rolls = any(node.target == "copy_" for node in writers)
        kind = "a static sliding-window cache" if rolls else "a static cache"
        return f"{kind}, max_len={value_of(base).shape[-2]}"
    if _extends_an_input(base):
        return "a dynamic cache"
    return COMPUTED_FROM_CACHE if _uses_cache(base, sdpa, writes) else COMPUTED_HERE


def _extends_an_input(node: fx.Node) -> bool:
    """Whether a node puts new tokens behind those of an input, `cat((old, new))`."""
    if getattr(node.target, "__name__", "") not in ("cat", "concat", "concatenate"):
        return False
    parts = node.args[0] if node.args else ()
    first = parts[0] if isinstance(parts, tuple | list) and parts else None
    while isinstance(first, fx.Node) and _is_view(first):
        first = first.args[0]  # type: ignore[assignment]
    return isinstance(first, fx.Node) and _may_be_state(first)


def _uses_cache(node: fx.Node, sdpa: SDPANode, writes: Writes) -> bool:
    """Whether keys are computed, within a few steps, from inputs that this graph appends to (MLA)."""
    level, seen = [node], {node}
    for _ in range(MAX_STEPS_TO_CACHE):
        level = [x for n in level for x in n.all_input_nodes if x not in seen]
        seen.update(level)
        for x in level:
            if _may_be_state(x) and writes.between(x, sdpa.node, x):
                return True
            if _extends_an_input(x):
                return True
    return False


def _may_be_state(node: fx.Node) -> bool:
    """Whether an input may hold tokens of earlier steps: no parameter, no length."""
    value = value_of(node)
    is_input = node.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor)
    return is_input and value.dim() >= 3 and not isinstance(value, torch.nn.Parameter)


def _is_view(node: fx.Node) -> bool:
    """Whether a node shows the memory of its first argument."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and bool(storages(node)) and storages(node) == storages(source)
