"""The examples run, and the hand-written model is the one that transformers makes of the same weights."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rounding import assert_equal_but_for_codes
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def logits(step, model, ids, prompt_len):
    """Of the prompt by the model, of each token after it by `step`."""
    steps = [model(ids[:, :prompt_len])]
    steps += [step(ids[:, i : i + 1]).clone() for i in range(prompt_len, ids.shape[1])]
    return torch.stack(steps)


@pytest.mark.parametrize("kv_format", ["bf16", "k4v4"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_hand_written_model_compiled_equals_eager(device, kv_format):
    model = load("hand_written_model").load(device)
    ids = torch.randint(32, 127, (2, 24), device=device)
    wide = copy.deepcopy(model).float()
    wide.make_caches(2, 40, kv_format)
    oracle = logits(wide, wide, ids, 16)
    model.make_caches(2, 40, kv_format)
    expected, eager = logits(model, model, ids, 16), [layer.self_attn.cache for layer in model.layers]
    model.make_caches(2, 40, kv_format)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model, backend="turboquant", options={"strict": True}, fullgraph=True)
    got = logits(step, model, ids, 16)
    assert counters["turboquant"]["rewritten.turboquant"] == 7
    assert counters["stats"]["unique_graphs"] == 1
    caches = [layer.self_attn.cache for layer in model.layers]
    assert_equal_but_for_codes(got, expected, caches, eager, oracle)


def test_the_hand_written_model_is_transformers_own():
    example = load("hand_written_model")
    ids = torch.randint(32, 127, (1, 20))
    model = example.load("cpu").bfloat16()
    model.make_caches(1, 20, "bf16")
    theirs = AutoModelForCausalLM.from_pretrained(
        Path(example.__file__).parent.parent / "tq_inductor" / "demo_model", dtype=torch.bfloat16
    )
    with torch.no_grad():
        expected = theirs(ids, past_key_values=DynamicCache()).logits[:, -1]
        torch.testing.assert_close(model(ids), expected, atol=0.3, rtol=0.05)  # of logits up to 20


def test_the_hand_written_model_needs_no_transformers():
    code = (
        "import runpy, sys; sys.argv[1:] = ['--eager', '--new-tokens', '6', '--kv-format', 'k8v4'];"
        f"runpy.run_path({str(EXAMPLES / 'hand_written_model.py')!r}, run_name='__main__');"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import math\n\n\ndef mean(values):\n")
    assert "caches (k8v4): " in done.stdout


def test_a_transformers_model(capsys):
    load("transformers_model").main(["--prompt", "def f(x):\n"])
    out = capsys.readouterr().out
    assert out.startswith("def f(x):\n")
    assert "2,021,376 bytes for 2,048 tokens" in out


def test_speculative_decoding_writes_the_same_faster(capsys):
    load("speculative_decoding").main(["--eager", "--new-tokens", "100"])
    lines = capsys.readouterr().out.splitlines()
    names, rest = zip(*(line.split(": ", 1) for line in lines), strict=True)
    speeds, texts = zip(*(line.split(" tokens/s, ending in ") for line in rest), strict=True)
    assert names == ("alone", "prompt lookup", "assistant")
    assert len(set(texts)) == 1
    assert int(speeds[1]) > int(speeds[0])  # eight times as many, when nothing else runs
