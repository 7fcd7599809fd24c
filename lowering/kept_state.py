"""Whether a graph leaves keys and values behind for later steps: in a cache that it writes, or as outputs.

Such a prefill graph must not become a CUDA graph: what it leaves would live in the graph's memory pool, and
be overwritten by the next run. An encoder leaves nothing.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from .find_calls import value_of
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
    keys: set[int] = set()
    outputs: set[int] = set()
    for node in graph.nodes:
        if any(isinstance(v, torch.Tensor) and v.dim() >= 3 for v in map(value_of, written(node))):
            return True
        if node.target is F.scaled_dot_product_attention or calls_op(node, OPS.attend):
            for operand in node.all_input_nodes[1:3]:
                keys |= _origins(operand)
        if node.op == "output":
            outputs |= storages(*node.all_input_nodes)
    return bool(keys & outputs)


def _origins(node: fx.Node) -> set[int]:
    """The memory of keys, and of what they were copied from with other shapes."""
    found = storages(node)
    while str(getattr(node.target, "__name__", node.target)) in RESHAPING and node.all_input_nodes:
        node = node.all_input_nodes[0]
        found |= storages(node)
    return found
