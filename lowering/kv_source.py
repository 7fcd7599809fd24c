"""Where an attention call's keys and values come from: a packed cache, or elsewhere.

A packed cache shows in a Dynamo graph as

    seq_length.add_(q)
    tq_store(cache, k, v, seq_length, k_rotation, v_rotation, format)
    both = tq_dequantize(cache, seq_length, k_rotation, v_rotation, format, max_len, dtype)
    keys, values = both[0], both[1]
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .find_calls import SDPANode, value_of

OPS = torch.ops.tq_inductor
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


@dataclass(frozen=True)
class PackedSource:
    """Keys and values that one `tq_dequantize` reads from a packed cache.

    Attributes:
        dequantize: that node; its arguments are the fields below.
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
    store: fx.Node | None
    obstacles: tuple[str, ...]


def calls_op(node: Any, op: Any) -> bool:
    """Whether `node` calls this op, as a packet (Dynamo's way) or as its default overload."""
    return isinstance(node, fx.Node) and node.target in (op, op.default)


def _storages(*nodes: Any) -> set[int]:
    tensors = [v for v in map(value_of, nodes) if isinstance(v, torch.Tensor)]
    return {t.untyped_storage()._cdata for t in tensors}


def _written(node: fx.Node) -> list[fx.Node]:
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
        written = [named.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
        plain = [x for x in written if isinstance(x, fx.Node)]
        return plain if len(plain) == len(written) else node.all_input_nodes
    if isinstance(target, torch._ops.HigherOrderOperator) or "out" in node.kwargs:
        return node.all_input_nodes
    name = getattr(target, "__name__", "")
    return node.all_input_nodes if name in IN_PLACE_OPERATORS or name.endswith("_") else []


def writes_between(first: fx.Node, last: fx.Node, *tensors: fx.Node) -> list[fx.Node]:
    """Nodes after `first` and before `last` that may write to the memory of any of `tensors`."""
    memory = _storages(*tensors)
    writers = []
    node = first.next
    while node is not last:
        if _storages(*_written(node)) & memory:
            writers.append(node)
        node = node.next
    return writers


def packed_source(key: fx.Node, value: fx.Node, sdpa: SDPANode) -> PackedSource | None:
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
    cache, seq_lens, k_rotation, v_rotation, kv_format, max_len, dtype = dequantize.args
    obstacles = [
        f"{node.name} changes the cache between its reading and the attention call"
        for node in writes_between(dequantize, attention, cache, seq_lens)  # type: ignore[arg-type]
    ] + [
        f"{node.name} changes the keys or values that were read"
        for node in writes_between(dequantize, attention, key, value, sdpa.key, sdpa.value)
    ]
    store = _store_of(dequantize, attention)
    return PackedSource(
        dequantize, cache, seq_lens, k_rotation, v_rotation, kv_format, max_len, dtype,  # type: ignore[arg-type]
        store, tuple(obstacles),
    )  # fmt: skip


def _store_of(dequantize: fx.Node, attention: fx.Node) -> fx.Node | None:
    """The store of this step, if nothing but this one attention call depends on its place.

    Taking it over moves the write down to the attention call: no other node in between may read the
    packed bytes, write the length, or change the new keys and values.
    """
    cache, seq_lens, k_rotation, v_rotation, kv_format = dequantize.args[:5]
    store = dequantize.prev
    memory = _storages(cache)
    while store.op != "placeholder" and store.op != "root":
        if calls_op(store, OPS.tq_store) and store.args[0] is cache:
            break
        if memory & _storages(*store.all_input_nodes):
            return None
        store = store.prev
    if not calls_op(store, OPS.tq_store):
        return None
    if store.args[3:] != (seq_lens, k_rotation, v_rotation, kv_format):
        return None
    new_k, new_v = store.args[1:3]
    if writes_between(store, attention, seq_lens, new_k, new_v):  # type: ignore[arg-type]
        return None
    node = dequantize.next
    while node is not attention:
        if memory & _storages(*node.all_input_nodes):
            return None
        node = node.next
    return store
