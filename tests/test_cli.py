"""The command line: doctor, the demo on a CPU, and its errors."""

import json
import sys

import pytest
import torch

from tq_inductor import cli


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in out
    assert "turboquant" in out
    assert "flash-attn-4 -" in out
    if not torch.cuda.is_available():
        assert "fa4          no: no CUDA device; flash-attn-4 is not installed (pip install" in out
        assert "anything" in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--device", "gpu"], "'gpu' is no device"),
        (["--device", "meta"], "'meta' is no device to run on: cpu, cuda, cuda:1, ..."),
        (["--device", "cuda:99"], "this machine has "),
        (["--dtype", "int4"], "'int4' is no dtype"),
        (["--dtype", "nn"], "'nn' is no dtype"),
    ],
)
@pytest.mark.parametrize("command", [["generate"], ["calibrate", __file__]])
def test_devices_and_dtypes_that_are_none(command, option, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, *option])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "--prompt-file"], ["calibrate"], ["balance"]])
def test_a_file_that_holds_no_text(command, tmp_path, capsys):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc\xff")
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, str(path)])
    assert caught.value.code == 2
    assert f"'{path}' is no text in UTF-8: invalid start byte at byte 3" in capsys.readouterr().err


WRITING = [
    ["demo", "--json"],
    ["generate", "--json"],
    ["calibrate", __file__, "--out"],
    ["calibrate", __file__, "--plot"],
    ["bench", "--out"],
    ["balance", __file__, "model", "--out"],
    ["plot", __file__, "--out"],
]


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_what_cannot_be_written_is_refused_before_the_work(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, str(tmp_path / "file" / "out.json")])
    assert caught.value.code == 2
    assert f"'{tmp_path / 'file'}' is no folder that can be written to" in capsys.readouterr().err


@pytest.mark.parametrize("command", WRITING[:5], ids=" ".join)
def test_a_folder_is_no_file(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, str(tmp_path)])
    assert f"'{tmp_path}' is a folder: name a file in it" in capsys.readouterr().err


@pytest.mark.parametrize("command", WRITING[5:], ids=" ".join)
def test_a_file_is_no_folder(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        cli.main([*command, str(tmp_path / "file")])
    assert f"'{tmp_path / 'file'}' is a file: name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "-1", "soon"])
def test_bench_stops_after_a_time(seconds, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--stop-after", seconds])
    assert f"'{seconds}' is not a number of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"points": []}'])
def test_a_file_that_bench_did_not_write(text, tmp_path, capsys):
    (tmp_path / "bench.json").write_text(text)
    assert cli.main(["plot", str(tmp_path / "bench.json"), "--out", str(tmp_path)]) == 1
    assert "is no result: write one with tq-inductor bench" in capsys.readouterr().err


def test_unknown_format(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--kv-format", "k5v5"])
    assert "unknown kv_format 'k5v5'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "module", "missing"),
    [
        (["demo"], "demo", "rich"),
        (["generate", "--prompt", "x"], "generate_text", "transformers"),
        (["bench"], "bench", "rich"),
        (["calibrate", __file__], "calibrate", "rich"),
        (["plot", __file__], "plot", "matplotlib"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(argv, module, missing, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"tq_inductor.{module}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(argv) == 1
    message = f"it needs {missing}, which is not installed: pip install 'tq_inductor[cli]'"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_demo(device, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tq_inductor.demo.NEW_TOKENS", 24)  # a tenth: nothing here is about their number
    path = tmp_path / "demo.json"
    assert cli.main(["demo", "--device", device, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "7 of 7 attention calls rewritten" in out
    assert "ms per generated token" in out
    figures = json.loads(path.read_text())
    exact, packed = figures["readings"]
    assert exact["cache_bytes"] == 3584
    # 952 of them packed, 14 of means, 4 + 12 exact tokens of 2,048; these and means in the model's dtype
    assert packed["cache_bytes"] == {"cpu": 952 + 14 + 28, "cuda": 952 + 7 + 14}[device]
    assert exact["bits_per_byte"] < 1.6
    assert packed["bits_per_byte"] < exact["bits_per_byte"] * 1.1
