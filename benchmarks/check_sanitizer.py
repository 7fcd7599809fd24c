"""Run the small kernel cases under NVIDIA's compute-sanitizer.

    python benchmarks/check_sanitizer.py [--out FOLDER] [--commit NAME] [--processes N]

memcheck finds accesses out of bounds and misaligned ones, racecheck hazards between threads that share
memory. Writes `sanitizer.json`: for each tool the cases that ran, those that failed and the errors that it
counted. Needs an NVIDIA GPU and the CUDA toolkit.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from evidence import RESULTS, environment, write_result

CHECKS = Path(__file__).parent.parent / "tests" / "kernel_checks.py"
TOOLS = ("memcheck", "racecheck")
TOOLKIT = "/usr/local/cuda/bin/compute-sanitizer"  # where it is if it is not on the path


def run_tool(sanitizer: str, tool: str, processes: int) -> dict[str, Any]:
    """All small cases under `tool`, dealt out to `processes` processes."""
    # Triton's kernels are compiled in a process that needs no sanitizer.
    command = [sanitizer, "--tool", tool, "--target-processes", "application-only", "--print-limit", "10"]
    running = [
        subprocess.Popen(
            [*command, sys.executable, str(CHECKS), "--small", "--shard", f"{i}/{processes}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    outputs = [process.communicate()[0] for process in running]
    printed = "\n".join(outputs)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    if len(summaries) < processes:
        raise RuntimeError(f"{tool} ended without a summary:\n{printed[-4000:]}")
    for output, errors in zip(outputs, map(int, summaries), strict=True):
        if errors:
            print(output)
    return {
        "cases": len(re.findall(r"s\) (?:ok|FAILED)", printed)),
        "failed": [line for line in printed.splitlines() if "FAILED" in line],
        "errors": sum(map(int, summaries)),
    }


def main() -> int:
    """Run both tools and write the result; 1 if either found anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--processes", type=int, default=8)
    args = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or TOOLKIT
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = {
        "what": "kernel_checks.py --small under compute-sanitizer",
        "environment": environment(args.commit),
        "sanitizer": version.split("Version ")[-1].split()[0],
    }
    for tool in TOOLS:
        result[tool] = run_tool(sanitizer, tool, args.processes)
        print(tool, result[tool])
    write_result("sanitizer", result, args.out)
    return int(any(result[tool]["errors"] or result[tool]["failed"] for tool in TOOLS))


if __name__ == "__main__":
    sys.exit(main())
