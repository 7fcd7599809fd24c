"""lm-eval with a packed cache, on the model that ships and tasks made here."""

import json
import random

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from tq_inductor.errors import FormatError  # noqa: E402
from tq_inductor.generate_text import DEMO_MODEL  # noqa: E402
from tq_inductor.lm_eval_model import TurboQuantLM  # noqa: E402


def tasks(folder):
    """To write, and to score, a string that the prompt has."""
    drawn, path = random.Random(0), folder / "docs.jsonl"
    docs = []
    for _ in range(6):
        name = "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=6))
        string = "".join(drawn.choices("0123456789abcdef", k=12))
        line = f'{name} = "{string}"\n'
        docs.append({"question": f'{line}other = "none"\n{name} = "', "answer": string})
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    shared = {**data, "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    shared |= {"target_delimiter": "", "metadata": {"version": 1}}
    stop = {"until": ['"'], "max_gen_toks": 16, "do_sample": False}
    return [
        {**shared, "task": "write", "output_type": "generate_until", "generation_kwargs": stop},
        {**shared, "task": "score", "output_type": "loglikelihood"},
    ]


def results(folder, kv_format, **options):
    model = TurboQuantLM(
        pretrained=str(DEMO_MODEL),
        device="cpu",
        dtype="float32",
        batch_size=1,
        kv_format=kv_format,
        **options,
    )
    found = lm_eval.simple_evaluate(model=model, tasks=tasks(folder), bootstrap_iters=0)["results"]
    return found["write"]["exact_match,none"], found["score"]["perplexity,none"]


def test_the_cache_decides_the_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    exact_write, exact_score = results(tmp_path, "bf16")
    fine_write, fine_score = results(tmp_path, "k8v8", recent_tokens=4)
    coarse_write, coarse_score = results(tmp_path, "k2v2", sink_tokens=0, recent_tokens=0)
    kept_write, kept_score = results(tmp_path, "k2v2")  # the texts are no longer than its exact tokens
    assert exact_write > 0.3
    assert fine_write == kept_write == exact_write
    assert coarse_write < exact_write
    assert kept_score == pytest.approx(exact_score, rel=0.01)
    assert fine_score == pytest.approx(exact_score, rel=0.2)
    assert fine_score != exact_score
    assert coarse_score > 2 * exact_score


def test_a_policy_and_a_format_that_does_not_exist(tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"kv_format": ["k8v8"] * 7}))
    given = {"pretrained": str(DEMO_MODEL), "device": "cpu", "dtype": "float32"}
    assert TurboQuantLM(**given, kv_format=str(policy)).kv_format == ["k8v8"] * 7
    with pytest.raises(FormatError, match="unknown kv_format 'k5v5'"):
        TurboQuantLM(**given, kv_format="k5v5")
    ids = torch.zeros(1, 5, dtype=torch.int64)
    assert TurboQuantLM(**given)._model_call(ids).shape == (1, 5, 256)
