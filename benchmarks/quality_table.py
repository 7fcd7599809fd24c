"""Print the tables of docs/quality.md from the result files; `--write` puts them there.

python benchmarks/quality_table.py [--write]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quality.md"
END = "<!-- end of table -->"
CODES = {
    "8": "8 bits (fp8 and a scale)",
    "4": "4 bits",
    "3": "3 bits",
    "2": "2 bits",
    "unbiased4": "4 bits, unbiased scale",
    "unbiased3": "3 bits, unbiased scale",
    "unbiased2": "2 bits, unbiased scale",
    "scales4": "4 bits, best of 3 scales",
    "scales3": "3 bits, best of 3 scales",
    "scales2": "2 bits, best of 3 scales",
    "vector4": "4 bits, pairs",
    "vector3": "3 bits, pairs",
    "vector2": "2 bits, groups of 4",
    "vllm4": "vLLM's key, 4 bits",
    "vllm3": "vLLM's key, 3 bits",
    "minmax4": "vLLM's value, 4 bits",
    "minmax3": "vLLM's value, 3 bits",
    "minmax2": "min/max, 2 bits",
    "fp8": "fp8, no scale",
    "bf16": "bf16",
}


def result(part: str) -> dict[str, Any]:
    """The result file of a part of `bench_quality.py`."""
    return json.loads((ROOT / "benchmarks" / "results" / f"quality_{part}.json").read_text())


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def sphere() -> str:
    """Squared error at three dimensions; slope and variance of inner products at D=128."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result("sphere")["rows"]:
        rows.setdefault(row["code"], {})[row["head_dim"]] = row
    cells = []
    for code, at in rows.items():
        errors = []
        for row in at.values():
            exact = f" ({row['exact_mse']:.4g})" if row["exact_mse"] else ""
            errors.append(f"{row['mse']:.3g}{exact}")
        inner = [f"{at[128]['slope']:.3f}", f"{at[128]['variance']:.3g}"]
        cells.append([CODES[code], *errors, *inner])
    return _table(["code", "D=64", "D=128", "D=256", "slope, D=128", "D x variance, D=128"], cells)


def synthetic() -> str:
    """KL of the attention on each set of keys, and the output's error on the Qwen-like ones."""
    rows = result("synthetic")["schemes"]
    kinds = [key for key in next(iter(rows.values())) if key != "bytes"]
    cells = []
    for name, row in rows.items():
        kls = [f"{row[kind]['kl_nats']:.2g}" for kind in kinds]
        cells.append([name, f"{row['bytes']:.0f}", *kls, f"{100 * row['Qwen-like']['output_error']:.1f}%"])
    return _table(["scheme", "bytes", *(f"KL, {kind}" for kind in kinds), "output error, Qwen-like"], cells)


def model(part: str) -> str:
    """The demo model's bits per byte, and how far its predictions moved."""
    cells = []
    for name, row in result(part)["schemes"].items():
        low, high = row["interval_percent"]
        size = f"{row['bytes']:.0f}" if "bytes" in row else ""
        delta = f"{row['delta_percent']:+.2f}% ({low:+.2f} to {high:+.2f})"
        cells.append([name, size, delta, f"{row['kl_nats']:.2g}", f"{row['top1_percent']:.1f}%"])
    return _table(["scheme", "bytes", "bits per byte, against exact", "KL", "same top byte"], cells)


def recall(part: str) -> str:
    """Needles that the demo model copies, by distance."""
    rows = result(part)["schemes"]
    distances = list(next(iter(rows.values()))["percent"])
    cells = []
    for name, row in rows.items():
        low, high = row["interval"]
        shares = [f"{row['percent'][distance]:.0f}%" for distance in distances]
        cells.append([name, *shares, f"{row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"])
    return _table(
        ["scheme", *(f"{distance} bytes" for distance in distances), "points, against exact"], cells
    )


def trellis() -> str:
    """Codes of 2 and 3 bits: error on the sphere, and what the demo model loses of text and needles."""
    rows = result("trellis")
    errors = {row["code"]: f"{row['mse']:.3g}" for row in rows["rows"] if row["head_dim"] == 128}
    cells = [["exact", "", "+0.00%", "0", "+0.0"]]
    for (name, row), code in zip(list(rows["schemes"].items())[1:], errors, strict=True):
        (low, high), found = row["interval_percent"], rows["recall"][name]
        delta = f"{row['delta_percent']:+.2f}% ({low:+.2f} to {high:+.2f})"
        points = "{:+.1f} ({:+.1f} to {:+.1f})".format(found["difference"], *found["interval"])
        cells.append([name, errors[code], delta, f"{row['kl_nats']:.2g}", points])
    return _table(["scheme", "MSE, D=128", "bits per byte, against exact", "KL", "needles, points"], cells)


TABLES = {
    "sphere": sphere,
    "synthetic": synthetic,
    "formats": lambda: model("formats"),
    "large_bias": lambda: model("large_bias"),
    "recall": lambda: recall("recall"),
    "large_bias_recall": lambda: recall("large_bias_recall"),
    "ideas": lambda: model("ideas"),
    "chosen": lambda: model("chosen"),
    "trellis": trellis,
}


def with_tables(page: str) -> str:
    """`page` with every table between its markers replaced by the present one."""
    for part, table in TABLES.items():
        start = f"<!-- table: {part}, benchmarks/quality_table.py -->\n"
        before, rest = page.split(start)
        page = before + start + table() + END + rest.split(END, 1)[1]
    return page


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text()))
    else:
        print("\n".join(table() for table in TABLES.values()), end="")


if __name__ == "__main__":
    main()
