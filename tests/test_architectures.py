"""Every architecture of `architectures.py`, rewritten, gives what it gives without, compiled no oftener.

Graphs are rewritten and run as they are: Inductor, most of a compilation's time, is in
`test_with_inductor` only.
"""

import json

import pytest
import torch
from architecture_runs import DECISIONS, TABLE, Recorder, compare, run, runs_of, versions, with_table
from architectures import ARCHITECTURES

RECORDED = json.loads(DECISIONS.read_text())
RUNS = [(a.name, run_name) for a in ARCHITECTURES.values() for run_name in runs_of(a)]
GENERATORS = [a.name for a in ARCHITECTURES.values() if a.generates]


@pytest.mark.parametrize(("name", "run_name"), RUNS)
def test_rewritten_equals_eager(name, run_name):
    found = compare(ARCHITECTURES[name], run_name)
    # Before our backend is called, Dynamo does the same for every backend; after that it compiles
    # again only for guards. So without new guards, graphs and breaks are as many as with Inductor.
    assert found.guards == []
    if found.plain:
        assert found.rewritten.compiled == found.plain.compiled
    if RECORDED["versions"] == versions():
        assert found.record == RECORDED["architectures"][name][run_name], "see architecture_runs.py"
    if found.record["fault"]:
        assert found.rewritten.error or found.rewritten.equals(found.plain)
        assert run_name != "TurboQuantCache"
        pytest.skip(f"without the rewriting too: {found.record['fault']}")
    assert found.rewritten.equals(found.uncompiled)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_lossless_cache_gives_transformers_own_tokens(name):
    transformers_own, ours = (
        run(ARCHITECTURES[name], cache, dtype=torch.bfloat16) for cache in ("DynamicCache", "lossless")
    )
    assert (transformers_own.error, ours.error) == ("", "")
    assert ours.equals(transformers_own)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("name", "run_name"), [x for x in RUNS if x[1] not in ("unpadded", "DynamicCache")]
)
def test_rewritten_equals_eager_on_a_gpu(name, run_name):
    backend = Recorder()
    uncompiled = run(ARCHITECTURES[name], run_name, device="cuda")
    got = run(ARCHITECTURES[name], run_name, backend, device="cuda")
    if got.error or not got.equals(uncompiled):
        plain = run(ARCHITECTURES[name], run_name, Recorder(rewriting=False), device="cuda")
        assert got.error == plain.error
        assert got.error or got.equals(plain)
    assert backend.guards == []


@pytest.mark.parametrize(
    ("name", "run_name"),
    [
        ("gemma3_text", "TurboQuantCache"),
        ("whisper", "TurboQuantCache"),
        ("gpt_oss", "StaticCache"),
        ("bloom", "StaticCache"),
        ("bert", "padded"),
    ],
)
def test_with_inductor(name, run_name):  # Llama: see test_decode_loop.py
    architecture = ARCHITECTURES[name]
    got, plain = run(architecture, run_name, "turboquant"), run(architecture, run_name, Recorder(False))
    assert got.compiled == plain.compiled
    assert got.smooth
    assert got.equals(run(architecture, run_name))


def test_the_table_is_made_from_the_recorded_decisions():
    page = TABLE.read_text()
    assert with_table(page, RECORDED) == page, "run: python tests/architecture_runs.py --write"
    assert list(RECORDED["architectures"]) == list(ARCHITECTURES)
    assert len(ARCHITECTURES) >= 45
