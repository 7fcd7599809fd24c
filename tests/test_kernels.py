"""The Triton kernels against the reference; the cases and checks are in `kernel_cases.py`.

Without a GPU they run in Triton's interpreter, one subprocess for each kernel family, because Triton
decides on the interpreter when a kernel is decorated. With one, the longer list runs in this process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("kernel_cases.py")
GROUPS = ("fp8 store", "dequantize", "decode append attend", "varlen")


def run_script(*arguments: str) -> None:
    """Run `kernel_cases.py` in a new process; its output is the failure message."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("groups", GROUPS)
def test_kernels_in_the_interpreter(groups):
    run_script("--interpret", *groups.split())


def test_kernels_compile_for_every_target():
    run_script("--compile")


def gpu_cases():
    """`(check, case)` of the longer list; none without a GPU, since the kernels would be imported."""
    if not torch.cuda.is_available():
        return [pytest.param(None, None, id="no GPU")]
    spec = importlib.util.spec_from_file_location("kernel_cases", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_cases"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return [
        pytest.param(check, case, id=f"{group}-{case}")
        for group, (check, _, cases) in module.GROUPS.items()
        for case in cases
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("check", "case"), gpu_cases())
def test_kernels_on_the_gpu(check, case):
    torch.manual_seed(0)
    check(case, "cuda")
