"""Time one decode attention over packed and 16-bit caches, with cuDNN's bf16 attention beside it.

    python benchmarks/bench_decode.py [--out FOLDER] [--commit NAME]

Needs an NVIDIA GPU. Writes `decode.json`: medians of CUDA-graph replays over caches that together
exceed the L2 cache, the spread, copy bandwidth, and the ratio of each to cuDNN.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, copy_bandwidth, environment, replay_times, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tq_inductor import KVFormat, PackedKVCache

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = ((8, 32768), (1, 32768), (32, 8192), (64, 4096))
FORMATS = ("k4v4", "k8v4", "k2v2", "bf16")
COLD_BYTES = 256 << 20


def filled_cache(name: str, batch: int, length: int) -> PackedKVCache:
    """A full cache of random bytes: codes of any value, scales of a few magnitudes."""
    cache = PackedKVCache(batch, KV_HEADS, HEAD_DIM, length, kv_format=name)
    cache.packed.random_(0, 64)  # as bf16 and as scales these bytes are small finite numbers
    cache.seq_length.fill_(length)
    return cache


def time_shape(batch: int, length: int) -> dict[str, Any]:
    """Times of all formats and of cuDNN for one shape."""
    q = torch.randn(batch, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    kv = torch.randn(2, batch, KV_HEADS, length, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        peer = replay_times([lambda: scaled_dot_product_attention(q, *kv, enable_gqa=True)])
    row: dict[str, Any] = {"batch": batch, "length": length, "cudnn_bf16": peer}
    for name in FORMATS:
        nbytes = KVFormat(name, HEAD_DIM).cache_bytes(batch, KV_HEADS, length)
        caches = [filled_cache(name, batch, length) for _ in range(-(-COLD_BYTES // nbytes))]
        calls = []
        for cache in caches:

            def attend(cache: PackedKVCache = cache) -> torch.Tensor:
                return torch.ops.tq_inductor.tq_decode(
                    q, cache.packed, cache.seq_length, cache.k_rotation, cache.v_rotation, None,
                    None, None, name, length, HEAD_DIM**-0.5,  # noqa: B023
                )  # fmt: skip

            calls.append(attend)
        times = replay_times(calls)
        times["gigabytes_per_second"] = round(nbytes / times["median_us"] / 1e3, 1)
        times["speed_vs_cudnn"] = round(peer["median_us"] / times["median_us"], 3)
        row[name] = times
        print(f"B{batch} L{length} {name}: {times}", flush=True)
    return row


def main() -> None:
    """Time all shapes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    result = {
        "what": f"one decode attention, {HEADS}/{KV_HEADS} heads, D={HEAD_DIM}, full caches, cold L2",
        "environment": environment(args.commit),
        "copy_terabytes_per_second": copy_bandwidth(),
        "shapes": [time_shape(*shape) for shape in SHAPES],
    }
    write_result("decode", result, args.out)


if __name__ == "__main__":
    main()
