"""`tq-inductor calibrate`: the prices it measures, the choice it makes of them, and what it refuses."""

import itertools
import json
import random

import pytest
import torch
from test_cache import build
from transformers import AutoTokenizer

from tq_inductor import KVFormat, cli
from tq_inductor.calibrate import allowance, bytes_per_token, calibrate, cheapest, measure
from tq_inductor.corpus import held_out_text
from tq_inductor.errors import FormatError, UsageError
from tq_inductor.generate_text import DEMO_MODEL, load_checkpoint
from tq_inductor.layer_formats import read_policy
from tq_inductor.look_ups import CUE, STRING, STRINGS, with_look_ups

pytest.importorskip("matplotlib")
FORMATS = ("k8v8", "k4v4", "k2v2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny llama that reads bytes, with one layer of three whose attention counts much more."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build("llama", torch.float32, num_hidden_layers=3, vocab_size=256, pad_token_id=None)
    for layer, factor in zip(model.model.layers, (0.1, 20, 0.1), strict=True):
        layer.self_attn.v_proj.weight.data.mul_(factor)
    model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(random.Random(0).choices(range(32, 127), k=300)))
    return path


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_formats_are_those_of_an_exhaustive_search(seed):
    drawn = random.Random(seed)
    sizes = {i: {"a": 12, "b": drawn.choice([20, 24]), "c": 36} for i in (0, 3, 4, 7)}
    prices = {i: {name: drawn.random() for name in of} for i, of in sizes.items()}
    for budget in (48, 60, 85, 110, 144, 1000):
        chosen = cheapest(prices, sizes, budget)
        fits = [
            sum(prices[i][name] for i, name in zip(sizes, names, strict=True))
            for names in itertools.product("abc", repeat=4)
            if sum(sizes[i][name] for i, name in zip(sizes, names, strict=True)) <= budget
        ]
        assert list(chosen) == list(sizes)
        assert sum(sizes[i][name] for i, name in chosen.items()) <= budget
        assert sum(prices[i][name] for i, name in chosen.items()) == pytest.approx(min(fits))
    same = {i: dict.fromkeys(of, 0.0) for i, of in prices.items()}
    assert set(cheapest(same, sizes, 1000).values()) == {"c"}  # of equal prices, more bits
    with pytest.raises(UsageError, match="47 bytes a token are fewer than the smallest formats take, 48"):
        cheapest(prices, sizes, 47)


def test_a_budget_is_a_format_or_bits_a_value():
    sizes = {i: {"k8v8": 20, "k4v4": 12, "k2v2": 8} for i in range(3)}
    for budget, expected in {
        "k4v4": ("k4v4", 36), 6: ("k4v4", 36), 5.9: ("k2v2", 35), 100.0: ("k8v8", 600)
    }.items():  # fmt: skip
        assert allowance(budget, sizes, 3 * 16, FORMATS) == expected
    assert allowance("k4v4", sizes, 3 * 16, ("k8v8", "k2v2")) == ("k2v2", 36)  # it is not to choose from
    with pytest.raises(UsageError, match=r"3\.5 bits a value are fewer than .* k2v2 has 4, scales"):
        allowance(3.5, sizes, 3 * 16, FORMATS)
    with pytest.raises(UsageError, match=r"k2v2's 4 bits a value are fewer than .* k4v4 has 6, .*larger"):
        allowance("k2v2", sizes, 3 * 16, ("k8v8", "k4v4"))


def test_prices_of_packed_layers():
    model = build("llama", torch.float32)
    ids = torch.randint(2, 99, (1, 200))
    calls = []
    nothing, fine, coarse = measure(model, ids, [{}, {0: "k8v8"}, {0: "k2v2"}], lambda: calls.append(1))
    assert nothing.price == 0
    assert 0 < fine.text < coarse.text / 10
    assert len(calls) == 3
    assert (fine.asked, fine.found < 4) == (16, True)  # it has learned nothing
    assert fine.price == fine.text


def test_look_ups_are_strings_that_come_again():
    window = torch.randint(256, (1, 1024))
    ids, asked = with_look_ups(window, torch.Generator().manual_seed(0))
    assert asked.sum() == STRINGS * STRING
    assert ids.shape == window.shape
    assert torch.equal(ids[0, :50], window[0, :50])  # a first token may be a special one
    text = bytes(ids[0].tolist())
    for i in range(STRINGS):
        line = text[1024 - (STRINGS - i) * (CUE + STRING) :][: CUE + STRING]
        assert text.count(line) == 2
        place = text.rindex(line)
        assert asked[place : place + CUE + STRING].tolist() == [False] * 3 + [True] * 16 + [False]
    short, none = with_look_ups(window[:, :100], torch.Generator())
    assert torch.equal(short, window[:, :100])
    assert not none.any()


def test_a_layer_that_looks_up_is_told_from_others():
    """On text alone the demo model's layers seem much alike; layer 5 finds what is repeated."""
    tokenizer, model = load_checkpoint(DEMO_MODEL, "auto")
    text = held_out_text()["configparser"][:1024].decode()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    moved = measure(model.float(), ids, [{i: "k2v2"} for i in range(7)])
    assert moved[0].found > 0.25 * moved[0].asked
    look_ups = [m.look_ups for m in moved]
    assert look_ups.index(max(look_ups)) == 5
    assert moved[5].price > 2 * sorted(look_ups)[3]


def test_bytes_are_those_of_the_cache():
    model = build("gemma3_text", torch.float32)  # layers 1 and 3 are packed
    sizes, values = bytes_per_token(model, FORMATS)
    assert values == 2 * 2 * (16 + 16)
    assert sizes == {i: {name: 2 * KVFormat(name, 16).slot_bytes for name in FORMATS} for i in (1, 3)}
    sliding = build("gemma3_text", torch.float32, layer_types=["sliding_attention"] * 4)
    with pytest.raises(UsageError, match="packs no layer of gemma3_text"):
        bytes_per_token(sliding, FORMATS)
    with pytest.raises(FormatError, match="head_dim=12 cannot be stored"):
        bytes_per_token(build("llama", torch.float32, head_dim=12), FORMATS)


def test_the_policy_of_a_model(checkpoint, text, tmp_path, capsys):
    out, plot = tmp_path / "new" / "policy.json", tmp_path / "plots" / "policy.svg"
    argv = [
        "calibrate",
        str(text),
        str(checkpoint),
        "--out",
        str(out),
        "--plot",
        str(plot),
        "--device",
        "cpu",
    ]
    assert cli.main([*argv, "--formats", *FORMATS, "--tokens", "260"]) == 0
    told = capsys.readouterr()
    assert told.out == f"wrote {out}\nwrote {plot}\n"
    assert "together" in told.err
    policy = json.loads(out.read_text())
    assert policy["tokens"] == 260
    assert policy["bytes_per_token"] <= policy["budget"]["bytes_per_token"] == 3 * 2 * 20
    assert policy["kl_nats"] <= policy["budget"]["kl_nats"]
    assert len(policy["kv_format"]) == 3
    assert set(policy["kl_nats_of_one_layer"]["1"]) == set(FORMATS)
    drawn = plot.read_text()
    assert "chosen" in drawn
    assert "k2v2" in drawn
    again = ["generate", str(checkpoint), "--prompt", "x", "--max-new-tokens", "3", "--device", "cpu"]
    assert cli.main([*again, "--kv-format", str(out)]) == 0
    assert "/".join(policy["kv_format"]) in capsys.readouterr().err
    assert cli.main([*again, "--kv-format", "auto"]) == 0


def test_a_layer_that_counts_more_gets_more_bits(checkpoint, text, tmp_path):
    out = tmp_path / "policy.json"
    argv = ["calibrate", str(text), str(checkpoint), "--out", str(out), "--device", "cpu"]
    # 5 bits a value are what k4v4 has at 16 dimensions.
    assert cli.main([*argv, "--formats", *FORMATS, "--tokens", "260", "--budget", "5"]) == 0
    policy = json.loads(out.read_text())
    assert (policy["budget"]["kv_format"], policy["budget"]["allowed_bytes_per_token"]) == ("k4v4", 120)
    assert policy["kv_format"] == ["k2v2", "k8v8", "k2v2"]
    assert policy["kl_nats"] < policy["budget"]["kl_nats"] / 2


def test_a_last_window_that_exact_tokens_cover_is_not_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("tq_inductor.calibrate.WINDOW", 64)
    policy = calibrate("x" * 97, checkpoint, formats=["k4v4"], device="cpu")
    assert policy["tokens"] == 64


def test_refusals(checkpoint, text, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert cli.main(["calibrate", str(empty), str(checkpoint), "--device", "cpu"]) == 1
    assert "0 tokens of the text are read, and k2v2 needs at least 258" in capsys.readouterr().err
    short = ["calibrate", str(text), str(checkpoint), "--device", "cpu", "--tokens", "33"]
    assert cli.main([*short, "--formats", "k8v8", "k4v4"]) == 1
    assert (
        "33 tokens of the text are read, and k4v4 needs at least 34: half of them must be more than the 16 "
        "that it keeps exact" in capsys.readouterr().err
    )
    assert cli.main(["calibrate", str(text), str(tmp_path / "none")]) == 1
    assert "cannot load a model and its tokenizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["calibrate", str(text), "--formats", "k5v5"])
    assert "unknown kv_format 'k5v5'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["calibrate", str(text), "--plot", str(tmp_path / "policy.txt")])
    assert "policy.txt' ends neither in .svg nor in .png" in capsys.readouterr().err
    for budget, reason in (("k5", "unknown kv_format 'k5'"), ("-1", "-1 bits a value (needs a positive")):
        with pytest.raises(SystemExit):
            cli.main(["calibrate", str(text), "--budget", budget])
        assert reason in capsys.readouterr().err
    tight = ["calibrate", str(text), str(checkpoint), "--device", "cpu", "--budget", "1.5"]
    assert cli.main(tight) == 1
    assert (
        "1.5 bits a value are fewer than the smallest format to choose from takes: k2v2"
        in capsys.readouterr().err
    )
    for content in ("[]", "{", '{"kv_format": ["k5v5"]}', '{"kv_format": 3}'):
        policy = tmp_path / "policy.json"
        policy.write_text(content)
        with pytest.raises(FormatError, match=r"policy\.json is no policy: write one with tq-inductor"):
            read_policy(policy)
    with pytest.raises(SystemExit):
        cli.main(["generate", "--prompt", "x", "--kv-format", str(policy)])
    assert "is no policy" in capsys.readouterr().err
