"""`tq-inductor calibrate`: a format for each layer of a model, by what packing it costs on your own text.

Each layer in turn is packed in each format, all others exact, and the model reads the text. How far its
predictions move, as Kullback-Leibler divergence, is the price of that format in that layer. Small prices
add up, so the formats with the least sum at a given number of bytes are found exactly. What they cost
together is measured at the end, beside one format for all layers at as many bytes, which stays if it is
better.

To the divergence on the text is added that on look-ups (`look_ups.py`), where an exact cache finds them: a
layer that finds what was read long ago costs little on most text, and everything where it is needed.

A window of the text is half a prompt; the other half is read a few tokens at a time from a cache with the
exact tokens of its formats, as in generation, and is what counts. Formats that only the latest tokens would
need are not worth their bytes: those tokens are exact anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .cache import TurboQuantCache
from .cache_layers import TurboQuantLayer
from .errors import UsageError
from .format import KVFormat
from .generate_text import DEMO_MODEL, load_checkpoint
from .layer_formats import exact_tokens
from .look_ups import LEAST_FOUND, found, with_look_ups

FORMATS = ("k8v8", "k8v4", "k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k2v2")
WINDOW = 1024  # tokens of a text that are read from an empty cache
CHUNK = 64  # tokens that are read at once, after the prompt

Prices = dict[int, dict[str, float]]  # layer -> format -> nats a token
Sizes = dict[int, dict[str, int]]  # layer -> format -> bytes a token


@torch.no_grad()
def bytes_per_token(model: PreTrainedModel, formats: Sequence[str]) -> tuple[Sizes, int]:
    """Bytes of a token in each format, for each layer that a `TurboQuantCache` packs; and all their values.

    Raises:
        FormatError: a format that the model's keys cannot have.
        UsageError: no layer is packed.
    """
    cache = TurboQuantCache(model.config, 16, kv_format="k8v8")
    packed = [i for i, layer in enumerate(cache.layers) if isinstance(layer, TurboQuantLayer)]
    if not packed:
        raise UsageError(
            f"a TurboQuantCache packs no layer of {model.config.model_type}: nothing to choose"
        )
    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache)
    sizes, values = {}, 0
    for i in packed:
        fmt, heads = cache.layers[i].format, cache.layers[i].packed.shape[1]
        same = {name: KVFormat(name, fmt.head_dim, fmt.v_head_dim) for name in formats}
        sizes[i] = {name: x.slot_bytes * heads for name, x in same.items()}
        values += (fmt.head_dim + fmt.v_head_dim) * heads
    return sizes, values


def allowance(budget: str | float, sizes: Sizes, values: int, formats: Sequence[str]) -> tuple[str, int]:
    """The largest of `formats` that all layers could have, and how many bytes of a token the budget allows.

    Raises:
        UsageError: not even the smallest of them fits.
    """
    total = {name: sum(of[name] for of in sizes.values()) for name in next(iter(sizes.values()))}
    allowed = total[budget] if isinstance(budget, str) else int(budget * values / 8)
    fitting = [name for name in formats if total[name] <= allowed]
    if not fitting:
        smallest = min(formats, key=lambda name: total[name])
        bits = f"{budget:g}" if not isinstance(budget, str) else f"{budget}'s {8 * allowed / values:g}"
        raise UsageError(
            f"{bits} bits a value are fewer than the smallest format to choose from takes: {smallest} has "
            f"{8 * total[smallest] / values:g}, scales included. Give a larger budget, or smaller formats."
        )
    return budget if budget in fitting else max(fitting, key=lambda name: total[name]), allowed


def least_tokens(formats: Sequence[str]) -> tuple[int, str]:
    """How long a window must be to price these formats, and which of them needs it.

    Half of it must be more than the format keeps exact, or nothing packed would be read.
    """
    return max((2 * (sum(exact_tokens(name, None, None)) + 1), name) for name in formats)


def divergence(exact: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """KL of predictions from exact ones in nats `[n]`, of logits `[1, n, vocabulary]`."""
    nats = []
    for p, q in zip(exact[0].split(128), moved[0].split(128), strict=True):  # bounds the memory
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        nats.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(nats)


def cheapest(prices: Prices, sizes: Sizes, budget: int) -> dict[int, str]:
    """The format of each layer for which the prices add up to least and the sizes to `budget` at most.

    Exact, by dynamic programming over bytes. Of equal prices the one with more bytes is taken.

    Args:
        prices: of each format in each layer, in nats.
        sizes: of the same, in bytes.

    Raises:
        UsageError: not even the smallest formats fit.
    """
    unit = math.gcd(*(size for of_layer in sizes.values() for size in of_layer.values()))
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}  # by bytes of the layers so far
    for layer, of_layer in prices.items():
        longer: dict[int, tuple[float, tuple[str, ...]]] = {}
        for taken, (price, names) in best.items():
            for name, added in of_layer.items():
                total = taken + sizes[layer][name] // unit
                if total <= budget // unit and price + added < longer.get(total, (math.inf,))[0]:
                    longer[total] = (price + added, (*names, name))
        best = longer
    if not best:
        smallest = sum(min(of_layer.values()) for of_layer in sizes.values())
        raise UsageError(f"{budget} bytes a token are fewer than the smallest formats take, {smallest}")
    names = min(best.items(), key=lambda item: (item[1][0], -item[0]))[1][1]
    return dict(zip(prices, names, strict=True))


@dataclass(frozen=True)
class Moved:
    """How far predictions move, in nats: a token after a prompt, and a token that is looked up in it.

    `asked` tokens were to look up; `found` of them an exact cache finds, and they alone count.
    """

    text: float
    look_ups: float
    found: int
    asked: int

    @property
    def price(self) -> float:
        """Both together; of a model that does not look up, the text's."""
        return self.text + (self.look_ups if self.found >= LEAST_FOUND * max(1, self.asked) else 0.0)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    choices: Sequence[dict[int, str]],
    measured: Callable[[], object] = lambda: None,
) -> list[Moved]:
    """How far predictions move with each choice of formats.

    Args:
        ids: `[1, n]`, two tokens at least, read in windows of `WINDOW` tokens, each from an empty cache, as
            they are and with look-ups, always the same.
        choices: the formats of the layers that are packed; the others are exact.
        measured: called after each choice of each window.
    """
    generator = torch.Generator().manual_seed(0)
    layers = len(TurboQuantCache(model.config, 16).layers)
    text, look_ups = [0.0] * len(choices), [0.0] * len(choices)
    counted_text = asked_count = found_count = 0
    for window in windows_of(ids):
        hidden, asked = with_look_ups(window, generator)
        exact, exact_hidden = (_logits(model, layers, x, {}) for x in (window, hidden))
        half = exact.shape[1]
        counted = found(exact_hidden, hidden[:, -half:], asked[-half:])
        counted_text += half
        asked_count, found_count = asked_count + int(asked.sum()), found_count + int(counted.sum())
        for i, formats in enumerate(choices):
            text[i] += divergence(exact, _logits(model, layers, window, formats)).sum().item()
            if counted.any():
                moved = divergence(exact_hidden, _logits(model, layers, hidden, formats))
                look_ups[i] += moved[counted].sum().item()
            measured()
    return [
        Moved(t / counted_text, k / max(1, found_count), found_count, asked_count)
        for t, k in zip(text, look_ups, strict=True)
    ]


def windows_of(ids: torch.Tensor) -> list[torch.Tensor]:
    """`ids` `[1, n]` in windows of `WINDOW` tokens, without a last one that is too short to be halved."""
    return [window for window in ids.split(WINDOW, 1) if window.shape[1] > 1]


def _logits(
    model: PreTrainedModel, layers: int, window: torch.Tensor, formats: dict[int, str]
) -> torch.Tensor:
    """Logits `[1, n, vocabulary]` of the second half of a window, read after the first."""
    cache = TurboQuantCache(
        model.config,
        window.shape[1],
        kv_format=[formats.get(i, "k4v4") for i in range(layers)],
        skip_layers=[i for i in range(layers) if i not in formats],
    )
    prompt = window.shape[1] // 2
    model(window[:, :prompt], past_key_values=cache, logits_to_keep=1)
    chunks = window[:, prompt:].split(CHUNK, 1)
    return torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], 1)


def calibrate(
    text: str,
    model: str | Path | None = None,
    *,
    budget: str | float = "k4v4",
    formats: Sequence[str] = FORMATS,
    tokens: int = 2048,
    device: str | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measure every format in every layer on `text`, choose, and print what it costs; returns the policy.

    Its `kv_format`, a name for each layer, is what `TurboQuantCache` takes. Nats are means over tokens.

    Args:
        text: of the kind that the model will read; its first `tokens` tokens are used.
        model: folder or name of a checkpoint; None for the model that ships with this package.
        budget: a format, or bits a value; the layers together take no more bytes than if all had it, or if
            each value took so many bits, scales included (k4v4 has 4.25 with 64 dimensions, 4.125 at 128).
        formats: to choose from; a budget's is not one of them unless it is named here too.
        device, dtype: as torch names them; default: CUDA if there is one, and the checkpoint's dtype.

    Raises:
        UsageError: no such model, a text too short to price the formats, or nothing to choose.
        FormatError: a format that the model's keys cannot have.
    """
    transformers_logging.disable_progress_bar()
    tokenizer, network = load_checkpoint(model or DEMO_MODEL, dtype)
    network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens].to(network.device)
    formats = tuple(dict.fromkeys(formats))
    (least, needs_it), count = least_tokens(formats), ids.shape[1]
    if count < least:
        raise UsageError(
            f"{count} tokens of the text are read, and {needs_it} needs at least {least}: half of them "
            f"must be more than the {least // 2 - 1} that it keeps exact. Give a text like those that the "
            "model will read and tokens enough, or formats of more bits."
        )
    if count % WINDOW < least:  # the last window would price nothing
        ids = ids[:, : count // WINDOW * WINDOW]
    sizes, values = bytes_per_token(network, (*formats, budget) if isinstance(budget, str) else formats)
    everywhere, allowed = allowance(budget, sizes, values, formats)
    alone = [(i, name) for i in sizes for name in formats]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        windows = len(windows_of(ids))
        task = progress.add_task("layers and formats", total=windows * (len(alone) + 2))
        measured = partial(progress.advance, task)
        moved = measure(network, ids, [{i: name} for i, name in alone], measured)
        by_layer: dict[int, dict[str, Moved]] = {i: {} for i in sizes}
        for (i, name), of_format in zip(alone, moved, strict=True):
            by_layer[i][name] = of_format
        prices: Prices = {i: {name: m.price for name, m in of.items()} for i, of in by_layer.items()}
        chosen, same = cheapest(prices, sizes, allowed), dict.fromkeys(sizes, everywhere)
        moved_everywhere, moved_chosen = measure(network, ids, [same, chosen], measured)
    if moved_everywhere.price <= moved_chosen.price:
        chosen, moved_chosen = same, moved_everywhere
    layers = len(TurboQuantCache(network.config, 16).layers)
    policy = {
        "kv_format": [chosen.get(i, "bf16") for i in range(layers)],
        "bytes_per_token": sum(sizes[i][name] for i, name in chosen.items()),
        "kl_nats": moved_chosen.text,
        "kl_nats_of_look_ups": moved_chosen.look_ups,
        "look_ups": {"asked": moved_chosen.asked, "found": moved_chosen.found},
        "budget": {
            "allowed_bytes_per_token": allowed,
            "kv_format": everywhere,
            "bytes_per_token": sum(of_layer[everywhere] for of_layer in sizes.values()),
            "kl_nats": moved_everywhere.text,
            "kl_nats_of_look_ups": moved_everywhere.look_ups,
        },
        "model": str(model or DEMO_MODEL.name),
        "tokens": ids.shape[1],
        "kl_nats_of_one_layer": {
            str(i): {name: m.text for name, m in of.items()} for i, of in by_layer.items()
        },
        "kl_nats_of_look_ups_in_one_layer": {
            str(i): {name: m.look_ups for name, m in of.items()} for i, of in by_layer.items()
        },
    }
    console.print(describe(policy), highlight=False)
    return policy


def describe(policy: dict[str, Any]) -> Table:
    """The choice of each layer, its price alone, and what all cost together, as a table."""
    budget = policy["budget"]
    table = Table("layer", "format", "KL of it alone, nats a token", "on look-ups")
    for i, of_layer in policy["kl_nats_of_one_layer"].items():
        name = policy["kv_format"][int(i)]
        found_again = policy["kl_nats_of_look_ups_in_one_layer"][i][name]
        table.add_row(i, name, f"{of_layer[name]:.2g}", f"{found_again:.2g}")
    sums = [f"{x['kl_nats']:.2g} + {x['kl_nats_of_look_ups']:.2g}" for x in (policy, budget)]
    look_ups = policy["look_ups"]
    table.caption = (
        f"together {sums[0]} nats at {policy['bytes_per_token']:,} bytes a token; "
        f"{budget['kv_format']} everywhere {sums[1]} at {budget['bytes_per_token']:,}; "
        f"an exact cache finds {look_ups['found']:,} of {look_ups['asked']:,} look-ups"
    )
    return table
