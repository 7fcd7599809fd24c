"""Find attention that bypasses SDPA: flash-attn, xformers, flex_attention, ops of `aten`.

What such a function computes is its own business, so it is told and not guessed. Dynamo traces through
Python functions: what it leaves as one node with such a name is an operator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .find_calls import value_of

NAMES = re.compile(r"(attention|attn|flash_fwd)(?!_?(mask|bias))", re.IGNORECASE)
HEADS_FIRST = re.compile(r"scaled_dot_product|flex_attention")  # [B, H, n, d], others [B, n, H, d]
BACKWARD = re.compile("backward|bwd")  # of a custom autograd function, traced along with its forward
KNOWN = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


def bypassing_calls(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Nodes that compute attention otherwise, and what they call."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target in KNOWN:
            continue
        name = _qualified_name(node.target)
        if name.startswith("tq_inductor.") or BACKWARD.search(name):
            continue
        is_answer = isinstance(value_of(node), bool | torch.SymBool)  # "can_use_flash_attention"
        if NAMES.search(name) and not is_answer:
            yield node, name


def _qualified_name(target: Any) -> str:
    """E.g. "aten._scaled_dot_product_flash_attention", "flex_attention"."""
    operators = (torch._ops.OpOverloadPacket, torch._ops.OpOverload, torch._ops.HigherOrderOperator)
    if isinstance(target, operators):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", "")


def shapes_of(node: fx.Node, name: str) -> list[list[Any]]:
    """The shapes `[B, H, n, d]` of q, k and v, if the first three tensors are such; else nothing."""
    values = [v for v in map(value_of, node.args[:3]) if isinstance(v, torch.Tensor) and v.dim() == 4]
    order = (0, 1, 2, 3) if HEADS_FIRST.search(name) else (0, 2, 1, 3)
    return [[v.shape[i] for i in order] for v in values] if len(values) == 3 else []
