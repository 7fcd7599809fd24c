"""Print the README's table from the result files; `--write` puts it there.

python benchmarks/readme_table.py [--write]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tq_inductor import KVFormat

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- table: benchmarks/readme_table.py -->\n", "<!-- end of table -->"


def table() -> str:
    """Markdown: memory, quality and speed of each cache format that was measured."""
    results = ROOT / "benchmarks" / "results"
    reading = json.loads((results / "reading.json").read_text())["formats"]
    decode = json.loads((results / "decode.json").read_text())
    first = decode["shapes"][0]
    shape = f"batch {first['batch']}, {first['length']:,} tokens"
    lines = [
        "| KV cache | bytes per token and KV head (D=128) | memory | bits per byte, held-out text "
        f"| decode attention, {decode['environment']['gpu'].removeprefix('NVIDIA ')}, {shape} |",
        "|---|---|---|---|---|",
        f"| bf16, cuDNN's attention | 512 | 1.00x | | {first['cudnn_bf16']['median_us']:.0f} µs |",
    ]
    for name in ("bf16", "k8v4", "k4v4", "k2v2"):
        fmt = KVFormat(name, 128)
        row, time = reading[name], first[name]["median_us"]
        quality = f"{row['bits_per_byte']:.3f}"
        if name != "bf16":
            quality += f" ({100 * row['more_than_bf16'] / reading['bf16']['bits_per_byte']:+.1f}%)"
        memory = f"{1 / fmt.compression:.2f}x"
        lines.append(f"| {name} | {fmt.slot_bytes} | {memory} | {quality} | {time:.0f} µs |")
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """`readme` with the table between its markers replaced by the present one."""
    before, rest = readme.split(START)
    return before + START + table() + END + rest.split(END, 1)[1]


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        path = ROOT / "README.md"
        path.write_text(with_table(path.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
