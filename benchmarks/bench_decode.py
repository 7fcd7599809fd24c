"""Time one decode step's attention over packed and 16-bit caches, with cuDNN's bf16 attention beside it.

    python benchmarks/bench_decode.py [--out FOLDER] [--commit NAME]

A step of ours appends the new token, rotates queries and output, and reduces the splits; cuDNN's only
attends. Needs an NVIDIA GPU. Writes `decode.json`: medians of CUDA-graph replays over caches that together
exceed the L2 cache, the spread, copy bandwidth, and the ratio of each to cuDNN.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evidence import RESULTS, copy_bandwidth, environment, replay_times, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tq_inductor import KVFormat, PackedKVCache


class Shape(NamedTuple):
    """Sizes of one attention, one new token for each row of the batch."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


FORMATS = ("k8v8", "k8v4", "k4v4", "k4v2", "k3v3", "k2v2", "bf16")
SHAPES = (
    *(Shape(*sizes) for sizes in ((8, 32768), (1, 131072), (32, 8192), (64, 4096))),
    *(Shape(1, length) for length in (2048, 8192, 32768)),
)
OTHER_HEADS = (
    Shape(8, 32768, 28, 4),
    Shape(8, 32768, 64, 8),
    Shape(8, 16384, 16, 16),
    Shape(8, 32768, 32, 8, 64),
    Shape(8, 16384, 32, 8, 256),
)
COLD_BYTES = 256 << 20
FLOOR_TERABYTES = 4.3  # per second: what cuDNN reads its bytes at


def filled_cache(name: str, shape: Shape) -> PackedKVCache:
    """A full cache of random bytes: codes of any value, scales of a few magnitudes."""
    cache = PackedKVCache(shape.batch, shape.kv_heads, shape.head_dim, shape.length, kv_format=name)
    cache.packed.random_(0, 64)  # as bf16 and as scales these bytes are small finite numbers
    cache.seq_length.fill_(shape.length)
    return cache


def time_shape(shape: Shape, formats: tuple[str, ...]) -> dict[str, Any]:
    """Times of `formats` and of cuDNN for one shape."""
    batch, length, heads, kv_heads, dim = shape
    q = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(batch, kv_heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    nbytes = KVFormat("bf16", dim).cache_bytes(batch, kv_heads, length)
    copies = range(-(-COLD_BYTES // nbytes))
    kvs = [
        torch.randn(2, batch, kv_heads, length, dim, dtype=torch.bfloat16, device="cuda") for _ in copies
    ]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        peer = replay_times(
            [lambda kv=kv: scaled_dot_product_attention(q, *kv, enable_gqa=True) for kv in kvs]
        )
    row: dict[str, Any] = {**shape._asdict(), "cudnn_bf16": peer}
    for name in formats:
        nbytes = KVFormat(name, dim).cache_bytes(batch, kv_heads, length)
        calls = []
        for cache in [filled_cache(name, shape) for _ in range(-(-COLD_BYTES // nbytes))]:

            def step(cache: PackedKVCache = cache) -> torch.Tensor:
                return torch.ops.tq_inductor.tq_append_attend(
                    cache.packed, q, new, new, cache.seq_length, cache.k_rotation, cache.v_rotation,
                    None, None, None, name, length, dim**-0.5,  # noqa: B023
                )  # fmt: skip

            calls.append(step)
        times = replay_times(calls)
        times["gigabytes_per_second"] = round(nbytes / times["median_us"] / 1e3, 1)
        times["share_of_floor"] = round(nbytes / FLOOR_TERABYTES / 1e6 / times["median_us"], 3)
        times["speed_vs_cudnn"] = round(peer["median_us"] / times["median_us"], 3)
        row[name] = times
        print(f"{tuple(shape)} {name}: {times}", flush=True)
    return row


def main() -> None:
    """Time all shapes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    result = {
        "what": "one decode step's attention, append included; full caches, cold L2",
        "environment": environment(args.commit),
        "copy_terabytes_per_second": copy_bandwidth(),
        "floor_terabytes_per_second": FLOOR_TERABYTES,
        "shapes": [time_shape(shape, FORMATS) for shape in SHAPES],
        "other_heads": [time_shape(shape, ("k4v4",)) for shape in OTHER_HEADS],
    }
    write_result("decode", result, args.out)


if __name__ == "__main__":
    main()
