"""`tq-inductor bench` on a CPU: its figures, going on where it stopped, and points that fail."""

import json
import os
import time

import pytest

from tq_inductor import bench, bench_point, cli
from tq_inductor.bench import Worker, attempt, run_bench
from tq_inductor.bench_point import FULL, Point, build_model, fill, largest_context, make_cache
from tq_inductor.clock import cache_bytes
from tq_inductor.errors import UsageError


def point(cache="dynamic", context=24, batch=2, model="llama"):
    return Point(model, "tiny", cache, batch, context, new_tokens=4, prefill_tokens=40)


def test_a_run_is_taken_up_where_it_stopped(tmp_path, capsys, monkeypatch):
    out = tmp_path / "bench.json"
    argv = ["bench", "--out", str(out), "--size", "tiny", "--model", "llama", "--cache", "dynamic"]
    argv += ["--new-tokens", "4", "--context", "16"]
    assert cli.main([*argv, "--batch", "1", "--largest"]) == 0
    first = json.loads(out.read_text())
    assert [row["context"] for row in first["points"]] == [16, None]
    figures, largest = first["points"]
    assert figures["cache_bytes"] == 2 * 2 * 2 * 16 * 19 * 4  # keys and values, layers, heads, D, tokens
    assert figures["compile_s"] is None
    assert figures["tokens_per_s"] == pytest.approx(1e3 / figures["step_ms"], rel=0.01)
    assert largest["largest_context"] is None  # it takes a GPU

    measured = []
    monkeypatch.setattr(
        Worker, "measure", lambda self, point, limit: measured.append(point) or {"error": "no"}
    )
    assert cli.main([*argv, "--batch", "1", "2", "--largest", "--stop-after", "0"]) == 0
    assert not measured
    assert "run the same command again" in capsys.readouterr().out
    assert cli.main([*argv, "--batch", "1", "2", "--largest"]) == 0
    assert [(point.batch, point.context) for point in measured] == [(2, 16), (2, None)]
    assert json.loads(out.read_text())["points"][:2] == first["points"]

    monkeypatch.setattr(bench, "machine", lambda: {"torch": "0.1"})
    assert cli.main(argv) == 1
    assert "torch was 2." in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["static-inductor", "static", "k4v4"])
def test_compiled_caches_need_no_compilation_after_warm_up(cache):
    figures = attempt(point(cache))
    assert figures["graphs_after_warm_up"] == 0, figures
    assert figures["compile_s"] > 0
    assert figures["step_ms"] > 0


def test_a_model_with_a_sliding_window():
    figures = attempt(point("dynamic", model="gemma3"))
    assert figures["first_token_s"] > 0, figures


def test_what_fails_is_recorded():
    assert attempt(point(context=1 << 45)) == {"error": "out of memory"}
    assert attempt(point("k4v4", batch=-1))["error"].startswith("RuntimeError: ")


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


class Slow:
    """Keeps the process that unpickles it."""

    def __reduce__(self):
        return time.sleep, (60,)


def test_a_process_that_dies_or_hangs_is_replaced():
    with Worker() as worker:
        assert worker.measure(Deadly(), 60) == {"error": "the process died with exit code 3"}
        assert worker.measure(Slow(), 0.1) == {"error": "took longer than 0.1 s"}
        assert worker.measure(point(context=1 << 45), 60) == {"error": "out of memory"}


@pytest.mark.parametrize("cache", ["dynamic", "static", "k4v4"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_filled_cache_holds_what_it_should(name, cache, monkeypatch):
    monkeypatch.setattr(bench_point, "FILL_CHUNK", 16)
    model = build_model(name, "tiny", "cpu")
    filled = make_cache(cache, model, 2, 64)
    fill(filled, model, 2, 40)
    assert int(filled.get_seq_length(len(filled.layers) - 1)) == 40


def test_the_largest_context_is_searched_from_above(monkeypatch):
    tried = []
    monkeypatch.setattr(bench_point, "fits", lambda point, model, n: tried.append(n) or n <= 8000)
    model = build_model("llama", "tiny", "cpu")
    small, large = (cache_bytes(make_cache("k4v4", model, 1, n)) for n in (256, 512))
    slot = 2 * (large - small) / 256  # two rows, and their means of keys
    found = largest_context(point("k4v4", None), model, free_bytes=int(slot * 10000))
    assert (tried, found) == ([9500, 8500, 7500], 7500)
    monkeypatch.undo()
    assert largest_context(point("dynamic", None), model, free_bytes=1 << 20) == 972  # 95 per cent of 1,024


def test_command_line_names_what_there_is(capsys):
    assert tuple(FULL) == cli.BENCH_MODELS
    with pytest.raises(SystemExit):
        cli.main(["bench", "--cache", "k5v5"])
    assert "Or one of dynamic, quantized, static-inductor, static." in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"environment": {}, "points": [{}]}'])
def test_a_file_that_is_no_result_is_refused_and_stays(text, tmp_path):
    out = tmp_path / "bench.json"
    out.write_text(text)
    with pytest.raises(UsageError, match=r"bench\.json is no result of tq-inductor bench .*name another"):
        run_bench([point()], out)
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "2"], "'2' is not a whole number of at least 3"),
        (["--time-limit", "nan"], "'nan' is not a number above 0"),
    ],
)
def test_numbers_that_cannot_be_measured(options, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *options])
    assert message in capsys.readouterr().err


def test_earlier_rows_of_another_machine_are_refused(tmp_path):
    out = tmp_path / "bench.json"
    run_bench([], out, {"gpu": "one"})
    assert not out.exists()  # nothing was measured
