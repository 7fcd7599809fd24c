"""Print the README's table from the result files; `--write` puts it there.

python benchmarks/readme_table.py [--write]
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path
from typing import Any

from tq_inductor import KVFormat
from tq_inductor.beside import SEGMENT

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- table: benchmarks/readme_table.py -->\n", "<!-- end of table -->"
COMPARED = {
    "dynamic": "DynamicCache, transformers eager",
    "static-inductor": "StaticCache, transformers with Inductor",
    "quantized": "QuantizedCache (quanto, 4 bits), transformers eager",
    "static": 'StaticCache, `backend="turboquant"`',
    "k4v4": 'TurboQuantCache, k4v4, `backend="turboquant"`',
}
MODELS = {
    "llama": "Llama, 16 layers, hidden size 4096",
    "qwen3": "Qwen3 of the 8B's sizes",
}
CACHE_NAMES = {"static": "StaticCache, bf16", "k4v4": "TurboQuantCache, k4v4"}


def table() -> str:
    """Markdown: memory, quality and speed of each cache format that was measured."""
    results = ROOT / "benchmarks" / "results"
    quality = json.loads((results / "quality_formats.json").read_text())["schemes"]
    decode = json.loads((results / "decode.json").read_text())
    first = decode["shapes"][0]
    shape = f"batch {first['batch']}, {first['length']:,} tokens"
    lines = [
        "| KV cache | bytes per token and KV head (D=128) | memory | bits per byte, held-out text "
        f"| decode attention, {decode['environment']['gpu'].removeprefix('NVIDIA ')}, {shape} |",
        "|---|---|---|---|---|",
        f"| bf16, cuDNN's attention | 512 | 1.00x | | {first['cudnn_bf16']['median_us']:.0f} µs |",
    ]
    for name in ("bf16", "k8v4", "k4v4", "k3v3", "k2v2"):
        fmt = KVFormat(name, 128)
        lossless = name == "bf16"
        row, time = quality[name if lossless else f"TurboQuantCache {name}"], first[name]["median_us"]
        bits = f"{row['bits_per_byte']:.3f}" + ("" if lossless else f" ({row['delta_percent']:+.1f}%)")
        kept = fmt.slot_bytes + (0 if lossless else 2 * fmt.head_dim // SEGMENT)  # and its share of a mean
        lines.append(f"| {name} | {kept} | {kept / 512:.2f}x | {bits} | {time:.0f} µs |")
    tables = (*map(_generate, MODELS), _steps(), _two_gpus(), _prefill())
    return "\n".join(chain(lines, *(["", *table] for table in tables))) + "\n"


def _generate(model: str) -> list[str]:
    """`generate` with each cache, transformers' own ways of running it beside ours."""
    rows = [point for point in _result(f"generate_{model}")["points"] if "step_ms" in point]
    points = {(p["cache"], p["batch"], p["context"]): p for p in rows}
    caches = {cache: name for cache, name in COMPARED.items() if any(key[0] == cache for key in points)}
    shapes = [key[1:] for key in points if key[0] == "k4v4"]
    shapes = [shape for shape in shapes if all((cache, *shape) in points for cache in caches)]
    names = [f"{batch} x {context:,}" for batch, context in shapes]
    columns = [f"ms a token at {names[0]}", *names[1:], f"first token, {names[0]}", "cache", "peak memory"]
    lines = [
        f"| `generate`: transformers' {MODELS[model]} | {' | '.join(columns)} |",
        "|---" * (len(shapes) + 4) + "|",
    ]
    for cache, name in caches.items():
        times = " | ".join(f"{points[(cache, *shape)]['step_ms']:.1f}" for shape in shapes)
        point = points[(cache, *shapes[0])]
        held, peak = (f"{point[key] / 2**30:.1f} GiB" for key in ("cache_bytes", "peak_bytes"))
        lines.append(f"| {name} | {times} | {point['first_token_s']:.2f} s | {held} | {peak} |")
    return lines


def _steps() -> list[str]:
    """Whole decode steps of a transformers model."""
    steps = _result("step")["steps"]
    lines = [
        "| a decode step of that Llama, without `generate` | ms, each waited for | in a row | floor |",
        "|---|---|---|---|",
    ]
    for row in steps:
        what = f"batch {row['batch']}, {CACHE_NAMES[row['cache']]}, "
        what += f"{row['tokens']:,} tokens in {row['max_cache_len']:,} slots"
        times = [f"{row[key]:.1f}" for key in ("median_ms", "in_a_row_ms", "floor_ms")]
        lines.append(f"| {what} | {' | '.join(times)} |")
    return lines


def _two_gpus() -> list[str]:
    """A decode step on one GPU and, with tensor parallelism, on two."""
    steps = _result("two_gpus")["steps"]
    rows = {(r["way"], r["cache"], r["guards"]): r["median_ms"] for r in steps if r["layers"] == 16}
    shape = f"batch {steps[0]['batch']}, {steps[0]['tokens']:,} tokens"
    lines = [f"| a step of that Llama, {shape} | one GPU | tensor parallel on two |", "|---|---|---|"]
    for cache, name in CACHE_NAMES.items():
        for guards, end in (("all", ""), ("not on torch.nn", ", without guards on torch.nn's modules")):
            one, two = (rows[way, cache, guards] for way in ("one", "tensor parallel"))
            lines.append(f"| {name}{end} | {one:.1f} ms | {two:.1f} ms |")
    return lines


def _prefill() -> list[str]:
    """Prefill attention with masks."""
    lines = ["| prefill attention, 32/8 heads | ours | SDPA with the mask | |", "|---|---|---|---|"]
    for case in _result("prefill")["cases"]:
        ours, theirs = (case[way]["median_us"] / 1e3 for way in ("attend", "sdpa_with_mask"))
        if case["name"] != "plain causal":  # there SDPA needs no mask
            what = (
                f"{case['name']}: batch {case['batch']}, {case['q_len']:,} queries, {case['kv_len']:,} keys"
            )
            lines.append(f"| {what} | {ours:.2f} ms | {theirs:.2f} ms | {theirs / ours:.1f}x |")
    return lines


def _result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


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
