"""Needles: can the demo model still copy a random string that it read long ago?

A text holds lines such as `kqzvbw = "07c2f1d4e8a93b65"` among held-out source, and ends with these lines
again. Counted are the bytes of the repeated strings that the model finds most probable, given what came
before: every byte is a look-up of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from tq_inductor.corpus import held_out_text

from .metrics import bootstrap_interval
from .model import BATCH, WINDOW, Reader, log_probabilities
from .schemes import Scheme

DISTANCES = (1300, 900, 500, 200)  # bytes from a line to its repetition
NAME, STRING = 6, 16  # their lengths


@dataclass(frozen=True)
class Needles:
    """Texts `[n, WINDOW + 1]` of bytes, and where in them each distance's string is repeated."""

    ids: torch.Tensor
    spans: dict[int, slice]


def hide(text: bytes, generator: random.Random) -> tuple[bytes, dict[int, slice]]:
    """A text of WINDOW + 1 bytes with a needle for each distance, and where the strings are repeated."""
    names, strings = (
        ["".join(generator.choices(letters, k=count)) for _ in DISTANCES]
        for letters, count in (("abcdefghijklmnopqrstuvwxyz", NAME), ("0123456789abcdef", STRING))
    )
    lines = [f'\n{name} = "{string}"'.encode() for name, string in zip(names, strings, strict=True)]
    end = WINDOW + 1 - sum(map(len, lines))
    whole = bytearray(text[:end] + b"".join(lines))
    spans = {}
    for distance, line in zip(DISTANCES, lines, strict=True):
        whole[end - distance : end - distance + len(line) + 1] = line + b"\n"
        end += len(line)
        spans[distance] = slice(end - 1 - STRING, end - 1)
    return bytes(whole), spans


def needles() -> Needles:
    """A text from the beginning of each held-out module, always the same."""
    generator = random.Random(0)
    rows = []
    for text in held_out_text().values():
        row, spans = hide(text, generator)
        rows.append(list(row))
    return Needles(torch.tensor(rows), spans)


def found(model: PreTrainedModel, hidden: Needles, reader: Reader | None) -> dict[int, torch.Tensor]:
    """Share of each string's bytes that are the most probable ones, `[n]` for each distance."""
    guesses = torch.cat(
        [
            log_probabilities(model, batch, quality_reader=reader).argmax(-1)
            for batch in hidden.ids[:, :-1].split(BATCH)
        ]
    )
    right = (guesses == hidden.ids[:, 1:]).double()
    # The guess of a byte stands one before it.
    return {d: right[:, span.start - 1 : span.stop - 1].mean(-1) for d, span in hidden.spans.items()}


def recall(model: PreTrainedModel, schemes: Iterable[Scheme]) -> dict[str, dict[str, Any]]:
    """Recall in per cent at each distance and over all, with the difference to exact and its interval."""
    hidden, rows = needles(), {}
    exact = found(model, hidden, None)
    for scheme in chain([None], schemes):  # one by one: there is a progress bar around them
        outcome = found(model, hidden, Reader(scheme, model, [])) if scheme else exact
        change = 100 * torch.stack([outcome[d] - exact[d] for d in DISTANCES]).mean(0)
        rows[scheme.name if scheme else "exact"] = {
            "percent": {str(d): round(100 * outcome[d].mean().item(), 1) for d in reversed(DISTANCES)},
            "difference": round(change.mean().item(), 2),
            "interval": [round(end, 2) for end in bootstrap_interval(change)],
        }
    return rows
