"""Find the appends of a graph, so that a full cache is refused before the compiled graph starts.

Inside it the length is known only to the device, and reading it would be a host sync at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..format import KVFormat
from ..storage import check_room, forget_length, note_length
from .find_calls import value_of
from .kv_source import packed_arguments
from .writes import Writes


@dataclass
class _Append:
    """What the graph appends to the cache whose length is one of its inputs; sizes may be symbolic."""

    new_tokens: list[Any]
    limits: list[Any]  # tokens that fit: all of these


def check_lengths(graph: fx.Graph) -> Callable[[tuple[Any, ...]], Callable[[], None]] | None:
    """A function of the graph's inputs that raises `CacheFullError` if an append would not fit.

    It returns another one, to be called after the graph has run, that records the new lengths. None if
    the graph appends to no cache that is an input.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    appends: dict[int, _Append] = {}  # by the input that holds the length
    for node in graph.nodes:
        named = packed_arguments(node)
        seq_lens = named.get("seq_lens")
        if seq_lens not in inputs or value_of(seq_lens).dim() != 0:
            continue
        index = inputs.index(seq_lens)
        append = appends.setdefault(index, _Append([], [_room(named)]))
        if "k" in named:
            append.new_tokens.append(value_of(named["k"]).shape[2])
        if "max_len" in named:
            append.limits.append(value_of(named["max_len"]))
    # A length that something else changes too is not known here; the next look reads the device.
    writes = Writes(graph)
    unknown = [i for i, append in appends.items() if not _only_appended(inputs[i], append, writes)]
    appends = {i: append for i, append in appends.items() if append.new_tokens and i not in unknown}
    if not appends and not unknown:
        return None
    symbols = {
        value_of(node).node.expr: i
        for i, node in enumerate(inputs)
        if isinstance(value_of(node), torch.SymInt)
    }

    def size(value: Any, args: tuple[Any, ...]) -> int:
        if isinstance(value, int):
            return value
        expr = value.node.expr
        return int(expr.xreplace({symbol: args[symbols[symbol]] for symbol in expr.free_symbols}))

    def sizes(append: _Append, args: tuple[Any, ...]) -> tuple[int, int]:
        """New tokens, and how many fit."""
        counts, limits = (
            [size(value, args) for value in values] for values in (append.new_tokens, append.limits)
        )
        return sum(counts), min(limits)

    # A decode step waits for this once for each layer, and its sizes are numbers.
    known = {
        i: sizes(append, ())
        for i, append in appends.items()
        if all(isinstance(value, int) for value in append.new_tokens + append.limits)
    }

    def check(args: tuple[Any, ...]) -> Callable[[], None]:
        lengths = {}
        for i, append in appends.items():
            lengths[i] = check_room(args[i], *(known[i] if i in known else sizes(append, args)))

        def note() -> None:
            for i, length in lengths.items():
                if length is not None:
                    note_length(args[i], length)
            for i in unknown:
                forget_length(args[i])

        return note

    return check


def _only_appended(seq_length: fx.Node, append: _Append, writes: Writes) -> bool:
    """Whether all that the graph does to a length is to add to it, once for each append."""
    last = next(iter(reversed(seq_length.graph.nodes)))
    writers = writes.between(seq_length, last, seq_length)
    adds = [node for node in writers if node.op == "call_method" and node.target == "add_"]
    return len(writers) == len(adds) == len(append.new_tokens)


def _room(named: dict[str, Any]) -> Any:
    """Tokens that a row of the cache of these arguments has room for."""
    dims = (value_of(named[name]).shape[0] for name in ("k_rotation", "v_rotation"))
    page_size = KVFormat(named["kv_format"], *dims).page_size(value_of(named["cache"]).shape[-1])
    table = value_of(named.get("block_table"))
    return page_size if table is None else page_size * table.shape[1]
