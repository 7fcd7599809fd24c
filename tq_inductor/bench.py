"""`tq-inductor bench`: speed, memory and compile time of caches, ours and transformers', in one run.

Each (model, cache) is measured in a process of its own, so that one that dies takes nothing with it. A
finished point is in the result file at once, and skipped when the command is run again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from itertools import groupby, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .bench_point import FULL, Point, clean_up, is_out_of_memory, measure
from .errors import UsageError


def machine() -> dict[str, Any]:
    """Versions, and the GPU or the number of CPU threads."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        found[package] = metadata.version(package)
    gpu = torch.cuda.is_available()
    found |= {"gpu": torch.cuda.get_device_name()} if gpu else {"cpu_threads": torch.get_num_threads()}
    return found


def grid(
    models: Sequence[str] | None,
    size: str | None,
    caches: Sequence[str] | None,
    batches: Sequence[int] | None,
    contexts: Sequence[int] | None,
    new_tokens: int,
    prefill_tokens: int,
    largest: bool,
) -> list[Point]:
    """All combinations, `largest` adding the search for the largest context.

    What is None is what a GPU can do in an hour, or a CPU in a minute.
    """
    gpu = torch.cuda.is_available()
    models = models or (tuple(FULL) if gpu else ("llama",))
    caches = caches or ("dynamic", "static-inductor", "static", "k4v4")
    batches = batches or ((1, 8, 32) if gpu else (1,))
    lengths: list[int | None] = [*(contexts or ((2048, 8192, 32768) if gpu else (64, 128)))]
    return [
        Point(model, size or ("full" if gpu else "tiny"), cache, batch, length, new_tokens, prefill_tokens)
        for model, cache, batch, length in product(models, caches, batches, lengths + [None] * largest)
    ]


def run_bench(
    points: Iterable[Point],
    out: Path,
    environment: dict[str, Any] | None = None,
    *,
    time_limit: float = 600,
    stop_after: float | None = None,
) -> list[dict[str, Any]]:
    """Measure all points that `out` does not hold yet; returns its rows.

    Args:
        points: what to measure.
        out: the JSON file, `{"environment": ..., "points": [...]}`.
        environment: what it says of the machine; `machine()` unless given.
        time_limit: seconds for one point, after which its process is ended.
        stop_after: start no new point after so many seconds; run again to go on.

    Raises:
        UsageError: `out` was measured elsewhere or with other versions, or is something else.
    """
    environment = environment or machine()
    rows = _earlier_rows(out, environment)
    done = set(map(_point, rows))
    points = list(dict.fromkeys(points))
    console = Console()
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(points), completed=sum(point in done for point in points))
        left = [point for point in points if point not in done]
        for _, group in groupby(left, key=lambda point: (point.model, point.size, point.cache)):
            with Worker() as worker:
                for point in group:
                    if stop_after is not None and time.monotonic() - start > stop_after:
                        console.print(
                            f"stopped after {stop_after:g} s; run the same command again to go on"
                        )
                        return rows
                    progress.update(task, description=_name(point))
                    row = {**asdict(point), **worker.measure(point, time_limit)}
                    rows.append(row)
                    _write(out, {"environment": environment, "points": rows})
                    console.print(f"{_name(point)}: {_figures(row)}", highlight=False, markup=False)
                    progress.advance(task)
    console.print(f"{len(rows)} points in {out}")
    return rows


class Worker:
    """A process that measures points; one that died or took too long is replaced by the next call."""

    def __init__(self) -> None:
        # Not forked: CUDA does not survive that.
        self.context = multiprocessing.get_context("spawn")
        self.process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def measure(self, point: Point, time_limit: float) -> dict[str, Any]:
        """The point's figures, or `{"error": why there are none}`."""
        if self.process is None:
            self.connection, theirs = self.context.Pipe()
            self.process = self.context.Process(target=serve, args=(theirs,))
            self.process.start()
            theirs.close()
        self.connection.send(point)
        try:
            if self.connection.poll(time_limit):
                return self.connection.recv()
            error = f"took longer than {time_limit:g} s"
        except EOFError:
            self.process.join()
            error = f"the process died with exit code {self.process.exitcode}"
        self.end()
        return {"error": error}

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
            self.process = None


def serve(connection: Connection) -> None:
    """Measure points as they come, until the other side is gone."""
    while True:
        try:
            point = connection.recv()
        except EOFError:
            return
        connection.send(attempt(point))
        clean_up()


def attempt(point: Point) -> dict[str, Any]:
    """`measure`, or the error that it ended in: the other points are still wanted."""
    try:
        return measure(point)
    except Exception as error:
        if is_out_of_memory(error):
            return {"error": "out of memory"}
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def _earlier_rows(out: Path, environment: dict[str, Any]) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    try:
        earlier = json.loads(out.read_text())
        measured_in, rows = dict(earlier["environment"]), list(earlier["points"])
        for row in rows:
            _point(row)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{out} is no result of tq-inductor bench ({error!r}): name another file, or delete this one"
        ) from error
    changed = {
        key: (measured_in.get(key), environment.get(key))
        for key in {*measured_in, *environment}
        if measured_in.get(key) != environment.get(key)
    }
    if changed:
        said = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in sorted(changed.items()))
        raise UsageError(
            f"{out} was measured elsewhere: {said}. Figures of one file are of one machine: name another "
            "file, or delete this one."
        )
    return rows


def _point(row: dict[str, Any]) -> Point:
    """What a row is of."""
    return Point(**{field.name: row[field.name] for field in fields(Point)})


def _write(out: Path, result: dict[str, Any]) -> None:
    """Replace the file as a whole: an interruption leaves the old one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, out)


def _name(point: Point) -> str:
    context = "largest context" if point.context is None else f"{point.context:,} tokens"
    return f"{point.model}, {point.cache}, batch {point.batch}, {context}"


def _figures(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    if "largest_context" in row:
        largest = row["largest_context"]
        return "not known without a GPU" if largest is None else f"{largest:,} tokens"
    compiled = "" if row["compile_s"] is None else f", compiled in {row['compile_s']} s"
    return (
        f"{row['step_ms']} ms a step, {row['tokens_per_s']:,} tokens/s, first token after "
        f"{row['first_token_s']} s, peak {row['peak_bytes'] / 2**30:.2f} GiB{compiled}"
    )
