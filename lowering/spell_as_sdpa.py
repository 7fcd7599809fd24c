"""Write other spellings of attention as `scaled_dot_product_attention`: what follows sees one form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..report import CallRow
from .beyond_sdpa import call_beyond_sdpa, is_beyond_sdpa
from .bypassing_functions import bypassing_calls, shapes_of
from .encoder_layer import encoder_layer_as_sdpa
from .find_calls import value_of
from .kv_source import calls_op
from .left_alone import LeftAloneError, row_of_left, sizes_of
from .multi_head_attention import multi_head_as_sdpa
from .softmax_attention import as_sdpa, read_attention, softmaxes, use_results_of_writes
from .writes import Writes

FUSED: dict[Any, Callable[[fx.Node], None]] = {
    F.multi_head_attention_forward: multi_head_as_sdpa,
    torch._transformer_encoder_layer_fwd: encoder_layer_as_sdpa,
}


def spell_as_sdpa(graph: fx.Graph) -> list[CallRow]:
    """Rewrite the attention of one graph that is spelled otherwise; a row for each that is left alone."""
    rows = []
    for node in graph.nodes:
        if calls_op(node, torch.ops.aten.scaled_dot_product_attention):
            node.target = F.scaled_dot_product_attention
    use_results_of_writes(graph)
    writes = Writes(graph)
    for softmax in softmaxes(graph):
        try:
            found = read_attention(softmax, writes)
            if is_beyond_sdpa(found):
                call_beyond_sdpa(found)  # or the reason why it is none
            else:
                as_sdpa(found, writes)
        except LeftAloneError as reason:
            rows.append(_row_of_softmax(softmax, str(reason)))
    for function, rewrite in FUSED.items():
        for node in graph.find_nodes(op="call_function", target=function):
            try:
                rewrite(node)
            except LeftAloneError as reason:
                rows.append(_row_of_fused(node, str(reason)))
    return [*rows, *(_row_of_bypass(*call) for call in bypassing_calls(graph))]


def _row_of_softmax(softmax: fx.Node, reason: str) -> CallRow:
    scores: torch.Tensor = value_of(softmax)
    names = ("batch_size", "num_heads", "q_len", "kv_len")[-min(scores.dim(), 4) :]
    return row_of_left(softmax, scores, dict(zip(names, scores.shape[-4:], strict=True)), reason)


def _row_of_fused(node: fx.Node, reason: str) -> CallRow:
    """A row without sizes: which axes are batch and tokens is the function's business."""
    tensor = value_of(node.args[0])
    return row_of_left(node, tensor, {}, f"{node.target.__name__}: {reason}")  # type: ignore[union-attr]


def _row_of_bypass(node: fx.Node, name: str) -> CallRow:
    tensors = [value_of(x) for x in node.args if isinstance(value_of(x), torch.Tensor)]
    shapes = shapes_of(node, name)
    sizes = sizes_of(*shapes) if shapes else {}
    reason = f"{name} bypasses scaled_dot_product_attention"
    return row_of_left(node, tensors[0] if tensors else None, sizes, reason)
