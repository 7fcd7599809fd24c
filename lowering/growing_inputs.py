"""Keep inputs that grow from step to step out of the graph, so that a CUDA graph can be replayed.

`generate` passes a 2-D attention mask that is one column longer at every step. The model pads it to the
size of the cache first, and nothing else looks at it:

    mask [B, s] -> to(bool) -> pad to [B, max_len]   |   the rest of the step, all shapes fixed

What comes before the line becomes a small graph of its own, run before the other: with a symbolic input
CUDA graphs would be recorded anew for each length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .find_calls import value_of
from .writes import written


@dataclass(frozen=True)
class Split:
    """A graph of fixed shapes, and how to get its inputs.

    Attributes:
        gm: what is left of the graph.
        example_inputs: of `gm`.
        inputs_from: the inputs of `gm` from those of the whole graph.
    """

    gm: fx.GraphModule
    example_inputs: list[Any]
    inputs_from: Callable[[tuple[Any, ...]], list[Any]]


def split_growing_inputs(gm: fx.GraphModule, example_inputs: list[Any]) -> Split | None:
    """Split off what is computed from an input that grows; None if that is not all its use.

    `gm` stays as it is: Dynamo calls the result with what its placeholders say.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    growing = {node for node in placeholders if _is_growing(value_of(node))}
    tensors = [node for node in growing if isinstance(value_of(node), torch.Tensor)]
    if len(tensors) != 1:
        return None
    before = _computed_from(growing, gm.graph)
    results = [n for n in before if any(user not in before for user in n.users)]
    only_before = all(user in before for node in growing for user in node.users)
    if not only_before or len(results) != 1 or _is_growing(value_of(results[0])):
        return None
    (mask,), (result,) = tensors, results
    kept = [i for i, node in enumerate(placeholders) if node not in growing or node is mask]
    place = kept.index(placeholders.index(mask))
    prologue = _prologue(gm, placeholders, before, result)

    def inputs_from(args: tuple[Any, ...]) -> list[Any]:
        inputs = [args[i] for i in kept]
        inputs[place] = prologue(*args)
        return inputs

    new_inputs = [example_inputs[i] for i in kept]
    new_inputs[place] = value_of(result)
    left_out = {*before, *growing} - {mask}
    return Split(_without(gm, left_out, mask, result), new_inputs, inputs_from)


def _without(gm: fx.GraphModule, left_out: set[fx.Node], mask: fx.Node, result: fx.Node) -> fx.GraphModule:
    """A copy of the graph in which the input `mask` has the place of `result`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in left_out:
            continue
        copies[node] = graph.node_copy(node, lambda source: copies[mask if source is result else source])
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    copies[mask].meta["example_value"] = value_of(result)
    graph.lint()
    rest = fx.GraphModule(gm, graph)
    rest.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):  # with `_dynamo_source`, how AOTAutograd knows static inputs
        rest._param_name_to_source = gm._param_name_to_source  # type: ignore[assignment]
    return rest


def _is_growing(value: Any) -> bool:
    """Whether a value is a symbolic size or a tensor that has one."""
    if isinstance(value, torch.Tensor):
        return any(not isinstance(size, int) for size in value.shape)
    return isinstance(value, torch.SymInt)


def _computed_from(inputs: set[fx.Node], graph: fx.Graph) -> dict[fx.Node, None]:
    """What is computed from these inputs alone, in order, until shapes are fixed; nothing that writes."""
    found: dict[fx.Node, None] = {}
    growing = set(inputs)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or written(node):
            continue
        if node.all_input_nodes and all(source in growing for source in node.all_input_nodes):
            found[node] = None
            if not isinstance(value_of(node), torch.Tensor) or _is_growing(value_of(node)):
                growing.add(node)
    return found


def _prologue(
    gm: fx.GraphModule, placeholders: list[fx.Node], nodes: dict[fx.Node, None], result: fx.Node
) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in placeholders}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(copies[result])
    return fx.GraphModule(gm, graph)
