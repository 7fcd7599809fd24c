"""The Triton kernels against the reference; `kernel_cases.py` has the cases, `kernel_checks.py` the checks.

Without a GPU they run in Triton's interpreter, one subprocess for each kernel family, because Triton
decides on the interpreter when a kernel is decorated. With one, the longer list runs in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS, COMPILE = (Path(__file__).with_name(name) for name in ("kernel_checks.py", "kernel_compile.py"))
TARGETS = ("80", "90", "100", "gfx942", "86 89 120")  # all of kernel_compile's
GROUPS = (
    "fp8 store",
    "dequantize",
    "decode append",
    "masks attend",
    "prefill",
    "pieces",
    "exact slots",
    "varlen",
)


def run_script(script: Path, *arguments: str) -> None:
    """Run it in a new process; its output is the failure message."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("groups", GROUPS)
def test_kernels_in_the_interpreter(groups):
    run_script(CHECKS, "--interpret", *groups.split())


@pytest.mark.parametrize("targets", TARGETS)
def test_kernels_compile(targets):
    run_script(COMPILE, *targets.split())


def gpu_cases():
    """`(check, case)` of the longer list; none without a GPU, since the kernels would be imported."""
    if not torch.cuda.is_available():
        return [pytest.param(None, None, id="no GPU")]
    import kernel_checks

    return [
        pytest.param(check, case, id=f"{group}-{case}")
        for group, (check, _, cases) in kernel_checks.GROUPS.items()
        for case in cases
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("check", "case"), gpu_cases())
def test_kernels_on_the_gpu(check, case):
    torch.manual_seed(0)
    check(case, "cuda")
