"""Time one decode step's attention over packed and 16-bit caches, with cuDNN's bf16 attention beside it.

    python benchmarks/bench_decode.py [--out FOLDER] [--commit NAME]

A step of ours appends the new token, rotates queries and output, and reduces the splits; cuDNN's only
attends. Needs an NVIDIA GPU. Writes `decode.json`: medians of CUDA-graph replays over caches that together
exceed the L2 cache, the spread, copy bandwidth, the ratio of each to cuDNN, what caches that are filled to
a quarter take of the time of full ones, and other packages' attention over 16-bit and fp8 caches. Caches
keep the exact tokens that a `TurboQuantCache` of their format does by default, but those called
"k4v4-exact" and the like. `decode_plot.py` draws it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from decode_peers import COLD_BYTES, time_peers
from evidence import RESULTS, copy_bandwidth, environment, replay_times, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tq_inductor import KVFormat
from tq_inductor.layer_formats import exact_tokens
from tq_inductor.storage import PackedStorage


class Shape(NamedTuple):
    """Sizes of one attention, one new token for each row of the batch."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


WITHOUT = "-exact"
FORMATS = (
    *("k8v8", "k8v4", "k4v4", "k4v2", "k3v3", "k2v2", "bf16"),
    *(name + WITHOUT for name in ("k4v4", "k4v2", "k3v3", "k2v2")),
)
SHAPES = (
    *(Shape(*sizes) for sizes in ((8, 32768), (1, 131072), (32, 8192), (64, 4096))),
    *(Shape(1, length) for length in (2048, 4096, 8192, 32768)),
)
OTHER_HEADS = (
    Shape(8, 32768, 28, 4),
    Shape(8, 32768, 64, 8),
    Shape(8, 16384, 16, 16),
    Shape(8, 32768, 32, 8, 64),
    Shape(8, 16384, 32, 8, 256),
)
PEER_SHAPES = (Shape(8, 32768), Shape(64, 4096), Shape(1, 32768))
FLOOR_TERABYTES = 4.3  # per second: what cuDNN reads its bytes at


def filled_cache(name: str, shape: Shape, length: int) -> PackedStorage:
    """A cache of random bytes with `length` tokens: codes of any value, scales of a few magnitudes."""
    cache = PackedStorage()
    name, without, _ = name.partition(WITHOUT)
    exact = (0, 0) if without else exact_tokens(name, None, None)
    fmt = KVFormat(name, shape.head_dim)
    cache.allocate(fmt, shape.batch, shape.kv_heads, shape.length, torch.bfloat16, "cuda", *exact)
    cache.packed.random_(0, 64)  # as bf16 and as scales these bytes are small finite numbers
    cache.seq_length.fill_(length)
    return cache


def time_cache(name: str, shape: Shape, filled: float = 1.0) -> dict[str, float]:
    """Time of one step over caches that are `filled` to this fraction."""
    batch, length, heads, kv_heads, dim = shape
    q = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(batch, kv_heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    tokens = int(length * filled)
    fmt = KVFormat(name.removesuffix(WITHOUT), dim)
    nbytes = fmt.cache_bytes(batch, kv_heads, tokens)

    def step(cache: PackedStorage) -> torch.Tensor:
        return torch.ops.tq_inductor.tq_append_attend(
            cache.packed, q, new, new, cache.seq_length, cache.k_rotation, cache.v_rotation,
            None, None, None, fmt.name, length, dim**-0.5, *cache._beside,
        )  # fmt: skip

    caches = [filled_cache(name, shape, tokens) for _ in range(-(-COLD_BYTES // nbytes))]
    times = replay_times([lambda cache=cache: step(cache) for cache in caches])
    times["gigabytes_per_second"] = round(nbytes / times["median_us"] / 1e3, 1)
    times["share_of_floor"] = round(nbytes / FLOOR_TERABYTES / 1e6 / times["median_us"], 3)
    return times


def time_cudnn(shape: Shape) -> dict[str, float]:
    """Time of cuDNN's attention over full bf16 caches."""
    batch, length, heads, kv_heads, dim = shape
    q = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    nbytes = KVFormat("bf16", dim).cache_bytes(batch, kv_heads, length)
    kvs = [
        torch.randn(2, batch, kv_heads, length, dim, dtype=torch.bfloat16, device="cuda")
        for _ in range(-(-COLD_BYTES // nbytes))
    ]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return replay_times(
            [lambda kv=kv: scaled_dot_product_attention(q, *kv, enable_gqa=True) for kv in kvs]
        )


def time_shape(shape: Shape, formats: tuple[str, ...]) -> dict[str, Any]:
    """Times of `formats` and of cuDNN for one shape."""
    row: dict[str, Any] = {**shape._asdict(), "cudnn_bf16": time_cudnn(shape)}
    for name in formats:
        row[name] = times = time_cache(name, shape)
        times["speed_vs_cudnn"] = round(row["cudnn_bf16"]["median_us"] / times["median_us"], 3)
        print(f"{tuple(shape)} {name}: {times}", flush=True)
    return row


def time_quarter(name: str, full: dict[str, Any]) -> dict[str, Any]:
    """Time of a step over caches filled to a quarter, and what that is of the time `full` says."""
    times = time_cache(name, SHAPES[0], 0.25)
    return {**times, "of_full": round(times["median_us"] / full[name]["median_us"], 3)}


def main() -> None:
    """Time all shapes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    shapes = [time_shape(shape, FORMATS) for shape in SHAPES]
    result = {
        "what": "one decode step's attention, append included; full caches, cold L2",
        "environment": environment(args.commit),
        "copy_terabytes_per_second": copy_bandwidth(),
        "floor_terabytes_per_second": FLOOR_TERABYTES,
        "shapes": shapes,
        "filled_to_a_quarter": {name: time_quarter(name, shapes[0]) for name in ("k4v4", "bf16")},
        "other_heads": [time_shape(shape, ("k4v4",)) for shape in OTHER_HEADS],
        "peers": [{**shape._asdict(), **time_peers(*shape)} for shape in PEER_SHAPES],
    }
    write_result("decode", result, args.out)


if __name__ == "__main__":
    main()
