"""Imports run one way, modules stay short and are named for what they do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUBPACKAGE = {"tq_inductor": "", "lowering": "lowering", "kernels": "kernels"}  # folder: where

# What a module may import of ours; the first pattern that fits its name counts. Names leave out
# `tq_inductor.`, and "tq_inductor" is the package itself.
MAY_IMPORT = {
    "tq_inductor": [],
    "errors": [],
    "codebook": [],
    "rotation": [],
    "corpus": [],
    "beside": [],
    "format": ["errors"],
    "codec": ["codebook", "format"],
    "reference_beside": ["beside"],
    "reference_pages": [],
    "reference_masks": [],
    "reference": ["beside", "codec", "format", "reference_beside", "reference_masks", "reference_pages"],
    "reference_attention": ["attention.arguments", "attention.call", "reference", "reference_masks"],
    "kernels.pages": ["format"],
    "kernels.slots": ["kernels.pages"],
    "kernels.segments": ["beside"],
    "kernels.key_means": ["kernels.bits", "kernels.pages", "kernels.segments", "beside"],
    "kernels.mean_scores": ["kernels.scores", "kernels.segments"],
    "kernels.store": [
        *("kernels.bits", "kernels.key_means", "kernels.pages", "kernels.slots"),
        "kernels.store_prompt",
        *("beside", "format"),
    ],
    "kernels.store_prompt": [
        *("kernels.bits", "kernels.prompt_codes", "kernels.prompt_sums", "kernels.prompt_transform"),
        *("kernels.segments", "kernels.slots", "kernels.warp_hadamard", "beside", "format"),
    ],
    "kernels.prompt_transform": ["kernels.warp_tiles", "format"],
    "kernels.scores": [],
    "kernels.exact": ["kernels.scores", "kernels.warp_operands", "beside"],
    "kernels.unpacked": ["kernels.bits", "kernels.exact", "kernels.scores", "kernels.varlen", "beside"],
    "kernels.decode_query": [
        *("kernels.bits", "kernels.key_means", "kernels.scores", "kernels.store", "beside", "format"),
    ],
    "kernels.decode_reduce": ["kernels.bits", "kernels.exact", "kernels.scores"],
    "kernels.decode_warp": [
        *("kernels.bits", "kernels.decode_query", "kernels.decode_reduce", "kernels.exact"),
        *("kernels.pages", "kernels.scores", "kernels.segments", "kernels.unpacked"),
        *("kernels.warp_hadamard", "kernels.warp_means", "kernels.warp_operands", "kernels.warp_share"),
        *("kernels.warp_tiles", "beside", "format"),
    ],
    "kernels.warp_means": ["kernels.scores", "kernels.segments", "kernels.warp_operands"],
    "kernels.warp_operands": [],
    "kernels.warp_share": [],
    "kernels.centroids": ["kernels.bits"],
    "kernels.dequantize": [
        *("kernels.bits", "kernels.centroids", "kernels.pages", "kernels.segments", "beside", "format"),
    ],
    "kernels.prefill": [
        *(
            "kernels.bits",
            "kernels.centroids",
            "kernels.decode_query",
            "kernels.decode_reduce",
            "kernels.exact",
        ),
        *("kernels.mean_scores", "kernels.scores", "kernels.segments", "beside", "format"),
    ],
    "kernels.prefill_pieces": [
        *("kernels.bits", "kernels.centroids", "kernels.decode_query", "kernels.decode_reduce"),
        *(
            "kernels.exact",
            "kernels.mean_scores",
            "kernels.prefill",
            "kernels.prefill_wgmma",
            "kernels.scores",
            "kernels.segments",
            "kernels.wgmma_tiles",
            "beside",
            "format",
        ),
    ],
    "kernels.attend_wgmma": ["kernels.bits", "kernels.scores", "kernels.wgmma_tiles"],
    "kernels.prefill_wgmma": [
        *("kernels.bits", "kernels.prefill", "kernels.scores", "kernels.segments", "kernels.wgmma_tiles"),
    ],
    "kernels.wgmma_tiles": ["kernels.prefill", "kernels.scores", "kernels.segments"],
    "kernels.append": ["kernels.*", "beside", "format", "results"],
    "kernels.decode_tile": [
        *("kernels.bits", "kernels.decode_rows", "kernels.pages", "kernels.scores", "kernels.segments"),
    ],
    "kernels.decode": ["kernels.*", "beside", "codebook", "format", "results"],
    "kernels.*": ["kernels.bits", "kernels.pages", "beside", "codebook", "format"],
    "foreign_kv": [],
    "op_checks": ["beside", "errors", "format"],
    "results": [],
    "packed_ops": ["beside", "format", "op_checks", "results"],
    "attention_ops": ["attention.*", "foreign_kv", "op_checks", "results"],
    "ops": ["attention_ops", "packed_ops"],
    "storage": ["beside", "errors", "format", "ops", "rotation"],
    "layer_formats": ["errors", "format"],
    "cache": ["cache_layers", "errors", "format", "layer_formats", "storage"],
    "cache_layers": ["format", "storage"],
    "attention": [],
    "attention.call": [],
    "attention.select": ["attention.*", "errors"],
    "attention.limits": ["attention.call"],
    "attention.arguments": ["attention.call"],
    "attention.order": ["attention.call"],
    "attention.machine": ["attention.limits"],
    "attention.packages": [],
    "attention.own_kernels": ["attention.call"],
    "attention.flashinfer_modules": [],
    "attention.flashinfer_plans": ["attention.arguments", "attention.flashinfer_modules"],
    "attention.flashinfer": [
        *("attention.arguments", "attention.call", "attention.limits", "attention.machine"),
        *("attention.packages", "attention.flashinfer_*"),
    ],
    # A backend knows itself, never another.
    "attention.*": [
        "attention.arguments",
        "attention.call",
        "attention.limits",
        "attention.machine",
        "attention.own_kernels",
        "attention.packages",
        "errors",
    ],
    "report": ["attention.*"],
    "options": ["attention.*", "errors"],
    "lowering.*": ["lowering.*", "attention.*", "format", "ops", "report", "storage"],
    "compiler": ["lowering.*", "errors", "ops", "options", "report"],
    "cli": ["*"],
    "argument_types": ["errors", "format", "layer_formats"],
    "demo": ["*"],
    "clock": [],
    "generate_text": ["cache", "clock", "errors"],
    "bench_point": ["cache", "clock"],
    "bench": ["bench_point", "errors"],
    "plot": ["errors"],
    "look_ups": [],
    "balance": ["beside", "errors"],
    "calibrate": [
        "cache",
        "cache_layers",
        "errors",
        "format",
        "generate_text",
        "layer_formats",
        "look_ups",
    ],
    "lm_eval_model": ["beside", "cache", "layer_formats"],
    "plot_policy": ["plot"],
}
# What it may import besides, but only inside a function: loaded when an op is first called.
MAY_IMPORT_LATE = {
    "packed_ops": ["reference", "kernels.*"],
    "attention_ops": ["reference", "reference_attention", "reference_masks", "kernels.*"],
}

# Who may import these distributions at all, and who when loaded (others: inside a function). The
# compiler works without Hugging Face, and registering the ops needs no Triton.
ANYWHERE = {
    "transformers": [
        "balance",
        "cache",
        "cache_layers",
        "calibrate",
        "cli",
        "demo",
        "clock",
        "generate_text",
        "bench_point",
    ],
}
WHEN_LOADED = {"triton": ["kernels.*"]}

VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
MAX_LINES, MAX_KERNEL_LINES = 350, 450


@dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name."""

    target: str
    line: int
    late: bool  # inside a function


def _modules() -> dict[str, Path]:
    """Full dotted name -> file, for all source modules."""
    found = {}
    for folder, subpackage in SUBPACKAGE.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join(["tq_inductor", *filter(None, [subpackage]), *parts])
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _short(name: str) -> str:
    return name.removeprefix("tq_inductor.")


def _fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _imports(module: str) -> Iterator[Import]:
    """All imports of a module, resolved; `from . import x` counts as `x` if that is a module."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, late)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in MODULES else base, node.lineno, late)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    yield from visit(ast.parse(path.read_text("utf-8")), late=False)


def _ours(target: str) -> bool:
    return target.split(".")[0] == "tq_inductor"


def test_sources_are_found():
    # One of each folder: over a wrong path the tests below would pass.
    assert {"ops", "attention.call", "lowering.rewrite", "kernels.bits"} <= {*map(_short, MODULES)}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module):
    name = _short(module)
    row = next((pattern for pattern in MAY_IMPORT if fnmatchcase(name, pattern)), None)
    assert row, f"{name} has no row in MAY_IMPORT: say there what it may import"
    allowed, late_too = MAY_IMPORT[row], MAY_IMPORT_LATE.get(name, [])
    wrong = []
    for found in _imports(module):
        target = _short(found.target)
        if not _ours(found.target) or _fits(target, allowed + late_too * found.late):
            continue
        rule = f"it may import {', '.join(allowed) or 'nothing of ours'}"
        if late_too:
            rule += f"; inside functions also {', '.join(late_too)}"
        where = f"{MODULES[module].relative_to(ROOT)}:{found.line}"
        wrong.append(f"{where}: {name} imports {target}; {rule}")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle():
    graph = {name: {i.target for i in _imports(name)} & set(MODULES) for name in MODULES}
    TopologicalSorter(graph).prepare()  # CycleError names the cycle


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_distributions_stay_where_they_belong(module):
    name, wrong = _short(module), []
    for found in _imports(module):
        top = found.target.split(".")[0]
        where = f"{MODULES[module].relative_to(ROOT)}:{found.line}: {name} imports {top}"
        if top in ANYWHERE and not _fits(name, ANYWHERE[top]):
            wrong.append(f"{where}; only {', '.join(ANYWHERE[top])} may")
        if top in WHEN_LOADED and not found.late and not _fits(name, WHEN_LOADED[top]):
            wrong.append(f"{where}; outside a function only {', '.join(WHEN_LOADED[top])} may")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_are_short_and_named_for_what_they_do(module):
    vague = VAGUE_NAMES & set(module.split("."))
    assert not vague, f"{module}: name it for what it does, not {', '.join(vague)}"
    limit = MAX_KERNEL_LINES if _fits(_short(module), ["kernels.*"]) else MAX_LINES
    lines = len(MODULES[module].read_text("utf-8").splitlines())
    assert lines <= limit, f"{module} has {lines} lines, more than {limit}: split it"


def _python(code: str, **env: str) -> str:
    """Standard output of a fresh process in the repository root."""
    # A TORCH_LOGS or PYTHONPATH of the caller's would decide the result.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TORCH_LOGS"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{code}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'triton'}"
    out = _python(f"import sys, tq_inductor; print(sorted({heavy} & set(sys.modules)))")
    assert out.strip() == "[]"


def test_the_ops_are_there_once_the_package_is_imported_after_torch():
    show = "import torch, tq_inductor; print(torch.ops.tq_inductor.tq_store)"
    assert "tq_inductor.tq_store" in _python(show)
    for earlier in ({}, {"TORCH_LOGS": "tq_inductor"}):
        assert "tq_inductor.tq_store" in _python(f"from tq_inductor import KVFormat; {show}", **earlier)


def test_torch_logs_may_name_the_package():
    # TORCH_LOGS walks all that the package's path holds, in the middle of `import torch`; in a
    # checkout that path must not hold the package itself, and so on down without end.
    show = "print([name for name in sys.modules if name.startswith('tq_inductor')])"
    out = _python(f"import sys, torch; {show}", TORCH_LOGS="tq_inductor")
    assert "'tq_inductor'" in out
    assert "tq_inductor.tq_inductor" not in out
