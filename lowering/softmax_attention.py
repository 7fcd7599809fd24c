"""Hand-written attention, second half: find it around a softmax and write it as one SDPA node.

    softmax(scores, dim=-1) -> .to(dtype) -> dropout(p, training=False) -> matmul(v)

is read forwards from the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F

from .attention_sinks import drops_last_column
from .find_calls import restricted_at, value_of
from .head_axes import HeadAxes, grouped_heads
from .left_alone import LeftAloneError
from .new_nodes import NewNodes, in_layout_of
from .operations import arguments, in_place, known_number, name_of, operation, same_sizes
from .score_masks import mask_of
from .score_steps import (
    PRODUCTS,
    REGROUPED,
    UNCHANGED,
    Operand,
    Scores,
    einsum_axes,
    ordered,
    reaches_product,
    read_scores,
)
from .writes import Writes

CHANGES = {"add", "sub", "mul", "div", "masked_fill"}


@dataclass(frozen=True)
class SoftmaxAttention:
    """One hand-written attention.

    Attributes:
        scores: what enters the softmax.
        softmax: the anchor.
        nodes: from the last product back to the softmax (inclusive).
        value: factor of the last product in the order `[..., k, dv]`.
        result_dims: the order of axes of the last product's result, seen from `[..., q, dv]`.
    """

    scores: Scores
    softmax: fx.Node
    nodes: list[fx.Node]
    value: Operand
    result_dims: tuple[int, ...] | None

    @property
    def product(self) -> fx.Node:
        """The last node, whose result is the attention's."""
        return self.nodes[0]


def use_results_of_writes(graph: fx.Graph) -> None:
    """After `scores.masked_fill_(...)`, let users of `scores` use that node: it is the same tensor."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in place:
        written = node.args[0] if node.op == "call_method" and operation(node) in CHANGES else None
        if written is not None and in_place(node) and reaches_product(written):
            written.replace_all_uses_with(node, lambda user, node=node: place[user] > place[node])


def softmaxes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Softmaxes between two products of tensors, in order: each is an attention of some form."""
    for node in list(graph.nodes):
        if operation(node) not in ("softmax", "_safe_softmax"):
            continue
        if reaches_product(arguments(node, "input")["input"]) and _enters_product(node):
            yield node


def _enters_product(softmax: fx.Node) -> bool:
    near = [softmax]
    for node in near:
        if operation(node) in PRODUCTS:
            return True
        value = value_of(node)
        for user in node.users if isinstance(value, torch.Tensor) else []:
            other = value_of(user)
            close = isinstance(other, torch.Tensor) and other.dim() >= 2 <= value.dim()
            if user not in near and (
                operation(user) in PRODUCTS
                or (close and same_sizes(other.shape[-2:-1], value.shape[-2:-1]) and len(near) < 32)
            ):
                near.append(user)
    return False


def read_attention(softmax: fx.Node, writes: Writes) -> SoftmaxAttention:
    """The attention around a softmax.

    Raises:
        LeftAloneError: it cannot be replaced exactly.
    """
    restricted = restricted_at(softmax)
    if restricted:  # SDPA might find none of these backends able to run the call
        raise LeftAloneError(f"inside torch.nn.attention.sdpa_kernel({restricted})")
    value = value_of(softmax)
    dim = arguments(softmax, "input", "dim").get("dim")
    if dim not in (-1, value.dim() - 1):
        raise LeftAloneError(f"softmax over dim={dim} (needs the last one)")
    nodes, factor, result_dims, drops_column = _read_weights(softmax)
    scores = read_scores(arguments(softmax, "input")["input"])
    if scores is None:
        raise LeftAloneError("the scores come from no product of two tensors")
    if (scores.sinks is not None) != drops_column:
        raise LeftAloneError("a column is appended to the scores or dropped after the softmax, not both")
    found = SoftmaxAttention(scores, softmax, nodes, factor, result_dims)
    _check_users(found)
    _check_types(found)
    _check_writes(found, writes)
    return found


def _read_weights(
    softmax: fx.Node,
) -> tuple[list[fx.Node], Operand, tuple[int, ...] | None, bool]:
    nodes, drops_column = [softmax], False
    while True:
        weights = nodes[0]
        users = list(weights.users)
        if len(users) != 1:
            others = ", ".join(user.name for user in users if operation(user) not in PRODUCTS)
            raise LeftAloneError(f"the attention weights are used elsewhere too (by {others})")
        nodes.insert(0, users[0])
        user, name = users[0], operation(users[0])
        plain = user.args[:1] == (weights,) and len(user.args) == 2 and not user.kwargs
        if name == "matmul" and plain:
            return nodes, Operand(user.args[1]), None, drops_column  # type: ignore[arg-type]
        if name == "einsum":
            factor, result_dims = _einsum_value(user, weights)
            return nodes, factor, result_dims, drops_column
        if name == "dropout":
            _check_dropout(user)
        elif drops_last_column(user) and not drops_column:
            drops_column = True
        elif not (name in UNCHANGED | REGROUPED and user.args[0] is weights):
            raise LeftAloneError(f"the attention weights are changed by {name_of(user)}")


def _check_dropout(node: fx.Node) -> None:
    named = {"p": 0.5, "training": True} | arguments(node, "input", "p", "training")
    training, p = named.get("train", named["training"]), known_number(named["p"])
    if p is None or not isinstance(training, bool):
        raise LeftAloneError("dropout is not known at compile time")
    if training and p > 0:
        raise LeftAloneError(f"dropout p={p} while training: other random numbers would be drawn")


def _einsum_value(node: fx.Node, weights: fx.Node) -> tuple[Operand, tuple[int, ...] | None]:
    axes, factors = einsum_axes(node)
    if factors[0] is not weights:
        raise LeftAloneError(f"the attention weights are the second factor of {node.args[0]!r}")
    *batch, i, j = list(axes[0])
    features = sorted(set(axes[1]) - set(axes[0]))
    result = [*batch, i, *features]
    if len(features) != 1 or set(axes[1]) != {*batch, j, *features} or set(axes[2]) != set(result):
        raise LeftAloneError(f"attention weights and values meet in the einsum {node.args[0]!r}")
    value = ordered(factors[1], axes[1], [*batch, j, *features])
    dims = tuple(result.index(letter) for letter in axes[2])
    return value, None if dims == tuple(range(len(dims))) else dims


def _check_users(found: SoftmaxAttention) -> None:
    """Nothing but the attention itself may use what is about to disappear."""
    inside = {*found.nodes, *found.scores.nodes}
    for node in found.scores.nodes:
        others = [user.name for user in node.users if user not in inside]
        if others:
            raise LeftAloneError(f"the scores are used elsewhere too (by {', '.join(others)})")


def _check_types(found: SoftmaxAttention) -> None:
    """SDPA computes in float32 at least and returns the type of its inputs."""
    factors = {"q": found.scores.query, "k": found.scores.key, "v": found.value}
    dtypes = {name: value_of(factor.node).dtype for name, factor in factors.items()}
    dtype, device = dtypes["q"], value_of(found.scores.query.node).device
    if set(dtypes.values()) != {dtype} or value_of(found.product).dtype != dtype:
        given = ", ".join(f"{name} is {d}" for name, d in dtypes.items())
        raise LeftAloneError(f"{given}, the result {value_of(found.product).dtype}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise LeftAloneError(f"q is {dtype}")
    exact = {dtype, torch.float32} if dtype.itemsize == 2 else {dtype}
    for node in (*reversed(found.scores.nodes), *reversed(found.nodes)):
        value = value_of(node)
        if isinstance(value, torch.Tensor) and value.dtype not in exact | {torch.bool}:
            raise LeftAloneError(f"{name_of(node)} gives {value.dtype}, where q is {dtype}")
        if isinstance(value, torch.Tensor) and value.device != device:
            raise LeftAloneError(f"{name_of(node)} gives a tensor on {value.device}, q is on {device}")


def _check_writes(found: SoftmaxAttention, writes: Writes) -> None:
    """All that SDPA reads, it reads where the last product was."""
    inside = {*found.scores.nodes, *found.nodes}
    for reader in found.scores.nodes:
        inputs = [x for x in reader.all_input_nodes if x not in inside]
        # The steps themselves write only scores.
        writers = [w for w in writes.between(reader, found.product, *inputs) if w not in inside]
        if writers:
            raise LeftAloneError(f"{writers[0].name} changes an input of the attention before its end")


def as_sdpa(found: SoftmaxAttention, writes: Writes) -> None:
    """Replace hand-written attention by one `scaled_dot_product_attention`.

    Raises:
        LeftAloneError: shapes, scale or masks that it cannot express exactly. The graph is as it was.
    """
    new = NewNodes(found.product)
    try:
        result = _insert_sdpa(found, new, writes)
    except LeftAloneError:
        new.erase_unused()
        raise
    found.product.replace_all_uses_with(result)
    for node in (*found.nodes, *found.scores.nodes):
        if not node.users:
            node.graph.erase_node(node)
    new.erase_unused()


def _insert_sdpa(found: SoftmaxAttention, new: NewNodes, writes: Writes) -> fx.Node:
    scores, weights = found.scores, found.nodes[1]
    like_scores = [*scores.nodes, *found.nodes[1:]]
    heads = HeadAxes([n for n in like_scores if isinstance(value_of(n), torch.Tensor)], new, writes)
    dtype = value_of(scores.query.node).dtype
    mask = mask_of(scores.steps, dtype, heads, new)
    q, k = (heads.of_factor(x.node, x.dims, scores.nodes[-1]) for x in (scores.query, scores.key))
    v = heads.of_factor(found.value.node, found.value.dims, weights)
    gqa = {"enable_gqa": True} if grouped_heads(q, k, v) else {}
    result = new(
        F.scaled_dot_product_attention, q, k, v,
        attn_mask=mask.node, dropout_p=0.0, is_causal=False, scale=mask.scale, **gqa,
    )  # fmt: skip
    if mask.empty_rows is not None:
        # All of a row is masked: the softmax gives NaN there, and SDPA what its kernel happens to give.
        nothing = math.nan if operation(found.softmax) == "softmax" else 0.0
        result = new(torch.masked_fill, result, mask.empty_rows, nothing)
    result = heads.back(result, weights)
    if found.result_dims is not None:
        result = new(torch.permute, result, found.result_dims)
    return in_layout_of(found.product, result, new)
