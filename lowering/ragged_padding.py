"""Attention over padded rows as attention over ragged sequences, which no kernel pads.

    full:    each query over the keys that its row shows, which are moved together
    causal:  queries whose own key is shown, and the keys, are moved together; what the others see, such as
             the tokens before the padding of a row padded on the right, our kernel reads where it lies:
             nothing where rows are padded on the left

The number of tokens stays `B * L`: which of them belong to a row is counted on the device (`cu_seqlens`),
once for all layers. Exact for any mask over keys, with holes too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .find_calls import SDPANode, static_size, value_of
from .graph_writer import GraphWriter
from .kv_source import OPS
from .mask_form import MaskForm, is_plain_causal
from .visibility import Visibility


def padding_beside(form: MaskForm, q: torch.Tensor, k: torch.Tensor) -> str:
    """`AttentionCall.padding` of a mask; sizes have to be known."""
    q_len, kv_len = static_size(q, -2), static_size(k, -2)
    if form.keys is None or not form.exact or None in (static_size(q, -4), q_len, kv_len):
        return ""
    rest = replace(form, keys=None)
    if rest == MaskForm():
        return "full"
    return "causal" if is_plain_causal(rest, q_len, kv_len) else ""


@dataclass(frozen=True)
class Tokens:
    """The tokens of all rows, `n = B * L` of them, one row behind the other.

    Attributes:
        shown: bool `[n]`, whether a token is seen as a key.
        order: int64 `[n]`: the tokens that are, then the others.
        place: int64 `[n]`: where each token is in `order`.
        starts: int32 `[B + 1]`: where the tokens of each row begin in `order`.
    """

    shown: fx.Node
    order: fx.Node
    place: fx.Node
    starts: fx.Node


class RaggedPadding:
    """Writes padded calls of one graph as ragged ones; what depends on the mask alone only once."""

    def __init__(self, visibility: Visibility) -> None:
        self._visibility = visibility
        self._tokens: dict[tuple[Any, ...], Tokens] = {}
        self._rests: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def attend(
        self, write: GraphWriter, sdpa: SDPANode, key: fx.Node, value: fx.Node, form: MaskForm,
        scale: float | fx.Node, backend: str,
    ) -> fx.Node:  # fmt: skip
        """The attention `[B, H, Lq, Dv]`, by an attention backend's ragged kernel."""
        batch, _, q_len, _ = value_of(sdpa.query).shape
        kv_len = value_of(key).shape[2]
        causal = form.upper is not None
        tokens = self._tokens_of(sdpa, form, batch, kv_len)

        def flat(x: fx.Node, order: fx.Node | None) -> fx.Node:
            x = write.call("flatten", write.call("transpose", x, 1, 2), 0, 1)
            return write.call("contiguous", x) if order is None else write.call("index_select", x, 0, order)

        keys, values = flat(key, tokens.order), flat(value, tokens.order)
        if causal:
            queries, starts = flat(sdpa.query, tokens.order), tokens.starts
        else:
            options = {"dtype": torch.int32, "device": write.device}
            queries = flat(sdpa.query, None)
            starts = write.call(torch.arange, 0, batch * q_len + 1, q_len, **options)
        out = write.call(
            OPS.varlen_attn.default, queries, keys, values, starts, tokens.starts, q_len, kv_len, causal,
            scale, backend,
        )  # fmt: skip
        if causal:
            out = write.call("index_select", out, 0, tokens.place)
        out = write.call("transpose", write.call("unflatten", out, 0, (batch, q_len)), 1, 2)
        if not causal:
            return out
        mask, rest = self._visibility.mask(sdpa, form), self._rest_of(sdpa, form, tokens)
        others = write.call(OPS.attend.default, sdpa.query, key, value, mask, rest, None, scale, "triton")
        shown = write.call("view", tokens.shown, batch, 1, q_len, 1)
        return write.call(torch.where, shown, out, others)

    def _tokens_of(self, sdpa: SDPANode, form: MaskForm, batch: int, kv_len: int) -> Tokens:
        keys = self._visibility.mask(sdpa, form)
        assert keys is not None, "padding_beside() was not asked"
        built = (keys, batch, kv_len)
        if built not in self._tokens:
            with self._visibility.behind_mask(sdpa) as write:
                shown = write.call("flatten", write.call("expand", keys, batch, 1, 1, kv_len))
                token = write.call(torch.arange, batch * kv_len, device=write.device)
                count = write.call("cumsum", shown, 0)  # up to each token, itself included
                total = write.call("narrow", count, 0, batch * kv_len - 1, 1)
                behind = write.call("sub", write.call("add", token, total), count)
                place = write.call(torch.where, shown, write.call("sub", count, 1), behind)
                ends = write.call("select", write.call("view", count, batch, kv_len), 1, -1)
                starts = write.call("to", write.call(F.pad, ends, (1, 0)), torch.int32)
                order = write.call(torch.scatter, token, 0, place, token)
            self._tokens[built] = Tokens(shown, order, place, starts)
        return self._tokens[built]

    def _rest_of(self, sdpa: SDPANode, form: MaskForm, tokens: Tokens) -> fx.Node:
        """Bounds int32 `[B, Lq, 2 or 4]` for the queries that are left out of the ragged sequences."""
        bounds = self._visibility.bounds(sdpa, form)
        assert bounds is not None, "a causal mask has bounds"
        if (bounds, tokens.shown) not in self._rests:
            batch, _, q_len, _ = value_of(sdpa.query).shape
            with self._visibility.behind_mask(sdpa) as write:
                shown = write.call("view", tokens.shown, batch, q_len, 1)
                columns = value_of(bounds).shape[-1]
                rest = write.call("expand", bounds, batch, q_len, columns)
                rest = write.call("masked_fill", rest, shown, 0)
            self._rests[bounds, tokens.shown] = rest
        return self._rests[bounds, tokens.shown]
