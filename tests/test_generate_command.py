"""`tq-inductor generate`: the text it writes is `generate`'s, and what it refuses."""

import io
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tq_inductor import cli
from tq_inductor.generate_text import DEMO_MODEL

PROMPT = "def mean(values):\n"


def run(*argv):
    return cli.main(["generate", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12", *argv])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny llama that reads bytes, and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The text that the tiny model goes on with."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, len(PROMPT) :])


def test_the_tokenizer_that_ships_reads_bytes():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "\tf(x)  # é 中\0\n"
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_the_model_that_ships(capsys, tmp_path):
    path = tmp_path / "new" / "figures.json"
    assert run("--prompt", PROMPT, "--json", str(path)) == 0
    told = capsys.readouterr()
    assert told.out.startswith("    ")  # it knows Python
    assert "18 tokens read, 12 written; time to first token" in told.err
    assert "tokens/s" in told.err
    assert "cache (turboquant, k4v4): " in told.err
    figures = json.loads(path.read_text())
    slots, mean, exact = 32 * 68, 64 * 4, (4 + 12) * 2 * 64 * 4  # bytes of D=64
    assert figures["cache_bytes"] == 7 * 2 * (slots + mean + exact)  # layers, KV heads
    assert figures["new_tokens"] == 12


@pytest.mark.parametrize(
    "options",
    [
        ("--cache", "dynamic"),
        ("--cache", "static"),
        ("--kv-format", "k8v8", "--prefill-chunk-size", "64"),  # one chunk: exact
        ("--cache", "static", "--compile"),
        ("--kv-format", "bf16", "--compile"),
    ],
)
def test_every_cache_writes_the_same(checkpoint, expected, options, capsys):
    assert run(str(checkpoint), "--prompt", PROMPT, *options) == 0
    told = capsys.readouterr()
    if "--kv-format" in options:  # not exact after the first token
        assert told.out[:1] == expected[:1]
    else:
        assert told.out == expected + "\n"
    assert ("with compilation" in told.err) == ("--compile" in options)


def test_prompts_come_from_files_and_standard_input(checkpoint, expected, capsys, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    assert run(str(checkpoint), "--cache", "dynamic", "--prompt-file", str(path)) == 0
    assert capsys.readouterr().out == expected + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run(str(checkpoint), "--cache", "dynamic") == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_seed_makes_sampling_repeat_itself(checkpoint, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        sampling = ("--do-sample", "--temperature", "2", "--top-k", "200", "--seed", seed)
        assert run(str(checkpoint), "--prompt", PROMPT, "--cache", "dynamic", *sampling) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--prompt", "x", "--kv-format", "k5v5"), 2, "unknown kv_format 'k5v5'"),
        (("--prompt-file", "/nowhere/prompt.txt"), 2, "there is no file '/nowhere/prompt.txt'"),
        (("--prompt", "x", "--prompt-file", __file__), 2, "not allowed with"),
        (("--prompt", "x", "--max-new-tokens", "0"), 2, "'0' is not a whole number of at least 1"),
        (("--prompt", "x", "--temperature", "0"), 2, "'0' is not a number above 0"),
        (("--prompt", "x", "--temperature", "inf"), 2, "'inf' is not a number above 0"),
        (("--prompt", "x", "--top-k", "-1"), 2, "'-1' is not a whole number of at least 0"),
        (("--prompt", "x", "--top-k", "2.5"), 2, "'2.5' is not a whole number of at least 0"),
        (("--prompt", "x", "--top-p", "5"), 2, "'5' is not a number from 0 to 1"),
        (("--prompt", "x", "--min-p", "3"), 2, "'3' is not a number from 0 to 1"),
        (("--prompt", "x", "--repetition-penalty", "-1"), 2, "'-1' is not a number above 0"),
        (
            ("--prompt", "x", "--seed", "1" + 23 * "0"),
            2,
            "is not a whole number from -2**63 to 2**64 - 1",
        ),
        (("--prompt", "\udcff"), 1, "the prompt is no text in UTF-8"),
        (("--prompt", ""), 1, "the prompt is empty"),
        (
            ("/nowhere/model", "--prompt", "x"),
            1,
            "cannot load a model and its tokenizer from '/nowhere/model'",
        ),
        (("/nowhere/model", "--prompt", "x"), 1, f"the one that ships with this package: {DEMO_MODEL}"),
        (
            ("--prompt", "x", "--cache", "static", "--kv-format", "k4v4"),
            1,
            "leave it out with --cache static",
        ),
    ],
)
def test_refusals(options, code, message, capsys):
    try:
        found = run(*options)
    except SystemExit as left:  # argparse
        found = left.code
    assert found == code
    assert message in capsys.readouterr().err


def test_a_prompt_on_standard_input_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert run() == 1
    assert "the prompt is no text in UTF-8" in capsys.readouterr().err


def test_a_policy_of_another_model(checkpoint, tmp_path, capsys):
    policy = tmp_path / "policy.json"
    policy.write_text('{"kv_format": ["k4v4"]}')
    assert run(str(checkpoint), "--prompt", "x", "--kv-format", str(policy)) == 1
    assert "kv_format names 1 formats, but the model has 2 layers" in capsys.readouterr().err
