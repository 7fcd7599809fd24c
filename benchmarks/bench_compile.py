"""Compile time with our compiler and with Inductor alone, without caches, on a CPU.

    python benchmarks/bench_compile.py [--out FOLDER] [--commit NAME] [--repeats N]

A Llama and a Gemma 3 with small random weights: prefill and one decode step with a StaticCache, each in a
process of its own, the two compilers in turn. Writes `compile.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from evidence import RESULTS, environment, write_result
from rich.progress import track

MODELS = {"llama": 8, "gemma3_text": 6}
SCRIPT = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
import tq_inductor.compiler

name, layers, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
config = AutoConfig.for_model(
    name, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    vocab_size=99, num_hidden_layers=layers, sliding_window=16,
)
model = AutoModelForCausalLM.from_config(config).eval()
cache = StaticCache(config=config, max_cache_len=64)
ids = torch.randint(3, 99, (2, 12))
torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))  # imports and the first C++ compilation
compiled = torch.compile(model, backend=backend)
with torch.no_grad():
    start = time.perf_counter()
    compiled(ids, past_key_values=cache)
    compiled(ids[:, :1], past_key_values=cache)
    print(json.dumps(time.perf_counter() - start))
"""


def seconds(model: str, layers: int, backend: str) -> float:
    """Time to compile and run both graphs, in a new process with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, model, str(layers), backend],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run all and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    times: dict[tuple[str, str], list[float]] = {}
    runs = [(m, b) for _ in range(args.repeats) for m in MODELS for b in ("inductor", "turboquant")]
    for model, backend in track(runs):
        times.setdefault((model, backend), []).append(seconds(model, MODELS[model], backend))
    rows: dict[str, Any] = {}
    for model in MODELS:
        row = {b: round(statistics.median(times[model, b]), 2) for b in ("inductor", "turboquant")}
        rows[model] = {
            "layers": MODELS[model],
            **row,
            "ratio": round(row["turboquant"] / row["inductor"], 3),
        }
        print(model, rows[model])
    what = "seconds to compile prefill and decode with a StaticCache"
    write_result(
        "compile", {"what": what, "environment": environment(args.commit), "models": rows}, args.out
    )


if __name__ == "__main__":
    main()
