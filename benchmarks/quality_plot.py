"""Draw docs/quality.svg from the result files: what each scheme costs, with confidence intervals.

    python benchmarks/quality_plot.py [--out FILE]

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quality_table import ROOT, result

LEAST = 0.02  # per cent; the axis is logarithmic, and what is better than this is drawn here


def skipped(name: str) -> bool:
    """Whether a row means nothing away from its table."""
    return name == "exact" or "+ these" in name


def draw(path: Path) -> None:
    """Bars of the demo model's extra bits per byte, in per cent, for every scheme of every part."""
    from matplotlib import pyplot

    # Text stays text, and names inside the file do not change from run to run.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quality"})
    rows: dict[str, dict] = {}
    for part in ("formats", "ideas", "chosen"):
        rows |= {name: row for name, row in result(part)["schemes"].items() if not skipped(name)}
    names = sorted(rows, key=lambda name: rows[name]["delta_percent"])
    deltas = [max(rows[name]["delta_percent"], LEAST) for name in names]
    ends = [[max(end, LEAST) for end in rows[name]["interval_percent"]] for name in names]
    spread = [
        [delta - low for delta, (low, _) in zip(deltas, ends, strict=True)],
        [high - delta for delta, (_, high) in zip(deltas, ends, strict=True)],
    ]
    spread = [[max(length, 0) for length in side] for side in spread]
    figure, axes = pyplot.subplots(figsize=(9, 0.2 * len(names) + 1))
    axes.barh(names, deltas, left=0, xerr=spread, color="#4c78a8", error_kw={"linewidth": 0.8})
    axes.set(xscale="log", xlim=(LEAST, None), xlabel="extra bits per byte of held-out text, per cent")
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})  # the same file for the same figures
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.svg")
    draw(parser.parse_args().out)
