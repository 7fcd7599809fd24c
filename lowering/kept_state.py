"""Whether a graph leaves keys and values behind for later steps: in a cache that it writes, or as outputs.

What a CUDA graph returns lives in its memory pool, and is overwritten by the next run: a graph that returns
keys (of a cache that grows, or that it made) must not become one. A prefill graph that writes to a cache
need not: it runs once per prompt. An encoder leaves nothing.

A step may become one if what it writes stays where it is. Caches say so of their buffers, but cannot while
Dynamo traces them, and so not of those that they make in a compiled prefill.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._dynamo.source import AttrSource

from .find_calls import find_calls, value_of
from .kv_source import OPS, calls_op, packed_arguments
from .writes import storages, written

RESHAPING = (
    "reshape", "view", "expand", "getitem", "transpose", "contiguous", "clone", "repeat",
    "repeat_interleave",
)  # fmt: skip


def keeps_keys(gm: fx.GraphModule) -> bool:
    """Whether any graph of `gm` writes to a tensor of 3 or more dimensions or returns keys or values."""
    return returns_keys(gm) or any(_writes_state(graph) for graph in _graphs(gm))


def returns_keys(gm: fx.GraphModule) -> bool:
    """Whether any graph of `gm` returns keys or values that are not in the memory of its inputs."""
    return any(_returns_keys(graph) for graph in _graphs(gm))


def keep_in_place(gm: fx.GraphModule) -> None:
    """Tell CUDA graphs that what the graph writes, if it is an attribute of an object, stays in its place.

    And the rotations of a packed cache, which would be copied at every step otherwise.
    As `torch._dynamo.mark_static_address` with `guard=False` does: should another object come, with other
    memory, the CUDA graph is recorded again. A tensor that is itself an argument may be another each time.
    """
    memory: set[int] = set()
    for node in gm.graph.nodes:
        named = packed_arguments(node)
        rotations = (named[name] for name in ("k_rotation", "v_rotation") if name in named)
        memory |= storages(*written(node), *rotations)
    for node in gm.graph.find_nodes(op="placeholder"):
        if storages(node) & memory and isinstance(getattr(node, "_dynamo_source", None), AttrSource):
            node.meta.setdefault("tensor_dict", {}).setdefault("_dynamo_static_input_type", "unguarded")


def _graphs(gm: fx.GraphModule) -> list[fx.Graph]:
    return [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]


def _writes_state(graph: fx.Graph) -> bool:
    values = (value_of(tensor) for node in graph.nodes for tensor in written(node))
    return any(isinstance(value, torch.Tensor) and value.dim() >= 3 for value in values)


def _returns_keys(graph: fx.Graph) -> bool:
    kept = [operand for call in find_calls(graph) for operand in (call.key, call.value)]
    outputs: set[int] = set()
    for node in graph.nodes:
        if calls_op(node, OPS.attend) or calls_op(node, OPS.dense_attn):
            kept += node.args[1:3]  # type: ignore[arg-type]
        if node.op == "output":
            outputs |= storages(*node.all_input_nodes)
    outputs -= storages(*(node for node in graph.nodes if node.op == "placeholder"))
    return any(_origins(operand) & outputs for operand in kept)


def _origins(node: fx.Node) -> set[int]:
    """The memory of keys, and of what they were copied from with other shapes."""
    found = storages(node)
    while str(getattr(node.target, "__name__", node.target)) in RESHAPING and node.all_input_nodes:
        node = node.all_input_nodes[0]
        found |= storages(node)
    return found
