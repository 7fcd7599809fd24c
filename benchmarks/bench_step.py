"""Milliseconds of a whole decode step of a transformers Llama with long caches, on a GPU.

    python benchmarks/bench_step.py [--out FOLDER] [--commit NAME] [--shape B L] [--with-inductor]
                                    [--also OPTION]

The model has 16 layers, hidden size 4096, 32/8 heads, bf16 and random weights. Each case compiles it as
`mode="reduce-overhead"` does and runs steps on a filled cache: each waited for, as `generate` waits for
its tokens (`median_ms`), and then without waiting (`in_a_row_ms`), as a loop can that looks at no token
before the last. Writes `step.json`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, write_result
from rich.progress import track
from torch._dynamo.utils import counters
from transformers import Cache, LlamaConfig, LlamaForCausalLM, StaticCache

from tq_inductor import KVFormat, TurboQuantCache

SHAPES = ((8, 32768), (32, 8192), (1, 32768))
WARM_UP, STEPS, CHUNK = 6, 24, 4096
ROOM = 64  # free slots at the end: the steps
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4096, 16, 32, 8, 128
BYTES_PER_SECOND = 4.3e12


def llama(device: str) -> LlamaForCausalLM:
    """The model, weights random."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=11008, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=32000,
        max_position_embeddings=1 << 18, torch_dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(default)
    return model.eval()


def filled(kind: str, model: LlamaForCausalLM, batch: int, length: int, held: int) -> Cache:
    """A cache of `length` slots that holds `held` random tokens."""
    if kind == "static":
        cache: Cache = StaticCache(config=model.config, max_cache_len=length)
    else:
        cache = TurboQuantCache(model.config, max_cache_len=length, kv_format=kind)
    chunk = torch.randn(
        batch, KV_HEADS, min(CHUNK, held), HEAD_DIM, dtype=torch.bfloat16, device=model.device
    )
    for layer in cache.layers:
        done = 0
        while done < held:
            new = chunk[:, :, : held - done]
            layer.lazy_initialization(new, new) if not layer.is_initialized else None
            if kind == "static":
                layer.keys[:, :, done : done + new.shape[2]] = new
                layer.values[:, :, done : done + new.shape[2]] = new
            else:
                layer.append(new, new)
                layer.fresh = False
            done += new.shape[2]
        if kind == "static":
            layer.cumulative_length.fill_(held)
    return cache


def step_times(
    model: LlamaForCausalLM, cache: Cache, batch: int, backend: str, option: str | None
) -> dict[str, Any]:
    """Median and spread of a step's time in ms, what steps take in a row, and what compiling did.

    `option` is one of Inductor's, then on, or the name of one of `torch.compiler`'s filters of guards.
    """
    torch._dynamo.reset()
    counters.clear()
    # What "reduce-overhead" stands for: torch.compile takes a mode or options.
    options: dict[str, Any] = {"triton.cudagraphs": True}
    if option is not None:
        guard_filter = getattr(torch.compiler, option, None)
        options |= {option: True} if guard_filter is None else {"guard_filter_fn": guard_filter}
    step = torch.compile(model.forward, backend=backend, options=options, fullgraph=True)
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    times = []
    with torch.no_grad():
        for i in range(WARM_UP + STEPS):
            if i == WARM_UP:
                graphs = counters["stats"]["unique_graphs"]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step(ids, past_key_values=cache)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        begin.record()
        for _ in range(STEPS):
            step(ids, past_key_values=cache)
        end.record()
        torch.cuda.synchronize()
    times = times[WARM_UP:]
    return {
        "median_ms": round(statistics.median(times), 3),
        "spread_ms": round(max(times) - min(times), 3),
        "in_a_row_ms": round(begin.elapsed_time(end) / STEPS, 3),
        "graphs_after_warm_up": counters["stats"]["unique_graphs"] - graphs,
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def cases(shapes: list[tuple[int, int]], with_inductor: bool) -> Iterator[tuple[int, int, str, str, float]]:
    """(batch, length, cache, compiler, filled part)."""
    for batch, length in shapes:
        if with_inductor:
            yield batch, length, "static", "inductor", 1.0
        for kind in ("static", "k4v4"):
            yield batch, length, kind, "turboquant", 1.0
        yield batch, length, "static", "turboquant", 0.5


def floor_ms(model: LlamaForCausalLM, kind: str, batch: int, held: int) -> float:
    """Weights and cache read once at 4.3 TB/s."""
    fmt = KVFormat("bf16" if kind == "static" else kind, HEAD_DIM)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - 32000 * HIDDEN * 2
    return round((weights + fmt.cache_bytes(batch, KV_HEADS, held) * LAYERS) / BYTES_PER_SECOND * 1e3, 2)


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("B", "L"))
    parser.add_argument("--with-inductor", action="store_true", help="Inductor's own backend beside ours")
    parser.add_argument("--also", metavar="OPTION", help="step_times' option")
    args = parser.parse_args()
    model = llama("cuda")
    rows = []
    shapes = [tuple(s) for s in args.shape or SHAPES]
    for batch, length, kind, backend, part in track(list(cases(shapes, args.with_inductor))):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = int(length * part) - ROOM
        cache = filled(kind, model, batch, length, held)
        row = {"batch": batch, "max_cache_len": length, "tokens": held, "cache": kind, "compiler": backend}
        row |= {} if args.also is None else {"option": args.also}
        row |= step_times(model, cache, batch, backend, args.also)
        row["floor_ms"] = floor_ms(model, kind, batch, held)
        rows.append(row)
        print(row, flush=True)
        del cache
        write_result("step", {"environment": environment(args.commit), "steps": rows}, args.out)


if __name__ == "__main__":
    main()
