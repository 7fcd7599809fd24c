"""Draw docs/decode.svg from `decode.json`: how many times as fast as cuDNN over bf16, by context and batch.

python benchmarks/decode_plot.py [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from evidence import RESULTS
from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
FORMATS = ("bf16", "k8v8", "k8v4", "k4v4", "k3v3", "k2v2")
# The same file for the same figures, and its text as text.
SVG = {"svg.hashsalt": "tq_inductor", "svg.fonttype": "none"}


def draw(path: Path) -> None:
    """Batch 1 over context on the left; the larger batches, each with its context, on the right."""
    found = json.loads((RESULTS / "decode.json").read_text())
    one = sorted((row for row in found["shapes"] if row["batch"] == 1), key=lambda row: row["length"])
    many = sorted((row for row in found["shapes"] if row["batch"] > 1), key=lambda row: row["batch"])
    with rc_context(SVG):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for name in FORMATS:
            left.plot([row["length"] for row in one], speeds(one, name), marker="o", label=name)
            right.plot(range(len(many)), speeds(many, name), marker="o", label=name)
        lengths = [row["length"] for row in one]
        left.set_xscale("log", base=2)
        left.set_xticks(lengths, [f"{length:,}" for length in lengths])
        left.set(xlabel="tokens in the cache, batch 1", ylabel="times as fast as cuDNN, bf16")
        right.set_xticks(range(len(many)), [f"{row['batch']} x {row['length']:,}" for row in many])
        right.margins(x=0.15)
        right.set(xlabel="batch x tokens")
        for axes in (left, right):
            axes.axhline(1, color="gray", linewidth=0.8)
            axes.grid(alpha=0.3)
        left.set_ylim(bottom=0)
        left.legend(fontsize="small")
        gpu = found["environment"]["gpu"]
        figure.suptitle(f"decode attention, append included, 32/8 heads, D=128; {gpu}")
        figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def speeds(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Of each row, how many times as fast as cuDNN."""
    return [row[name]["speed_vs_cudnn"] for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "decode.svg")
    draw(parser.parse_args().out)
