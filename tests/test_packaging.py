"""The wheel is complete, and every way to install imports, beside Hugging Face's `kernels` too.

Our folder `kernels/` at the repository root bears the name of a distribution of theirs, which
transformers imports from if its metadata is found. With the root on `sys.path` ours must not win.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parents[1]
SHIPPED_AS = {
    "tq_inductor": "tq_inductor",
    "lowering": "tq_inductor/lowering",
    "kernels": "tq_inductor/kernels",
}
Cell = tuple[str, str, str]  # installed how, run where, with HF's kernels or without
CELLS: list[Cell] = [
    (install, place, hf)
    for install, place in [
        ("wheel", "elsewhere"),
        ("wheel", "root"),
        ("editable", "elsewhere"),
        ("editable", "root"),
        ("checkout", "root"),
    ]
    for hf in ("without_hf_kernels", "with_hf_kernels")
]

# A stand-in for HF's distribution: the names that transformers imports from it at load, in a version
# that it accepts (0.16 for transformers 5.17).
HF_VERSION = KERNELS_MIN_VERSION
HF_KERNELS = """
CUDAProperties = Device = LayerRepository = LocalLayerRepository = Mode = object
KernelizeFallback = ROCMProperties = object
get_kernel = kernelize = register_kernel_mapping = use_kernel_mapping = print
replace_kernel_forward_from_hub = print


def use_kernel_forward_from_hub(name):
    return lambda layer: layer


def use_kernelized_func(*functions):
    return lambda layer: layer
"""

# What one process checks; it prints where the modules came from.
CHECK = """
import json, sys
from importlib.metadata import entry_points

import torch

if sys.argv[1] == "checkout":  # nothing is installed that could name the backend to torch
    from tq_inductor.compiler import turboquant as backend
else:
    backend = "turboquant"
assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).tolist() == [2.0, 2.0]
for entry in entry_points(group="console_scripts", name="tq-inductor"):
    entry.load()

# `import transformers` is lazy; this is the code that imports from HF's kernels.
import transformers.models.llama.modeling_llama
import tq_inductor.cache, tq_inductor.kernels.bits, tq_inductor.lowering.rewrite
from transformers.utils import is_kernels_available

try:
    import kernels
except ModuleNotFoundError:
    kernels = None

ours = ["", ".cache", ".compiler", ".kernels.bits", ".lowering.rewrite"]
print(json.dumps({
    "files": [sys.modules["tq_inductor" + name].__file__ for name in ours],
    "kernels": getattr(kernels, "__file__", None),  # a bare folder has no file
    "used_by_transformers": is_kernels_available(),
}))
"""


@dataclass(frozen=True)
class Install:
    """An environment, and where in it the package's files lie."""

    python: Path
    package_parent: Path
    root: Path


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a command that must succeed."""
    # A PYTHONPATH or PYTHONSAFEPATH of the caller's would decide what is imported.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        shown = " ".join(str(part) for part in command)
        output = f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        pytest.fail(f"in {cwd}: {shown}\n{output}", pytrace=False)
    return done.stdout


def _copy_tree(target: Path) -> Path:
    """A copy of the checkout without what git ignores, for a build to leave its files in."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "shared")
    return shutil.copytree(ROOT, target, ignore=ignore)


@pytest.fixture(scope="module")
def built_tree(tmp_path_factory) -> Path:
    return _copy_tree(tmp_path_factory.mktemp("built") / "tq_inductor_checkout")


@pytest.fixture(scope="module")
def wheel(built_tree, tmp_path_factory) -> Path:
    """The wheel, built from the sdist as `python -m build` does: both must be complete."""
    out = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, built_tree, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """Links to all that the running environment has installed, less our package and HF's."""
    folder = tmp_path_factory.mktemp("others")
    for path in map(Path, sys.path):
        if path.name not in ("site-packages", "dist-packages") or not path.is_dir():
            continue
        for entry in path.iterdir():
            ours = "tq_inductor" in entry.name or re.match(r"kernels(-|$)", entry.name)
            if not ours and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def hf_kernels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf_kernels")
    info = folder / f"kernels-{HF_VERSION}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {HF_VERSION}\n"
    (info / "METADATA").write_text(metadata)
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(HF_KERNELS)
    return folder


@pytest.fixture(scope="module")
def installs(wheel, built_tree, others, tmp_path_factory) -> dict[str, Install]:
    """Name -> environment: the wheel, an editable install, and none, run from its checkout."""
    folder = tmp_path_factory.mktemp("installs")
    checkout = _copy_tree(folder / "clean_checkout")
    made = {}
    requirements = {"wheel": [wheel], "editable": ["--editable", built_tree], "checkout": []}
    for name, what in requirements.items():
        home = folder / name
        _run(sys.executable, "-m", "venv", "--without-pip", home, cwd=folder)
        python = home / "bin" / "python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(_run(python, "-c", where, cwd=folder).strip())
        (site / "others.pth").write_text(f"{others}\n")
        if what:
            flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
            _run(python, "-m", "pip", "install", *flags, *what, cwd=folder)
        root = built_tree if name == "editable" else checkout
        made[name] = Install(python, site if name == "wheel" else root, root)
    return made


@pytest.fixture(scope="module")
def checks(installs, hf_kernels, tmp_path_factory) -> Iterator[dict[Cell, Future[Any]]]:
    """Cell -> what its process printed; two run at a time, ahead of the tests that ask."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def check(install: str, place: str, hf: str) -> Any:
        cwd = installs[install].root if place == "root" else elsewhere
        env = {"PYTHONPATH": str(hf_kernels)} if hf == "with_hf_kernels" else {}
        # `python -c` puts the working directory first on sys.path.
        out = _run(installs[install].python, "-c", CHECK, install, cwd=cwd, **env)
        return json.loads(out.splitlines()[-1])

    pool = ThreadPoolExecutor(2)
    yield {cell: pool.submit(check, *cell) for cell in CELLS}
    pool.shutdown(cancel_futures=True)


def _wheel_metadata(wheel: Path) -> PathDistribution:
    (info,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(info)


def test_wheel_holds_every_source_file(wheel, built_tree):
    expected = set()
    for folder, shipped_as in SHIPPED_AS.items():
        source = built_tree / folder
        files = [*source.rglob("*.py"), *source.rglob("py.typed"), *source.glob("demo_model/*")]
        expected |= {f"{shipped_as}/{file.relative_to(source).as_posix()}" for file in files}
    assert {"tq_inductor/py.typed", "tq_inductor/demo_model/model.safetensors"} <= expected
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == expected


def test_wheel_has_one_top_level_name(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tq_inductor"}


def test_wheel_declares_its_entry_points(wheel):
    assert set(_wheel_metadata(wheel).entry_points) == {
        EntryPoint("turboquant", "tq_inductor.compiler:turboquant", "torch_dynamo_backends"),
        EntryPoint("tq-inductor", "tq_inductor.cli:main", "console_scripts"),
    }


@pytest.mark.parametrize(("install", "place", "hf"), CELLS)
def test_imports_and_compiles(install, place, hf, installs, hf_kernels, checks):
    found = checks[install, place, hf].result()
    parent = installs[install].package_parent if place == "elsewhere" else installs[install].root
    strays = [file for file in found["files"] if not Path(file).is_relative_to(parent)]
    assert not strays, f"not from {parent}"
    installed = hf == "with_hf_kernels"
    assert found["kernels"] == (str(hf_kernels / "kernels" / "__init__.py") if installed else None)
    assert found["used_by_transformers"] is installed
