"""Run the demo and keep its figures.

    python benchmarks/bench_demo.py [--out FOLDER] [--commit NAME]

Writes `demo.json`: bits per byte and bytes per token of both caches, time per generated token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evidence import RESULTS, environment, write_result

from tq_inductor.demo import run_demo


def main() -> None:
    """Run it and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    figures = run_demo()
    write_result("demo", {"environment": environment(args.commit), **figures}, args.out)


if __name__ == "__main__":
    main()
