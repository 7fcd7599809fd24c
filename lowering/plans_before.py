"""FlashInfer's plans for the calls of a graph that becomes a CUDA graph: made on the host before it starts.

Inside it lengths cannot be read. What FlashInfer keeps from its first run on must not lie in the memory of
a CUDA graph either, so calls of fixed shapes are run once before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..attention import flashinfer
from .find_calls import value_of
from .kv_source import OPS, arguments_of, calls_op

LENGTHS = ("cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True)
class Before:
    """What to do with a graph's inputs before it runs, if anything; or why it cannot be a CUDA graph."""

    plan: Callable[[tuple[Any, ...]], None] | None = None
    obstacle: str = ""


def plan_before(graph: fx.Graph) -> Before:
    """The plans of all calls by "flashinfer" on a GPU."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    ragged: dict[tuple[Any, ...], dict[str, Any]] = {}  # those that share a plan only once
    dense: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for node in graph.nodes:
        op = next((op for op in (OPS.varlen_attn, OPS.dense_attn) if calls_op(node, op)), None)
        named = {} if op is None else arguments_of(node, op)
        if named.get("backend") != "flashinfer" or not value_of(named["q"]).is_cuda:
            continue
        values = {name: value_of(x) for name, x in named.items()}
        if not all(_is_known(x) for x in values.values()):
            return Before(obstacle="sizes are not known at compile time")
        shapes = tuple(
            (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in values.values()
        )
        if op is OPS.dense_attn:
            dense[shapes] = tuple(values.values())
            continue
        if any(named[name] not in inputs for name in LENGTHS):
            return Before(obstacle="cu_seqlens are computed in the graph")
        places = {name: inputs.index(named[name]) for name in LENGTHS}
        on_meta = {
            name: torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x
            for name, x in values.items()
            if name not in ("backend", "v_scale", *LENGTHS)
        }
        ragged[(*shapes, *places.values())] = {"places": places, "rest": on_meta}
    if not ragged and not dense:
        return Before()
    waiting = list(dense.values())

    def plan(args: tuple[Any, ...]) -> None:
        while waiting:
            OPS.dense_attn(*map(_like, waiting[-1]))
            waiting.pop()
        for call in ragged.values():
            lengths = {name: args[place] for name, place in call["places"].items()}
            flashinfer.plan(**lengths, **call["rest"], read=False)

    return Before(plan)


def _is_known(x: Any) -> bool:
    sizes = x.shape if isinstance(x, torch.Tensor) else [x]
    return not any(isinstance(size, torch.SymInt | torch.SymFloat | fx.Node) for size in sizes)


def _like(x: Any) -> Any:
    """Anything of the size of a tensor."""
    return torch.ones(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, torch.Tensor) else x
