"""What `generate` costs around its CUDA graphs: a step's time less that of a graph's run, on a GPU.

    python benchmarks/bench_overhead.py [--out FOLDER] [--commit NAME] [--size full|tiny]

256 tokens of one sequence after a short prompt, where a step waits for the host: with transformers'
StaticCache as `generate` compiles it by itself, and with ours. Writes `overhead.json`.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, write_result
from rich.progress import track
from torch._dynamo.utils import counters
from transformers import Cache, PreTrainedModel

from tq_inductor.bench_point import build_model, clean_up, compile_for, make_cache
from tq_inductor.clock import Clock

CACHES = ("static-inductor", "static", "k4v4", "bf16")
PROMPT, NEW_TOKENS, REPEATS = 512, 256, 5
WARM_UP, MEASURED = 8, 64


def generate(model: PreTrainedModel, cache: Cache, new_tokens: int, options: dict[str, Any]) -> Clock:
    """Generate after a fixed prompt, the cache emptied first; when the tokens came."""
    ids = torch.arange(3, 3 + PROMPT, device=model.device)[None] % model.config.vocab_size
    cache.reset()
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=clock,
        max_new_tokens=new_tokens, do_sample=False, **options,
    )  # fmt: skip
    return clock


def graph_ms(model: PreTrainedModel, cache: Cache, options: dict[str, Any]) -> float:
    """A step's time on the GPU in ms: steps one behind the other, for none of which anybody waits.

    The inputs are those that `generate` makes for a step.
    """
    inputs: dict[str, Any] = {}
    prepare = model.prepare_inputs_for_generation

    def note(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs.update(prepare(*args, **kwargs))
        return inputs.copy()

    model.prepare_inputs_for_generation = note
    try:
        generate(model, cache, 8, options)
    finally:
        del model.prepare_inputs_for_generation
    compile_config = options.get("compile_config")
    step = model if compile_config is None else model.get_compiled_call(compile_config)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.no_grad():
        for i in range(WARM_UP + MEASURED):
            if i == WARM_UP:
                begin.record()
            step(**inputs, return_dict=True)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / MEASURED


def measure(kind: str, size: str, device: str) -> dict[str, Any]:
    """One cache: a step's time, the GPU's part of it, and the graphs that were made for it."""
    clean_up()
    counters.clear()
    model = build_model("llama", size, device)
    cache = make_cache(kind, model, 1, PROMPT + NEW_TOKENS)
    options = compile_for(kind, model)
    for _ in range(2):
        generate(model, cache, NEW_TOKENS, options)
    graphs = counters["stats"]["unique_graphs"]
    clocks = [generate(model, cache, NEW_TOKENS, options) for _ in range(REPEATS)]
    steps = [1e3 * (clock.median_step_s or 0.0) for clock in clocks]
    wholes = [1e3 * (clock.times[-1] - clock.times[0]) for clock in clocks]
    row: dict[str, Any] = {
        "cache": kind,
        "step_ms": round(statistics.median(steps), 3),
        "spread_ms": round(max(steps) - min(steps), 3),
        "all_tokens_ms": round(statistics.median(wholes), 1),
        "graphs": graphs,
        "graphs_after_warm_up": counters["stats"]["unique_graphs"] - graphs,
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }
    if device == "cuda":
        graph = graph_ms(model, cache, options)
        row |= {"graph_ms": round(graph, 3), "overhead_ms": round(row["step_ms"] - graph, 3)}
    return row


def main() -> None:
    """Measure all caches and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    what = f"generate, Llama of 16 layers, one sequence, {NEW_TOKENS} tokens after {PROMPT}"
    rows = []
    for kind in track(CACHES):
        rows.append(measure(kind, args.size, device))
        print(rows[-1], flush=True)
        result = {"what": what, "environment": environment(args.commit), "caches": rows}
        write_result("overhead", result, args.out)


if __name__ == "__main__":
    main()
