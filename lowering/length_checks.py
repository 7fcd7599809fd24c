"""Find the appends of a graph, so that a full cache is refused before the compiled graph starts.

Inside it the length is known only to the device, and reading it would be a host sync at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..format import KVFormat
from ..storage import check_room, note_length
from .find_calls import value_of
from .kv_source import OPS, calls_op


def check_lengths(graph: fx.Graph) -> Callable[[tuple[Any, ...]], Callable[[], None]] | None:
    """A function of the graph's inputs that raises `CacheFullError` if an append would not fit.

    It returns another one, to be called after the graph has run, that records the new lengths. None if
    the graph appends to no cache that is an input.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    rooms: dict[int, tuple[Any, int]] = {}  # input of the length -> (new tokens, tokens that fit)
    for node in graph.nodes:
        if not (calls_op(node, OPS.tq_store) or calls_op(node, OPS.tq_append_attend)):
            continue
        first = 1 if calls_op(node, OPS.tq_store) else 2
        cache, new_k, seq_lens = node.args[0], node.args[first], node.args[first + 2]
        if seq_lens not in placeholders or value_of(seq_lens).dim() != 0:
            continue
        room = _capacity(graph, node, cache, first)
        rooms[placeholders.index(seq_lens)] = (value_of(new_k).shape[2], room)
    if not rooms:
        return None
    symbols = {}
    for i, node in enumerate(placeholders):
        if isinstance(value_of(node), torch.SymInt):
            symbols[value_of(node).node.expr] = i

    def new_tokens(count: Any, args: tuple[Any, ...]) -> int:
        if isinstance(count, int):
            return count
        expr = count.node.expr
        return int(expr.xreplace({s: args[i] for s, i in symbols.items() if s in expr.free_symbols}))

    def check(args: tuple[Any, ...]) -> Callable[[], None]:
        after = {i: check_room(args[i], new_tokens(n, args), room) for i, (n, room) in rooms.items()}

        def note() -> None:
            for i, length in after.items():
                if length is not None:
                    note_length(args[i], length)

        return note

    return check


def _capacity(graph: fx.Graph, append: fx.Node, cache: fx.Node, first: int) -> int:
    """Tokens that fit: the smallest `max_len` with which the graph reads this cache, else its pages."""
    k_rotation, v_rotation, kv_format = (
        append.args[first + 3], append.args[first + 4],
        append.args[first + 5 if first == 1 else first + 6],
    )  # fmt: skip
    fmt = KVFormat(str(kv_format), value_of(k_rotation).shape[0], value_of(v_rotation).shape[0])
    limits = [fmt.page_size(value_of(cache).shape[-1])]
    for node in graph.nodes:
        if calls_op(node, OPS.tq_dequantize) and node.args[0] is cache:
            limits.append(node.args[5])
        elif calls_op(node, OPS.tq_append_attend) and node.args[0] is cache:
            limits.append(node.args[9])
    return min(limits)
