"""Rewrite the attention calls of a graph, each into the backend chosen for it.

    tq_store -> tq_dequantize -> (repeat_kv) -> scaled_dot_product_attention   ->   tq_append_attend
                tq_dequantize -> (repeat_kv) -> scaled_dot_product_attention   ->   tq_decode
                                 (repeat_kv) -> scaled_dot_product_attention   ->   attend, dense_attn
                    padding ->   (repeat_kv) -> scaled_dot_product_attention   ->   varlen_attn
                       mask ->   (repeat_kv) -> scaled_dot_product_attention   ->   the same, simpler

A call that no backend can run exactly stays as it was.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from ..attention.call import AttentionCall
from ..attention.select import BY_NAME, AttentionBackend, cannot_run, select
from ..report import CallRow, Report, row_of
from .beyond_sdpa import find_calls_beyond_sdpa
from .describe_call import Found, describe, has_four_dimensions, is_transformed
from .find_calls import SDPANode, find_calls, note_restrictions, value_of
from .graph_writer import GraphWriter
from .kv_source import OPS, PackedSource, calls_op, packed_source
from .mask_form import MaskForm, is_plain_causal, mask_form
from .operations import same_layout
from .ragged_padding import RaggedPadding
from .read_mask import MaskReader
from .repeated_heads import strip_repeated_heads
from .spell_as_sdpa import spell_as_sdpa
from .visibility import Visibility
from .writes import Writes


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
    note_restrictions(gm)
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for row in spell_as_sdpa(module.graph):
            if (name := requested[row.phase]) != "auto":
                raise cannot_run(name, row.phase, row.shapes, row.not_chosen["sdpa"])
            rows.append(row)
        rewriter = _Rewriter(module.graph)
        calls = itertools.chain(find_calls(module.graph), find_calls_beyond_sdpa(module.graph))
        found = [rewriter.rewrite(call, requested) for call in calls]
        if found:
            rows += found
            module.graph.lint()
            module.recompile()
    return Report(rows)


class _Rewriter:
    """Rewrites the calls of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._writes = Writes(graph)
        self._reader = MaskReader(self._writes)
        self._visibility = Visibility(graph, self._writes)
        self._ragged = RaggedPadding(self._visibility)

    def rewrite(self, sdpa: SDPANode, requested: dict[str, str]) -> CallRow:
        found = self._look_at(sdpa)
        call = describe(found, self._visibility, self._writes)
        choice = select(call, requested[call.phase])
        row = row_of(sdpa.node, call, choice)
        if choice.backend == "turboquant":
            self._read_packed(found)
        elif choice.backend == "triton":
            self._attend(found, choice.backend)
        elif call.padding and choice.backend in BY_NAME and BY_NAME[choice.backend].varlen:
            self._attend_ragged(found, choice.backend)
        elif choice.backend in BY_NAME and BY_NAME[choice.backend].attend:
            self._attend_dense(found, call, BY_NAME[choice.backend])
        elif choice.backend == "sdpa":
            row = row.with_rewritten(self._simplify(found) or sdpa.spelled_otherwise)
        return row

    def _look_at(self, sdpa: SDPANode) -> Found:
        key, value, source, form = sdpa.key, sdpa.value, None, None
        if has_four_dimensions(sdpa) and not is_transformed(sdpa):
            key, k_repeats = strip_repeated_heads(key, sdpa.node, self._writes)
            value, v_repeats = strip_repeated_heads(value, sdpa.node, self._writes)
            if k_repeats != v_repeats:
                key, value = sdpa.key, sdpa.value
            source = packed_source(key, value, sdpa, self._writes)
            form = mask_form(sdpa, self._reader)
        return Found(sdpa, key, value, source, form)

    def _visible(self, found: Found) -> tuple[fx.Node | None, fx.Node | None]:
        """(mask, bounds) for a kernel."""
        sdpa, form = found.sdpa, found.form
        if form is None or not self._visibility.can_build(sdpa, form):
            return sdpa.attn_mask, None
        return self._visibility.mask(sdpa, form), self._visibility.bounds(sdpa, form)

    def _attend(self, found: Found, backend: str) -> None:
        sdpa, form = found.sdpa, found.form
        mask, bounds = self._visible(found)
        if form is not None and self._visibility.packs(sdpa, form):
            mask = self._visibility.packed(sdpa)
        args = (sdpa.query, found.key, found.value, mask, bounds, sdpa.sinks, _scale_of(sdpa), backend)
        self._replace(sdpa, OPS.attend.default, args, **_softcap_of(sdpa))
        _erase_unused(sdpa.key, sdpa.value, until=(found.key, found.value))

    def _attend_dense(self, found: Found, call: AttentionCall, backend: AttentionBackend) -> None:
        sdpa = found.sdpa
        mask = None if call.plain else sdpa.attn_mask
        back, ahead = (-1 if side is None else side for side in call.window)
        how = (call.alignment, back, ahead, call.softcap, _scale_of(sdpa), backend.name)
        args = (sdpa.query, found.key, found.value, mask, None, sdpa.sinks, *how)
        self._replace(sdpa, OPS.dense_attn.default, args)
        _erase_unused(sdpa.key, sdpa.value, until=(found.key, found.value))

    def _attend_ragged(self, found: Found, backend: str) -> None:
        sdpa, form = found.sdpa, found.form
        assert form is not None
        write = GraphWriter(sdpa.node.graph, sdpa.node)
        with sdpa.node.graph.inserting_before(sdpa.node):
            result = self._ragged.attend(
                write, sdpa, found.key, found.value, form, _scale_of(sdpa), backend
            )
        self._replace_by(sdpa, result, write)
        _erase_unused(sdpa.key, sdpa.value, until=(found.key, found.value))

    def _read_packed(self, found: Found) -> None:
        """Replace the call by the op that reads the packed cache; erase what that leaves dead."""
        sdpa, source = found.sdpa, found.source
        assert source is not None
        mask, bounds = self._visible(found)
        if mask is None and bounds is None:  # everything: for the op that would mean the last tokens
            mask = sdpa.attn_mask
        cache_args = (source.seq_lens, source.k_rotation, source.v_rotation)
        tail = (mask, bounds, sdpa.sinks, source.kv_format, source.max_len, _scale_of(sdpa), *source.beside)
        chain = _chain(sdpa)
        inside = {sdpa.node, *chain}
        # Another reader of what was dequantized needs the store where it is.
        only_reader = all(set(node.users) <= inside for node in (source.dequantize, *chain))
        store = source.store if only_reader else None
        args: tuple[Any, ...]
        if store is not None:
            op, args = OPS.tq_append_attend.default, (source.cache, sdpa.query, *store.args[1:3])
            named: dict[str, Any] = {"own": True} if source.own else {}
        else:
            op, args, named = OPS.tq_decode.default, (sdpa.query, source.cache), source.own
        named = {**_softcap_of(sdpa), **_pages_of(source), **named}
        self._replace(sdpa, op, (*args, *cache_args, *tail), **named)
        graph = source.dequantize.graph
        for node in (*chain, source.dequantize):
            if not node.users:
                graph.erase_node(node)
        if store is not None:
            graph.erase_node(store)

    def _replace(self, sdpa: SDPANode, op: Any, args: tuple[Any, ...], **named: Any) -> None:
        """Put an op in the place of the call."""
        write = GraphWriter(sdpa.node.graph, sdpa.node)
        with sdpa.node.graph.inserting_before(sdpa.node):
            result = write.call(op, *args, **named)
        self._replace_by(sdpa, result, write)

    def _replace_by(self, sdpa: SDPANode, result: fx.Node, write: GraphWriter) -> None:
        """Put a result in the place of the call, in the layout that SDPA gives."""
        with sdpa.node.graph.inserting_before(sdpa.node):
            result = _in_layout_of(value_of(sdpa.node), result, write)
        sdpa.node.replace_all_uses_with(result)
        sdpa.node.graph.erase_node(sdpa.node)

    def _simplify(self, found: Found) -> bool:
        """Leave the call to SDPA, without a mask that is plain causal or hides nothing, and without
        repeated heads where its kernels take fewer; whether that changed it."""
        sdpa, form = found.sdpa, found.form
        q, out = value_of(sdpa.query), value_of(sdpa.node)
        known = isinstance(sdpa.is_causal, bool) and isinstance(sdpa.dropout_p, int | float)
        if form is None or not known or sdpa.dropout_p != 0 or sdpa.restricted:
            return False
        q_len, kv_len = q.shape[-2], value_of(found.key).shape[-2]
        mask, is_causal = sdpa.attn_mask, sdpa.is_causal
        if mask is not None and is_plain_causal(form, q_len, kv_len):
            mask, is_causal = None, True
        elif mask is not None and form == MaskForm():
            mask = None
        # On a GPU only the kernels for 16 bits without a mask take fewer KV heads.
        native = q.device.type == "cpu" or (mask is None and out.element_size() == 2)
        repeated_for_q = statically_known_true(value_of(sdpa.key).shape[1] == q.shape[1])
        strips = found.key is not sdpa.key and native and (sdpa.enable_gqa or repeated_for_q)
        if mask is sdpa.attn_mask and not strips:
            return False
        key, value = (found.key, found.value) if strips else (sdpa.key, sdpa.value)
        options = {"attn_mask": mask, "is_causal": is_causal, "scale": sdpa.scale}
        if strips or sdpa.enable_gqa:
            options["enable_gqa"] = True
        write = GraphWriter(sdpa.node.graph, sdpa.node)
        with sdpa.node.graph.inserting_before(sdpa.node):
            result = write.call(F.scaled_dot_product_attention, sdpa.query, key, value, **options)
            result = _in_layout_of(out, result, write)
        sdpa.node.replace_all_uses_with(result)
        sdpa.node.graph.erase_node(sdpa.node)
        if strips:
            _erase_unused(sdpa.key, sdpa.value, until=(key, value))
        return True


def _in_layout_of(expected: torch.Tensor, result: fx.Node, write: GraphWriter) -> fx.Node:
    """`result` in the layout that SDPA gave: Dynamo may have traced `view`s of it."""
    if same_layout(value_of(result), expected):
        return result
    if expected.is_contiguous():
        return write.call("contiguous", result)
    if expected.transpose(1, 2).is_contiguous():
        for method, dims in (("transpose", (1, 2)), ("contiguous", ()), ("transpose", (1, 2))):
            result = write.call(method, result, *dims)
    return result


def _scale_of(sdpa: SDPANode) -> float | fx.Node:
    """The scale: a number, or what gives it where the head dimension is not known at compile time."""
    if sdpa.scale is not None:
        return float(sdpa.scale)
    graph = sdpa.node.graph
    with graph.inserting_before(sdpa.node):
        write = GraphWriter(graph, sdpa.node)
        size = write.size(sdpa.query, 3)
        return size**-0.5 if isinstance(size, int) else write.call(operator.pow, size, -0.5)


def _softcap_of(sdpa: SDPANode) -> dict[str, float]:
    return {} if sdpa.softcap is None else {"softcap": sdpa.softcap}


def _pages_of(source: PackedSource) -> dict[str, fx.Node]:
    return {} if source.block_table is None else {"block_table": source.block_table}


def _erase_unused(*nodes: fx.Node, until: tuple[fx.Node, ...]) -> None:
    """Erase chains of first arguments that nobody uses any more, down to the nodes `until`."""
    for node in dict.fromkeys(nodes):  # keys may be the values
        while node not in until and not node.users:
            below = node.all_input_nodes[0]
            node.graph.erase_node(node)
            node = below


def _chain(sdpa: SDPANode) -> list[fx.Node]:
    """The nodes from the attention call up to `tq_dequantize` (both exclusive), users first."""
    nodes: list[fx.Node] = []
    for node in (sdpa.key, sdpa.value):
        while not calls_op(node, OPS.tq_dequantize):
            nodes.append(node)
            node = node.all_input_nodes[0]
    return nodes
