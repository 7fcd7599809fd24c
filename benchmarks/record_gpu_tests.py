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
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    closing = [
        line.strip("= ") for line in done.stdout.splitlines() if " passed" in line or " failed" in line
    ]
    result = {
        "what": " ".join(command[:2]),
        "environment": environment(args.commit),
        "exit_status": done.returncode,
        "summary": closing[-1] if closing else "no summary",
    }
    write_result("gpu_tests", result, args.out)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
