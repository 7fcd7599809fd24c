"""Bits per byte of the demo model on held-out text, read from caches of several formats.

    python benchmarks/bench_reading.py [--out FOLDER] [--commit NAME] [--device cpu]

Every held-out module's beginning is read a few tokens at a time, so that the cache is really read (a longer
chunk would see itself as it came). Writes `reading.json`: bits per byte and, per format, the mean
difference to the bf16 cache with its bootstrap confidence interval over modules.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import torch
from evidence import RESULTS, environment, write_result
from rich.progress import Progress

from tq_inductor import KVFormat, TurboQuantCache
from tq_inductor.beside import DECODE_TOKENS
from tq_inductor.corpus import held_out_text
from tq_inductor.demo import CHUNK, load_demo_model, read_in_chunks

FORMATS = ("bf16", "k8v8", "k8v4", "k4v4", "k3v4", "k3v3", "k2v2")
BYTES_PER_MODULE = 3200


def interval(differences: list[float]) -> tuple[float, float]:
    """95% bootstrap confidence interval of the mean."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(4000))
    return means[100], means[-100]


def main() -> None:
    """Read all texts with all formats and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = load_demo_model(args.device)
    texts = {name: text[:BYTES_PER_MODULE] for name, text in held_out_text().items()}
    texts = {name: text[: len(text) // CHUNK * CHUNK] for name, text in texts.items()}
    bits: dict[str, list[float]] = {}
    with Progress() as progress:
        for name in FORMATS:
            bits[name] = []
            for module, text in texts.items():
                ids = torch.tensor(list(text), device=args.device)[None]
                cache = TurboQuantCache(model.config, BYTES_PER_MODULE, kv_format=name)
                label = f"{name} {module}"
                bits[name].append(read_in_chunks(model, ids, cache, progress, label, DECODE_TOKENS))
    rows = {}
    for name in FORMATS:
        differences = [a - b for a, b in zip(bits[name], bits["bf16"], strict=True)]
        mean = statistics.fmean(bits[name])
        low, high = interval(differences)
        rows[name] = {
            "bytes_per_token_and_head": KVFormat(name, model.config.head_dim).slot_bytes,
            "bits_per_byte": round(mean, 4),
            "more_than_bf16": round(statistics.fmean(differences), 4),
            "confidence_interval": [round(low, 4), round(high, 4)],
        }
    result = {
        "what": f"demo model, {len(texts)} held-out modules, up to {BYTES_PER_MODULE} bytes each, "
        f"read {DECODE_TOKENS} at a time",
        "environment": environment(args.commit),
        "dtype": str(model.dtype),
        "formats": rows,
        "modules": {m: {f: round(bits[f][i], 4) for f in FORMATS} for i, m in enumerate(texts)},
    }
    write_result("reading", result, args.out)


if __name__ == "__main__":
    main()
