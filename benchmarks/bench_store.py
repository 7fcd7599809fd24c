"""Time appending to packed caches, one token for a batch and a prompt, and reading all of one back.

    python benchmarks/bench_store.py [--out FOLDER] [--commit NAME]

Needs an NVIDIA GPU. Writes `store.json`: medians of CUDA-graph replays over the caches of 16 layers, the
spread, and for prompts and reading the bytes read and written a second beside those of a copy.
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
PROMPT, READ_BATCH = 32768, 8
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


def time_read(name: str, batch: int, tokens: int) -> dict[str, float]:
    """Microseconds of one call that gives keys and values of full rows in 16 bits."""
    cache = PackedKVCache(batch, KV_HEADS, HEAD_DIM, tokens, kv_format=name)
    cache.packed.random_()  # its time does not depend on the bytes
    cache.seq_length.fill_(tokens)
    return replay_times([lambda: cache.read(tokens)])


def shares(name: str, tokens: int, microseconds: float, copied: float) -> dict[str, float]:
    """TB/s of `tokens` tokens in 16 bits and packed, and its share of what a copy does."""
    moved = sum(KVFormat(f, HEAD_DIM).cache_bytes(1, KV_HEADS, tokens) for f in ("bf16", name))
    speed = moved / microseconds / 1e6
    return {"terabytes_per_second": round(speed, 3), "share_of_copy": round(speed / copied, 3)}


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
        row[f"prompt_{PROMPT}"] = prompt | shares(name, PROMPT, prompt["median_us"], copied)
        read = time_read(name, READ_BATCH, PROMPT)
        read |= shares(name, READ_BATCH * PROMPT, read["median_us"], copied)
        row[f"read_{READ_BATCH}x{PROMPT}"] = read
        print(row, flush=True)
        rows.append(row)
    shape = f"{KV_HEADS} KV heads, head_dim {HEAD_DIM}; each call one layer"
    result = {
        "what": f"append to a packed cache, and read all of it, {shape}",
        "environment": environment(args.commit),
        "copy_terabytes_per_second": copied,
        "formats": rows,
    }
    write_result("store", result, args.out)


if __name__ == "__main__":
    main()
