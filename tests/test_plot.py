"""`tq-inductor plot` on figures that were made up."""

import json
from itertools import product

import pytest

from tq_inductor import cli

pytest.importorskip("matplotlib")


def result(path, caches=("dynamic", "k4v4"), contexts=(1024, 4096)):
    rows = []
    for cache, batch, context in product(caches, (1, 8), contexts):
        row = {"model": "llama", "cache": cache, "batch": batch, "context": context}
        row |= {"step_ms": batch * context / 1e3, "tokens_per_s": 1e6 / context, "peak_bytes": 1 << 30}
        rows.append(row)
    rows[-1] = {"model": "llama", "cache": "k4v4", "batch": 8, "context": 4096, "error": "out of memory"}
    environment = {"gpu": "NVIDIA Test", "torch": "2.0", "transformers": "5.0"}
    path.write_text(json.dumps({"environment": environment, "points": rows}))
    return path


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_three_plots(suffix, tmp_path, capsys):
    path = result(tmp_path / "bench.json")
    folder = tmp_path / "plots"
    assert cli.main(["plot", str(path), "--out", str(folder), "--format", suffix]) == 0
    assert {file.name for file in folder.iterdir()} == {
        f"{n}.{suffix}" for n in ("speed", "memory", "throughput")
    }
    assert capsys.readouterr().out.count("wrote ") == 3


def test_the_same_figures_give_the_same_file(tmp_path):
    path = result(tmp_path / "bench.json")
    for name in ("a", "b"):
        cli.main(["plot", str(path), "--out", str(tmp_path / name)])
    drawn = [(tmp_path / name / "speed.svg").read_text() for name in ("a", "b")]
    assert drawn[0] == drawn[1]
    assert "TurboQuantCache k4v4" in drawn[0]
    assert "NVIDIA Test, torch 2.0" in drawn[0]


def test_refusals(tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"environment": {"torch": "2", "transformers": "5"}, "points": []}))
    assert cli.main(["plot", str(path)]) == 1
    assert "it has 0 measured points. Measure more with: tq-inductor bench" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plot", str(tmp_path / "none.json")])
    assert "there is no file" in capsys.readouterr().err
