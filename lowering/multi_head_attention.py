"""`nn.MultiheadAttention`, one node of a Dynamo graph, as projections and one SDPA node.

multi_head_attention_forward(query [L, N, E], key [S, N, Ek], value [S, N, Ev], ...)[0]
    ->  linear, SDPA over [N, H, L, D], linear
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .find_calls import value_of
from .left_alone import LeftAloneError
from .new_nodes import NewNodes, in_layout_of
from .score_masks import bounded

SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def multi_head_as_sdpa(node: fx.Node) -> None:
    """Replace one `multi_head_attention_forward`.

    Raises:
        LeftAloneError: it returns attention weights, or has features that are not rewritten. The graph
            is as it was.
    """
    bound = SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    named = bound.arguments
    _check(node, named)
    new = NewNodes(node)
    heads = named["num_heads"]
    # [L, N, E] -> [N, H, L, D]
    q, k, v = (
        new(torch.permute, new("unflatten", x, -1, (heads, -1)), (1, 2, 0, 3))
        for x in _projections(named, new)
    )
    dtype = value_of(named["query"]).dtype
    mask, empty_rows = _mask(named, heads, dtype, new), None
    if named["need_weights"] and mask is not None:
        # Then it is a plain softmax that attends: NaN where all of a row is masked.
        empty_rows = new(torch.all, new(torch.eq, mask, -math.inf), -1, True)
        mask = bounded(mask, new)
    result = new(
        F.scaled_dot_product_attention, q, k, v,
        attn_mask=mask,
        dropout_p=named["dropout_p"] if named["training"] else 0.0,
        is_causal=mask is None and named["is_causal"],
    )  # fmt: skip
    if empty_rows is not None:
        result = new(torch.masked_fill, result, empty_rows, math.nan)
    result = new(torch.flatten, new(torch.permute, result, (2, 0, 1, 3)), 2)
    result = new(F.linear, result, named["out_proj_weight"], named["out_proj_bias"])
    for attended in list(node.users):
        attended.replace_all_uses_with(in_layout_of(attended, result, new))
        node.graph.erase_node(attended)
    node.graph.erase_node(node)


def _check(node: fx.Node, named: dict[str, Any]) -> None:
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        raise LeftAloneError("need_weights=True, and the attention weights are used")
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if named[name] is not None:
            raise LeftAloneError(f"{name} is given")
    if named["add_zero_attn"]:
        raise LeftAloneError("add_zero_attn=True")
    if value_of(named["query"]).dim() != 3:
        raise LeftAloneError("query has no batch dimension")
    if not all(isinstance(named[name], bool) for name in ("training", "is_causal", "need_weights")):
        raise LeftAloneError("training, is_causal or need_weights is not known at compile time")
    if named["training"] and not isinstance(named["dropout_p"], (int, float)):
        raise LeftAloneError("dropout is not known at compile time")
    if named["training"] and named["need_weights"] and named["dropout_p"] > 0:
        raise LeftAloneError(
            f"need_weights=True with dropout p={named['dropout_p']} while training: other random "
            "numbers would be drawn"
        )
    if named["is_causal"] and named["attn_mask"] is None:
        raise LeftAloneError("is_causal=True without the attn_mask that it stands for")


def _projections(named: dict[str, Any], new: NewNodes) -> list[fx.Node]:
    """Queries, keys and values after their projections."""
    inputs = [named["query"], named["key"], named["value"]]
    bias = named["in_proj_bias"]
    if inputs[0] is inputs[1] is inputs[2] and not named["use_separate_proj_weight"]:
        projected = new(F.linear, inputs[0], named["in_proj_weight"], bias)
        return _thirds(projected, -1, new)
    if named["use_separate_proj_weight"]:
        weights = [named[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = _thirds(named["in_proj_weight"], 0, new)
    biases = _thirds(bias, 0, new) if bias is not None else [None] * 3
    return [new(F.linear, *each) for each in zip(inputs, weights, biases, strict=True)]


def _thirds(node: fx.Node, dim: int, new: NewNodes) -> list[fx.Node]:
    parts = new(torch.chunk, node, 3, dim)
    return [new(operator.getitem, parts, i) for i in range(3)]


def _mask(named: dict[str, Any], heads: int, dtype: torch.dtype, new: NewNodes) -> fx.Node | None:
    """The float mask of both masks; None if there is none, or `is_causal` stands for it."""
    attn_mask, padding = named["attn_mask"], named["key_padding_mask"]
    if named["is_causal"] and padding is None and not named["need_weights"]:
        return None
    if attn_mask is not None:
        attn_mask = _float(attn_mask, dtype, new)
        if value_of(attn_mask).dim() == 3:  # [N * H, L, S]
            attn_mask = new("unflatten", attn_mask, 0, (-1, heads))
    if padding is not None:  # [N, S]
        padding = new(torch.unsqueeze, new(torch.unsqueeze, _float(padding, dtype, new), 1), 1)
    if attn_mask is None or padding is None:
        return padding if attn_mask is None else attn_mask
    return new(torch.add, attn_mask, padding)


def _float(mask: fx.Node, dtype: torch.dtype, new: NewNodes) -> fx.Node:
    """A bool mask, True where hidden, as one to be added."""
    if value_of(mask).is_floating_point():
        return mask
    return new(torch.masked_fill, new(torch.zeros_like, mask, dtype=dtype), mask, -math.inf)
