"""Rewrite the attention calls of a graph, each into the backend chosen for it.

    tq_store -> tq_dequantize -> (repeat_kv) -> scaled_dot_product_attention   ->   tq_append_attend
                tq_dequantize -> (repeat_kv) -> scaled_dot_product_attention   ->   tq_decode

A call that no other backend can run exactly stays as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..attention.call import AttentionCall
from ..attention.select import select
from ..report import CallRow, Report, row_of
from .find_calls import SDPANode, find_calls, static_size, value_of
from .kv_source import OPS, PackedSource, calls_op, packed_source
from .repeated_heads import strip_repeated_heads


def rewrite(gm: fx.GraphModule, requested: dict[str, str]) -> Report:
    """Rewrite all graphs of `gm` in place, sub-graphs too; one row per attention call.

    Args:
        gm: Dynamo's (torch-level) graph module.
        requested: attention backend per phase, "auto" unless named.

    Raises:
        NoAttentionBackendError: a named backend cannot run a call. `gm` is then half rewritten and
            must not be used.
    """
    rows: list[CallRow] = []
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        found = [_rewrite_call(call, requested) for call in find_calls(module.graph)]
        if found:
            module.graph.lint()
            module.recompile()
        rows += found
    return Report(rows)


def _rewrite_call(sdpa: SDPANode, requested: dict[str, str]) -> CallRow:
    key, k_repeats = strip_repeated_heads(sdpa.key)
    value, v_repeats = strip_repeated_heads(sdpa.value)
    source = packed_source(key, value, sdpa) if k_repeats == v_repeats else None
    call = _describe(sdpa, key, value, source)
    choice = select(call, requested[call.phase])
    row = row_of(sdpa.node, call, choice)
    if choice.backend == "turboquant":
        assert source is not None
        _read_packed(sdpa, source)
    return row


def _describe(sdpa: SDPANode, key: fx.Node, value: fx.Node, source: PackedSource | None) -> AttentionCall:
    q, k, v, out = (value_of(n) for n in (sdpa.query, key, value, sdpa.node))
    mask = value_of(sdpa.attn_mask)
    obstacles = list(source.obstacles) if source else []
    if not q.dim() == k.dim() == v.dim() == 4:
        obstacles.append(f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions (needs 4)")
    if source and not q.dtype == source.dtype == out.dtype:
        obstacles.append(f"q is {q.dtype}, the cache gives {source.dtype}, attention {out.dtype}")
    if not isinstance(sdpa.scale, (int, float, type(None))):
        obstacles.append("scale is not known at compile time")
    if not isinstance(sdpa.is_causal, bool):
        obstacles.append("is_causal is not known at compile time")
    cuda = q.device.type == "cuda" and torch.version.cuda
    return AttentionCall(
        batch_size=static_size(q, -4),
        q_len=static_size(q, -2),
        kv_len=static_size(k, -2),
        num_heads=static_size(q, -3),
        num_kv_heads=static_size(k, -3),
        head_dim=static_size(q, -1),
        v_head_dim=static_size(v, -1),
        dtype=out.dtype,
        device=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if cuda else None,
        mask="none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        is_causal=sdpa.is_causal is not False,
        dropout=sdpa.dropout_p,
        needs_grad=any(x.requires_grad for x in (q, k, v)),
        kv_format=source.kv_format if source else None,
        kv_source=_source_name(key, source),
        obstacles=tuple(obstacles),
    )


def _source_name(key: fx.Node, source: PackedSource | None) -> str:
    if source:
        return f"a packed cache, {source.kv_format}, max_len={value_of(source.max_len)}"
    if key.op == "placeholder":
        return "an input of the graph"
    return "computed here"


def _read_packed(sdpa: SDPANode, source: PackedSource) -> None:
    """Replace an attention call by the op that reads the packed cache; erase what that leaves dead."""
    head_dim = value_of(sdpa.query).shape[3]
    scale = float(sdpa.scale) if sdpa.scale is not None else head_dim**-0.5
    cache_args = (source.seq_lens, source.k_rotation, source.v_rotation)
    tail = (sdpa.attn_mask, None, None, source.kv_format, source.max_len, scale)
    chain = _chain(sdpa)
    inside = {sdpa.node, *chain}
    # Another reader of what was dequantized needs the store where it is.
    only_reader = all(set(node.users) <= inside for node in (source.dequantize, *chain))
    store = source.store if only_reader else None
    args: tuple[Any, ...]
    if store is not None:
        op, args = OPS.tq_append_attend.default, (source.cache, sdpa.query, *store.args[1:3])
    else:
        op, args = OPS.tq_decode.default, (sdpa.query, source.cache)
    graph = sdpa.node.graph
    with graph.inserting_before(sdpa.node):
        attend = graph.call_function(op, (*args, *cache_args, *tail))
        result = _in_layout_of(value_of(sdpa.node), attend)
    for node in {attend, result}:
        node.meta.update(sdpa.node.meta)
    sdpa.node.replace_all_uses_with(result)
    for node in (sdpa.node, *chain, source.dequantize):
        if not node.users:
            graph.erase_node(node)
    if store is not None:
        graph.erase_node(store)


def _in_layout_of(expected: torch.Tensor, attend: fx.Node) -> fx.Node:
    """The op's result (contiguous) in the layout that SDPA gives: Dynamo may have traced `view`s of it."""
    if expected.is_contiguous() or not expected.transpose(1, 2).is_contiguous():
        return attend
    result = attend
    for method, args in (("transpose", (1, 2)), ("contiguous", ()), ("transpose", (1, 2))):
        result = attend.graph.call_method(method, (result, *args))
        result.meta.update(attend.meta)
    return result


def _chain(sdpa: SDPANode) -> list[fx.Node]:
    """The nodes from the attention call up to `tq_dequantize` (both exclusive), users first."""
    nodes: list[fx.Node] = []
    for node in (sdpa.key, sdpa.value):
        while not calls_op(node, OPS.tq_dequantize):
            nodes.append(node)
            node = node.args[0]  # type: ignore[assignment]
    return nodes
