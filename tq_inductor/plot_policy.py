"""The plot of `tq-inductor calibrate`: what each format costs in each layer, and which were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from .plot import SVG

LEAST = 1e-9  # nats; the axis is logarithmic


def draw_policy(policy: dict[str, Any], path: Path) -> None:
    """Draw the KL of each layer in each format, a line for a format; rings are around what was chosen.

    Args:
        policy: what `calibrate` returns.
        path: a name that ends in .svg, .png or another suffix that matplotlib knows; its folder is made if
            missing.
    """
    prices = policy["kl_nats_of_one_layer"]
    layers = [int(i) for i in prices]
    figure = Figure(figsize=(max(6.0, 0.25 * len(layers) + 3), 4), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(prices.values())):
        axes.plot(layers, [max(of[name], LEAST) for of in prices.values()], marker=".", label=name)
    chosen = [max(of[policy["kv_format"][int(i)]], LEAST) for i, of in prices.items()]
    axes.plot(layers, chosen, "o", color="black", fillstyle="none", markersize=9, label="chosen")
    axes.set(yscale="log", xlabel="layer", ylabel="KL of this layer alone, nats a token")
    axes.set_title(f"{policy['model']}, {policy['tokens']:,} tokens", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(SVG):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
