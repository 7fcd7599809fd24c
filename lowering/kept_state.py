"""Whether a graph leaves keys and values behind for later steps: in a cache that it writes, or as outputs.

Such a prefill graph must not become a CUDA graph: what it leaves would live in the graph's memory pool, and
be overwritten by the next run. An encoder leaves nothing.
"""

from __future__ import annotations

import torch
from torch import fx

from .find_calls import find_calls, value_of
from .kv_source import OPS, calls_op
from .writes import storages, written

RESHAPING = (
    "reshape", "view", "expand", "getitem", "transpose", "contiguous", "clone", "repeat",
    "repeat_interleave",
)  # fmt: skip


def keeps_keys(gm: fx.GraphModule) -> bool:
    """Whether any graph of `gm` writes to a tensor of 3 or more dimensions or returns keys or values."""
    return any(_keeps_keys(m.graph) for m in gm.modules() if isinstance(m, fx.GraphModule))


def _keeps_keys(graph: fx.Graph) -> bool:
    kept = [operand for call in find_calls(graph) for operand in (call.key, call.value)]
    outputs: set[int] = set()
    for node in graph.nodes:
        if any(isinstance(v, torch.Tensor) and v.dim() >= 3 for v in map(value_of, written(node))):
            return True
        if calls_op(node, OPS.attend):
            kept += node.args[1:3]  # type: ignore[arg-type]
        if node.op == "output":
            outputs |= storages(*node.all_input_nodes)
    return any(_origins(operand) & outputs for operand in kept)


def _origins(node: fx.Node) -> set[int]:
    """The memory of keys, and of what they were copied from with other shapes."""
    found = storages(node)
    while str(getattr(node.target, "__name__", node.target)) in RESHAPING and node.all_input_nodes:
        node = node.all_input_nodes[0]
        found |= storages(node)
    return found
