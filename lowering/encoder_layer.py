"""`nn.TransformerEncoderLayer` in eval mode, which is one fused function then, as its parts and SDPA.

_transformer_encoder_layer_fwd(x [N, L, E], ...)  ->  norm(x + attention(x)), norm(x + mlp(x))
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .find_calls import value_of
from .left_alone import LeftAloneError
from .new_nodes import NewNodes

PARAMETERS = (
    "src", "embed_dim", "num_heads", "in_weight", "in_bias", "out_weight", "out_bias", "use_gelu",
    "norm_first", "eps", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias",
    "linear1_weight", "linear1_bias", "linear2_weight", "linear2_bias", "mask", "mask_type",
)  # fmt: skip


def encoder_layer_as_sdpa(node: fx.Node) -> None:
    """Replace one `_transformer_encoder_layer_fwd`.

    Raises:
        LeftAloneError: it has a mask, or no batch.
    """
    named: dict[str, Any] = dict(zip(PARAMETERS, node.args, strict=False)) | node.kwargs
    if named.get("mask") is not None:
        raise LeftAloneError("a mask whose kind the fused layer works out itself")
    if value_of(named["src"]).dim() != 3 or value_of(named["src"]).is_nested:
        raise LeftAloneError("src is not [N, L, E]")
    new, x = NewNodes(node), named["src"]
    if named["norm_first"]:
        x = new(torch.add, x, _attention(_norm(x, 1, named, new), named, new))
        x = new(torch.add, x, _mlp(_norm(x, 2, named, new), named, new))
    else:
        x = _norm(new(torch.add, x, _attention(x, named, new)), 1, named, new)
        x = _norm(new(torch.add, x, _mlp(x, named, new)), 2, named, new)
    node.replace_all_uses_with(x)
    node.graph.erase_node(node)


def _attention(x: fx.Node, named: dict[str, Any], new: NewNodes) -> fx.Node:
    parts = new(torch.chunk, new(F.linear, x, named["in_weight"], named["in_bias"]), 3, -1)
    q, k, v = (
        new(torch.transpose, new("unflatten", part, -1, (named["num_heads"], -1)), 1, 2)
        for part in (new(operator.getitem, parts, i) for i in range(3))
    )
    result = new(F.scaled_dot_product_attention, q, k, v)
    result = new(torch.flatten, new(torch.transpose, result, 1, 2), 2)
    return new(F.linear, result, named["out_weight"], named["out_bias"])


def _mlp(x: fx.Node, named: dict[str, Any], new: NewNodes) -> fx.Node:
    hidden = new(F.linear, x, named["linear1_weight"], named["linear1_bias"])
    hidden = new(F.gelu if named["use_gelu"] else F.relu, hidden)
    return new(F.linear, hidden, named["linear2_weight"], named["linear2_bias"])


def _norm(x: fx.Node, which: int, named: dict[str, Any], new: NewNodes) -> fx.Node:
    weight, bias = named[f"norm{which}_weight"], named[f"norm{which}_bias"]
    return new(F.layer_norm, x, (named["embed_dim"],), weight, bias, named["eps"])
