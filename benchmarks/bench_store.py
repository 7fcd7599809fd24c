"""Time appending to packed caches: one token for a batch, and a prompt.

    python benchmarks/bench_store.py [--out FOLDER] [--commit NAME]

Needs an NVIDIA GPU. Writes `store.json`: medians of CUDA-graph replays over the caches of 16 layers, the
spread, and for prompts the bytes read and written a second beside those of a copy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, copy_bandwidth, environment, replay_times, write_result

from tq_inductor import KVFormat, PackedKVCache

FORMATS = ("k8v8", "k8v4", "k4v4", "k3v3", "k2v2", "bf16")
TOKEN_BATCHES = (1, 8, 64)
PROMPT = 32768
LAYERS, KV_HEADS, HEAD_DIM = 16, 8, 128


def time_store(name: str, batch: int, tokens: int, capacity: int) -> dict[str, float]:
    """Microseconds of one call that appends `tokens` tokens to each of `batch` rows."""
    layers = range(LAYERS if tokens == 1 else 4)
    caches = [PackedKVCache(batch, KV_HEADS, HEAD_DIM, capacity, kv_format=name) for _ in layers]
    new = [
        torch.randn(2, batch, KV_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for _ in layers
    ]
    for cache in caches:
        cache.seq_length.fill_(capacity)
    return replay_times(
        [
            lambda cache=cache, kv=kv: torch.ops.tq_inductor.tq_store(
                cache.packed,
                *kv,
                cache.seq_length,
                cache.k_rotation,
                cache.v_rotation,
                name,
                *cache._beside,
            )
            for cache, kv in zip(caches, new, strict=True)
        ]
    )


def main() -> None:
    """Time all formats and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    copied = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for name in FORMATS:
        row: dict[str, Any] = {"kv_format": name}
        for batch in TOKEN_BATCHES:
            row[f"one_token_batch_{batch}"] = time_store(name, batch, 1, 1024)
        prompt = time_store(name, 1, PROMPT, PROMPT)
        moved = sum(KVFormat(f, HEAD_DIM).cache_bytes(1, KV_HEADS, PROMPT) for f in ("bf16", name))
        prompt["terabytes_per_second"] = round(moved / prompt["median_us"] / 1e6, 3)
        prompt["share_of_copy"] = round(moved / prompt["median_us"] / 1e6 / copied, 3)
        row[f"prompt_{PROMPT}"] = prompt
        print(row, flush=True)
        rows.append(row)
    result = {
        "what": f"append to a packed cache, {KV_HEADS} KV heads, head_dim {HEAD_DIM}; each call one layer",
        "environment": environment(args.commit),
        "copy_terabytes_per_second": copied,
        "formats": rows,
    }
    write_result("store", result, args.out)


if __name__ == "__main__":
    main()
