"""Find the attention calls of a Dynamo graph, where `scaled_dot_product_attention` is still one node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

PARAMETERS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
)  # fmt: skip
ALL_SDPA_BACKENDS = {"MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"}
SPELLED_OTHERWISE = "tq_spelled_otherwise"  # in the meta of an SDPA node that the user did not write
RESTRICTED = "tq_restricted"  # in the meta of a sub-graph's module: as in `SDPANode`
DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@dataclass(frozen=True)
class SDPANode:
    """One attention call in the terms of `scaled_dot_product_attention`, arguments by name.

    Attributes:
        node: its result; an SDPA node, or the last product of a call from `beyond_sdpa.py`.
        restricted: the SDPA backends that the user's `sdpa_kernel(...)` allows; "" if all.
        spelled_otherwise: whether the user wrote it as something else than SDPA.
        sinks: one more score per head `[H]`, which has no value.
        softcap: scores are `softcap * tanh(scale * q @ k.T / softcap)` before the mask.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: Any
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any
    restricted: str = ""
    spelled_otherwise: bool = False
    sinks: fx.Node | None = None
    softcap: float | None = None


def find_calls(graph: fx.Graph) -> Iterator[SDPANode]:
    """The attention calls of one graph, in order, each as it is when its turn comes."""
    restricted = _inherited(graph)
    for node in list(graph.nodes):
        if _is_sdpa_kernel(node):
            restricted = _allowed_backends(node)
        elif node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            positional = dict(zip(PARAMETERS, node.args, strict=False))
            named = {**DEFAULTS, **positional, **node.kwargs}
            spelled = SPELLED_OTHERWISE in node.meta
            yield SDPANode(node, **named, restricted=restricted, spelled_otherwise=spelled)


def restricted_at(node: fx.Node) -> str:
    """The SDPA backends that the user's `sdpa_kernel(...)` allows at any node; "" if all."""
    while node.op != "root":
        node = node.prev
        if _is_sdpa_kernel(node):
            return _allowed_backends(node)
    return _inherited(node.graph)


def note_restrictions(gm: fx.GraphModule) -> None:
    """Tell each sub-graph (of a checkpoint or `cond`) which `sdpa_kernel(...)` it is called inside of."""
    for module in gm.modules():  # one that calls comes before what it calls
        for node in module.graph.find_nodes(op="get_attr") if isinstance(module, fx.GraphModule) else ():
            called = getattr(module, str(node.target), None)
            if isinstance(called, fx.GraphModule):
                called.meta[RESTRICTED] = restricted_at(next(iter(node.users), node))


def _inherited(graph: fx.Graph) -> str:
    return graph.owning_module.meta.get(RESTRICTED, "") if graph.owning_module else ""


def _is_sdpa_kernel(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "_sdpa_kernel"


def _allowed_backends(node: fx.Node) -> str:
    """The names that a `_sdpa_kernel` node, at the start or end of a `with`, leaves; "" if all."""
    backends = node.args[0] if isinstance(node.args[0], tuple | list) else [node.args[0]]
    names = [str(b.args[0]) if isinstance(b, fx.Node) and b.args else str(b) for b in backends]
    return "" if set(names) >= ALL_SDPA_BACKENDS else ", ".join(names)


def value_of(node: Any) -> Any:
    """What Dynamo saw at a node: a fake tensor, a (symbolic) number, or None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def static_size(tensor: torch.Tensor, dim: int) -> int | None:
    """A size (of a negative `dim`) if there is one, known at compile time, else None; adds no guard."""
    size = tensor.shape[dim] if -dim <= tensor.dim() else None
    return size if isinstance(size, int) else None
