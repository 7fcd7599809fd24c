"""Peak memory with a long packed cache, on a GPU: what a model takes beside weights and cache.

    python benchmarks/bench_memory.py [--out FOLDER] [--commit NAME] [--batch B] [--context N]

The Llama of `bench_point` (random weights), compiled with CUDA graphs. The cache is filled with random
tokens but for the end of the prompt, which is read in chunks, over all that came before; then it decodes.
Writes `memory.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, write_result

from tq_inductor import KVFormat
from tq_inductor.bench_point import build_model, fill, make_cache
from tq_inductor.clock import cache_bytes

GIB = 1 << 30


@torch.no_grad()
def measure(
    size: str, kind: str, batch: int, context: int, read: int, chunk: int, new: int
) -> dict[str, Any]:
    """Bytes: of the cache, what its format promises, and the peak over weights and cache.

    Args:
        read: tokens of the prompt that are read, in chunks of `chunk`; the others are there.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model("llama", size, device)
    config = model.config
    cache = make_cache(kind, model, batch, context)
    fill(cache, model, batch, context - new - read)
    model.compile(backend="turboquant", mode="reduce-overhead" if device == "cuda" else "default")
    ids = torch.randint(3, config.vocab_size, (batch, read + new), device=device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for tokens in (*ids[:, :read].split(chunk, 1), *ids[:, read:].split(1, 1)):
        model(tokens, past_key_values=cache, logits_to_keep=1)
    held = cache_bytes(cache)
    promise = KVFormat(kind, config.head_dim).cache_bytes(batch, config.num_key_value_heads, context)
    promise *= config.num_hidden_layers
    row = {
        "cache": kind, "batch": batch, "context": context, "chunk": chunk, "read": read,
        "weights_bytes": weights, "cache_bytes": held, "promised_bytes": promise,
        "cache_over_promise": round(held / promise, 5),
    }  # fmt: skip
    if device == "cuda":
        beside = torch.cuda.max_memory_allocated() - weights - held
        row["peak_beside_weights_and_cache_gib"] = round(beside / GIB, 3)
    return row


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--cache", default="k4v4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=1 << 17)
    parser.add_argument("--read", type=int, default=1 << 12)
    parser.add_argument("--chunk", type=int, default=1 << 10)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    args = parser.parse_args()
    row = measure(args.size, args.cache, args.batch, args.context, args.read, args.chunk, args.new)
    print(row)
    write_result("memory", {"environment": environment(args.commit), "rows": [row]}, args.out)


if __name__ == "__main__":
    main()
