"""A decode step on one GPU, with layers on two (`device_map`), and with heads on two (tensor parallelism).

    python benchmarks/bench_two_gpus.py [--out FOLDER] [--commit NAME] [--batch B] [--context N]

The same checkpoint (the Llama of `bench_point`, random weights) reads the same prompt and takes the same
steps in each way, each in processes of its own; tensor parallelism is that of transformers, under torchrun:
each cache holds the KV heads of its rank. Logits are compared with those of one GPU. The prompt is read
eagerly: to compile that takes minutes, and steps are what is timed. Layers on two GPUs are compiled one by
one: few only. Dynamo's guards run on the host before each step, and tensor parallelism has many more:
steps are timed with all, and without those on modules of torch.nn (`SKIPPED`). Needs accelerate. Writes
`two_gpus.json`. With `--size tiny` and no GPU, tensor parallelism runs on two processes of the CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, write_result
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel, StaticCache
from transformers.distributed.configuration_utils import DistributedConfig

from tq_inductor import TurboQuantCache
from tq_inductor.bench_point import build_model
from tq_inductor.clock import cache_bytes

GPUS = 2
CACHES = ("static", "k4v4")
CHUNK, WARM_UP, STEPS = 2044, 6, 24
FEW_LAYERS = 4
ALL, SKIPPED = "all", "not on torch.nn"
GUARDS: dict[str, dict[str, Any]] = {
    ALL: {},
    SKIPPED: {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe},
}
ONE, LAYERS_ON_TWO, TENSOR_PARALLEL = "one", "layers on two", "tensor parallel"


def load(way: str, folder: Path, device: str) -> PreTrainedModel:
    """The checkpoint in `folder`, placed as `way` says."""
    if way == TENSOR_PARALLEL:
        placed: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=GPUS)}
    elif way == LAYERS_ON_TWO:
        placed = {"device_map": "balanced", "max_memory": {gpu: "1000GiB" for gpu in range(GPUS)}}
    else:
        placed = {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **placed).eval()
    return model if placed else model.to(device)


def new_cache(kind: str, model: PreTrainedModel, max_len: int) -> Cache:
    """An empty cache; made at the first forward, when it is known which layer and head lives where."""
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=max_len)
    return TurboQuantCache(model.config, max_len, kv_format=kind)


def report(what: str) -> None:
    """Say when this process, one of several, has come how far."""
    print(f"  {time.strftime('%X')} rank {os.environ.get('RANK', 0)}: {what}", flush=True)


@torch.no_grad()
def run(
    model: PreTrainedModel, kind: str, ids: torch.Tensor, gpus: list[int], options: dict[str, Any]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures, and the logits of the steps `[steps, B, vocabulary]` on the host; `gpus`: those in use."""
    torch.compiler.reset()
    model._compiled_call_impl = None
    counters.clear()
    model.compile(backend="turboquant", options=options)
    prompt_len = ids.shape[1] - WARM_UP - STEPS
    cache = new_cache(kind, model, ids.shape[1])
    for chunk in ids[:, :prompt_len].split(CHUNK, 1):
        model.forward(chunk, past_key_values=cache, logits_to_keep=1)  # not compiled
    report(f"{kind}: the prompt is read")
    times, logits = [], []
    for i in range(prompt_len, ids.shape[1]):
        start = time.perf_counter()
        out = model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1]
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        times.append(time.perf_counter() - start)
        logits.append(out.float().cpu())
        if i < prompt_len + WARM_UP:
            report(f"{kind}: a first step took {times[-1]:.1f} s")
    figures = {
        "layers": model.config.num_hidden_layers,
        "median_ms": round(statistics.median(times[WARM_UP:]) * 1e3, 3),
        "spread_ms": round((max(times[WARM_UP:]) - min(times[WARM_UP:])) * 1e3, 3),
        "cache_bytes_of_this_process": cache_bytes(cache),
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "rewritten": {k: v for k, v in counters["turboquant"].items() if k.startswith("rewritten")},
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }
    if gpus:
        figures["peak_gib"] = [round(torch.cuda.max_memory_allocated(gpu) / 2**30, 2) for gpu in gpus]
    return figures, torch.stack(logits)


def child(way: str, folder: Path, batch: int, context: int) -> None:
    """Run one way and leave its figures and logits in `folder`; the first rank does, if there are more."""
    rank = int(os.environ.get("RANK", 0))
    gpus: list[int] = []
    if torch.cuda.is_available():
        gpus = list(range(GPUS)) if way == LAYERS_ON_TWO else [int(os.environ.get("LOCAL_RANK", 0))]
        torch.cuda.set_device(gpus[0])
    device = "cuda" if gpus else "cpu"
    model = load(way, folder, device)
    report("the model is loaded")
    generator = torch.Generator().manual_seed(0)
    shape = (batch, context + WARM_UP + STEPS)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator).to(device)
    options: dict[str, Any] = {"triton.cudagraphs": bool(gpus)}
    if way == LAYERS_ON_TWO:
        # accelerate's hooks break the graph at every layer: a graph for each of them, all of one function.
        torch._dynamo.config.recompile_limit = 256
        options = {}
    rows = []
    ways_of_guards = (ALL,) if way == LAYERS_ON_TWO else tuple(GUARDS)
    for kind, guards in itertools.product(CACHES, ways_of_guards):
        figures, logits = run(model, kind, ids, gpus, options | GUARDS[guards])
        rows.append({"cache": kind, "guards": guards} | figures)
        if rank == 0:
            torch.save(logits, folder / f"{way}-{kind}-{guards}.pt")
    if rank == 0:
        (folder / f"{way}.json").write_text(json.dumps(rows))
    if torch.distributed.is_initialized():
        torch.compiler.reset()  # the CUDA graphs: while one holds a collective, this would wait for ever
        del model
        gc.collect()
        torch.distributed.destroy_process_group()


def start(way: str, folder: Path, args: argparse.Namespace) -> str | None:
    """Run `child` in processes of its own; the end of what they said if they failed."""
    command = [sys.executable]
    if way == TENSOR_PARALLEL:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={GPUS}"]
    command += [__file__, "--child", way, "--folder", str(folder)]
    command += ["--batch", str(args.batch), "--context", str(args.context)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    return done.stderr[-2000:] if done.returncode else None


def compared(folder: Path, way: str, kind: str, guards: str) -> dict[str, float]:
    """How far a way's logits are from those of one GPU."""
    expected = torch.load(folder / f"{ONE}-{kind}-{ALL}.pt")
    got = torch.load(folder / f"{way}-{kind}-{guards}.pt")
    far = (got - expected).abs().max() / expected.abs().max()
    same = (got.argmax(-1) == expected.argmax(-1)).float().mean()
    return {"largest_difference_over_largest_logit": float(far), "same_token": round(float(same), 4)}


def save(folder: Path, size: str, layers: int | None) -> None:
    """Write the checkpoint, of its first `layers` layers if there is a number."""
    model = build_model("llama", size, "cuda" if torch.cuda.is_available() else "cpu")
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)
    build_model.cache_clear()
    torch.cuda.empty_cache()


def measure(way: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one way, by cache; or why there are none."""
    row: dict[str, Any] = {"way": way, "batch": args.batch, "tokens": args.context}
    started = time.perf_counter()
    if error := start(way, folder, args):
        return [row | {"error": error}]
    print(f"{way}: {time.perf_counter() - started:.0f} s", flush=True)
    rows = []
    for figures in json.loads((folder / f"{way}.json").read_text()):
        rows.append(row | figures | compared(folder, way, figures["cache"], figures["guards"]))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run all ways and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=32704)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder, args.batch, args.context)
        return
    gpus = torch.cuda.device_count()
    groups: list[tuple[int | None, tuple[str, ...]]] = [(None, (ONE, TENSOR_PARALLEL))]
    if gpus >= GPUS:
        groups.append((FEW_LAYERS, (ONE, LAYERS_ON_TWO)))
    rows: list[dict[str, Any]] = []
    for layers, ways in groups:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save(folder, args.size, layers)
            for way in ways:
                rows += measure(way, folder, args)
                result = {"environment": environment(args.commit), "steps": rows}
                write_result("two_gpus", result, args.out)


if __name__ == "__main__":
    main()
