"""What every result file says of the machine, and how things are timed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment(commit: str | None) -> dict[str, Any]:
    """GPU, driver, versions and commit (`commit`, else git's, with `+` if the tree has changes)."""
    if commit is None:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
        )
        commit = described.stdout.strip() or "unknown"
    found: dict[str, Any] = {"commit": commit, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        found[package] = metadata.version(package)
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        found |= {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}
    else:
        found |= {"cpu_threads": os.cpu_count()}
    return found


def installed(*distributions: str) -> dict[str, str | None]:
    """Distribution -> version, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(distributions)
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def replay_times(calls: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Microseconds of one call in a CUDA graph over all `calls` (enough of them empty the L2 cache).

    Returns the median of 15 replays and their spread (largest minus smallest).
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 20 // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for call in calls:
                call()
    times = []
    for _ in range(18):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    times = times[3:]
    return {"median_us": round(statistics.median(times), 2), "spread_us": round(max(times) - min(times), 2)}


def copy_bandwidth() -> float:
    """TB/s of a large device-to-device copy, bytes read and written."""
    source, target = torch.empty(2, 2 << 30, dtype=torch.uint8, device="cuda").random_()
    microseconds = replay_times([lambda: target.copy_(source)])["median_us"]
    return round(2 * source.numel() / microseconds / 1e6, 3)


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> None:
    """Overwrite `folder/name.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
