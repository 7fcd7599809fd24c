"""Run `make test-gpu` with this Python and keep its closing line.

    python benchmarks/record_gpu_tests.py [--out FOLDER] [--commit NAME]

Writes `gpu_tests.json`; exits with the status of the tests.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from evidence import RESULTS, environment, write_result


def main() -> int:
    """Run them and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    command = ["make", "test-gpu", f"PYTHON={sys.executable}"]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        for line in tests.stdout or ():
            print(line, end="", flush=True)  # what was said stays, if the time is up before the end
            lines.append(line)
    closing = [line.strip("= \n") for line in lines if " passed" in line or " failed" in line]
    result = {
        "what": " ".join(command[:2]),
        "environment": environment(args.commit),
        "exit_status": tests.returncode,
        "summary": closing[-1] if closing else "no summary",
    }
    write_result("gpu_tests", result, args.out)
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
