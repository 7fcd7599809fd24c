"""`tq-inductor bench` with the shapes that the documentation speaks of, on a GPU.

    python benchmarks/bench_generate.py [--out FOLDER] [--commit NAME] [--model M ...] [--cache C ...]
                                        [--shapes N] [--time-limit S] [--stop-after S]

Speed and memory over context (batch 1 and 8), tokens/s over batch (8,192 tokens), and the largest
context that fits, for each cache. Writes `generate_MODEL.json` for each model, into which every finished
point goes at once; run again, it goes on. `tq-inductor plot` draws them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from evidence import RESULTS, environment

from tq_inductor.bench import run_bench
from tq_inductor.bench_point import FULL, Point

CACHES = ("k4v4", "static", "static-inductor", "dynamic", "quantized", "k8v4")
# The shapes with goals first, then context, then batch; None is the largest context.
SHAPES: tuple[tuple[int, int | None], ...] = (
    *((8, 32768), (32, 8192), (1, 32768)),
    *((1, 2048), (1, 8192), (1, 131072)),
    *((8, 2048), (8, 8192), (8, 131072)),
    *((4, 8192), (16, 8192), (64, 8192)),
    *((1, None), (8, None)),
)
NEW_TOKENS = 24
# Tokens of a batch that a GPU reads at once; longer prompts are read in smaller chunks, since transformers
# makes a mask of chunk times context for each row.
AT_ONCE, CHUNK = 1 << 18, 1 << 16


def prefill_tokens(batch: int, context: int | None) -> int:
    """Of this shape, as in `Point`."""
    return AT_ONCE if batch * (context or 0) <= AT_ONCE else CHUNK


def main() -> None:
    """Measure what the result files do not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--model", nargs="+", choices=tuple(FULL), default=tuple(FULL))
    parser.add_argument("--cache", nargs="+", default=CACHES)
    parser.add_argument("--shapes", type=int, metavar="N", help="only the first N shapes")
    parser.add_argument("--time-limit", type=float, default=300)
    parser.add_argument("--stop-after", type=float, help="start no new point after so many seconds")
    args = parser.parse_args()
    started = time.monotonic()
    for model in args.model:
        points = [
            Point(model, "full", cache, batch, context, NEW_TOKENS, prefill_tokens(batch, context))
            for cache in args.cache
            for batch, context in SHAPES[: args.shapes]
        ]
        left = None if args.stop_after is None else args.stop_after - (time.monotonic() - started)
        run_bench(
            points, args.out / f"generate_{model}.json", environment(args.commit),
            time_limit=args.time_limit, stop_after=left,
        )  # fmt: skip


if __name__ == "__main__":
    main()
