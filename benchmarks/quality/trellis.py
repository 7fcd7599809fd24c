"""Trellis-coded quantisation, simulated: what a coordinate can be depends on the bits before its own.

The bit-shift trellis of QTIP (arXiv 2406.11235): coordinate i is a value of a table of 2**STATE_BITS,
looked up by the STATE_BITS bits of the code that end with its own. So each coordinate decodes alone, and
the best path is found by dynamic programming (Viterbi). The bits before the first coordinate are those of
the last ones: a vector takes no more than its codes.
"""

from __future__ import annotations

from functools import cache

import torch

STATE_BITS = {2: 8, 3: 9}  # 256 and 512 values, 64 paths into each coordinate
SAMPLES, LENGTH, ROUNDS = 4096, 128, 25  # of normal numbers that a table is fitted to
SLICE = 4096  # vectors coded at a time: bounds the memory of the search


def trellis(y: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of the table for normal numbers y `[n, D]`."""
    table = table_of(bits)
    return torch.cat([table[closed_path(part, table, bits)] for part in y.split(SLICE)])


@cache
def table_of(bits: int) -> torch.Tensor:
    """Values `[2**STATE_BITS]` fitted to a normal distribution, always the same."""
    generator = torch.Generator().manual_seed(0)
    states = 1 << STATE_BITS[bits]
    quantiles = torch.special.ndtri((torch.arange(states) + 0.5) / states)
    table = quantiles[torch.randperm(states, generator=generator)]
    y = torch.randn(SAMPLES, LENGTH, generator=generator)
    for _ in range(ROUNDS):
        path = _path(y, table, bits).flatten()
        counts = torch.bincount(path, minlength=states).clamp(min=1)
        table = torch.zeros(states).index_add_(0, path, y.flatten()) / counts
    return table


def closed_path(y: torch.Tensor, table: torch.Tensor, bits: int) -> torch.Tensor:
    """The best states `[n, D]` that begin with the bits that they end with, nearly.

    Which bits these are is found by a path that begins in the middle.
    """
    middle = y.shape[1] // 2
    before = _path(y.roll(middle, 1), table, bits)[:, middle - 1]
    return _path(y, table, bits, before % (len(table) >> bits))


def _path(
    y: torch.Tensor, table: torch.Tensor, bits: int, shared: torch.Tensor | None = None
) -> torch.Tensor:
    """The states `[n, D]` with the least squared error; `shared` `[n]`: bits that are at both ends."""
    states, choices = len(table), 1 << bits
    groups = states // choices  # states that share all bits but those of the coordinate before the first
    state = torch.arange(states)
    cost = (y[:, :1] - table).square()
    if shared is not None:
        cost = cost.masked_fill(state // choices != shared[:, None], torch.inf)
    chosen = []
    for i in range(1, y.shape[1]):
        best, choice = cost.view(-1, choices, groups).min(1)
        chosen.append(choice.to(torch.uint8))
        cost = best.repeat_interleave(choices, 1) + (y[:, i : i + 1] - table).square()
    if shared is not None:
        cost = cost.masked_fill(state % groups != shared[:, None], torch.inf)
    last = cost.argmin(1)
    path = [last]
    for choice in reversed(chosen):
        group = path[-1] // choices
        path.append(group + choice.gather(1, group[:, None])[:, 0].long() * groups)
    return torch.stack(path[::-1], 1)
