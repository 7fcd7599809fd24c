"""`tq-inductor plot`: figures from the result file of `tq-inductor bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from .errors import UsageError

Row = dict[str, Any]
# The same file for the same figures, and its text as text.
SVG = {"svg.hashsalt": "tq_inductor", "svg.fonttype": "none"}
LABELS = {
    "dynamic": "transformers: DynamicCache, eager",
    "quantized": "transformers: QuantizedCache, eager",
    "static-inductor": "transformers: StaticCache, Inductor",
    "static": "tq_inductor: StaticCache",
}
# File name: x axis, what each panel is of, y axis with its label and value.
PLOTS: dict[str, tuple[str, str, str, Callable[[Row], float]]] = {
    "speed": ("context", "batch", "ms per step", lambda row: row["step_ms"]),
    "memory": ("context", "batch", "peak memory, GiB", lambda row: row["peak_bytes"] / 2**30),
    "throughput": ("batch", "context", "tokens/s", lambda row: row["tokens_per_s"]),
}


def draw_plots(result: Path, folder: Path, suffix: str = "svg") -> list[Path]:
    """Draw speed and memory over context and tokens/s over batch; returns the files.

    A row of panels for each model, a panel for each batch (or context) of which there are two points of
    some cache; a point that ran out of memory is where its line ends.

    Args:
        result: a file that `run_bench` wrote.
        folder: where `speed`, `memory` and `throughput` go; made if missing.
        suffix: "svg" or "png".

    Raises:
        UsageError: nothing in `result` can be drawn.
    """
    try:
        found = json.loads(result.read_text())
        rows = [row for row in found["points"] if "step_ms" in row]
        environment = found["environment"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{result} is no result: write one with tq-inductor bench ({error})") from error
    where = environment.get("gpu") or f"CPU, {environment.get('cpu_threads')} threads"
    paths = []
    for name, (x, panel, label, value) in PLOTS.items():
        panels = _panels(rows, x, panel)
        if not panels:
            continue
        figure = _figure(panels, x, panel, label, value)
        figure.suptitle(
            f"{where}, torch {environment['torch']}, transformers {environment['transformers']}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}.{suffix}")
        with rc_context(SVG):
            figure.savefig(paths[-1], metadata={"Date": None} if suffix == "svg" else None)
    if not paths:
        raise UsageError(
            f"{result} has no two points of one model and cache that differ in context or batch only; "
            f"it has {len(rows)} measured points. Measure more with: tq-inductor bench --out {result}"
        )
    return paths


def _panels(rows: list[Row], x: str, panel: str) -> dict[tuple[str, int], dict[str, list[Row]]]:
    """(model, value of `panel`) -> cache -> its rows by `x`; only where there is a line to draw."""
    panels: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row[panel], row[x])):
        panels.setdefault((row["model"], row[panel]), {}).setdefault(row["cache"], []).append(row)
    return {key: lines for key, lines in panels.items() if max(map(len, lines.values())) > 1}


def _figure(
    panels: dict[tuple[str, int], dict[str, list[Row]]],
    x: str,
    panel: str,
    label: str,
    value: Callable[[Row], float],
) -> Figure:
    models = list(dict.fromkeys(model for model, _ in panels))
    columns = max(sum(model == name for name, _ in panels) for model in models)
    figure = Figure(figsize=(4.5 * columns + 2.5, 3.2 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), columns, squeeze=False)
    caches = list(dict.fromkeys(cache for lines in panels.values() for cache in lines))
    for axes_of_model, model in zip(grid, models, strict=True):
        mine = [(size, lines) for (name, size), lines in panels.items() if name == model]
        for axes in axes_of_model[len(mine) :]:
            axes.set_visible(False)
        for axes, (size, lines) in zip(axes_of_model, mine, strict=False):
            for cache, rows in lines.items():
                axes.plot(
                    [row[x] for row in rows],
                    [value(row) for row in rows],
                    marker="so^Dv"[caches.index(cache) % 5],
                    # Lines that lie on one another are both seen.
                    linestyle="--" if cache in LABELS and cache != "static" else "-",
                    fillstyle="none",
                    color=f"C{caches.index(cache)}",
                    label=LABELS.get(cache, f"tq_inductor: TurboQuantCache {cache}"),
                )
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set(title=f"{model}, {panel} {size:,}", xlabel=x, ylabel=label)
            ticks = sorted({row[x] for rows in lines.values() for row in rows})
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
            axes.grid(alpha=0.3)
    # One legend beside all panels: a line has the same colour everywhere.
    shown = {
        text: line
        for axes in figure.axes
        for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="small")
    return figure
