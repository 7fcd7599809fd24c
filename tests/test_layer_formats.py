"""One format for each layer, and the one that "auto" chooses."""

import logging

import pytest
import torch
from test_cache import MAX_LEN, build, generate, padded_batch
from transformers import AutoConfig

from tq_inductor import TurboQuantCache, explain
from tq_inductor.errors import FormatError
from tq_inductor.layer_formats import layer_formats, safe_format


def formats(cache):
    return [layer.kv_format for layer in cache.layers]


def test_each_layer_has_its_format_and_generates_the_same_compiled():
    model = build("llama", torch.float32, num_hidden_layers=3)
    names = ["bf16", "k4v2", "turboquant_k8v4"]
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format=names, sink_tokens=2)
    assert formats(cache) == ["bf16", "k4v2", "k8v4"]
    assert [layer.exact_tokens for layer in cache.layers] == [(0, 0), (2, 60), (2, 12)]
    expected = generate(model, cache, padded_batch())
    model.compile(backend="turboquant")
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format=names, sink_tokens=2)
    assert torch.equal(generate(model, cache, padded_batch()), expected)


def test_each_layer_keeps_as_many_exact_tokens_as_its_bits_need():
    config = build("llama", num_hidden_layers=6).config
    names = ["k4v4", "k8v3", "k3v2", "k2v4", "k8v8", "bf16"]
    tokens = {"default": {}, "none": {"sink_tokens": 0, "recent_tokens": 0}, "given": {"recent_tokens": 7}}
    caches = {name: TurboQuantCache(config, MAX_LEN, kv_format=names, **x) for name, x in tokens.items()}
    kept = {name: [layer.exact_tokens for layer in cache.layers] for name, cache in caches.items()}
    assert kept == {
        "default": [(4, 12), (4, 28), (4, 60), (4, 124), (0, 0), (0, 0)],
        "none": [(0, 0)] * 6,
        "given": [(4, 7), (4, 7), (4, 7), (4, 7), (0, 7), (0, 0)],
    }
    # A skipped layer is lossless.
    skipped = TurboQuantCache(config, MAX_LEN, skip_layers=[1])
    assert [layer.exact_tokens for layer in skipped.layers[:2]] == [(4, 12), (0, 0)]


def test_a_cache_shorter_than_its_window_keeps_every_token():
    layer = TurboQuantCache(
        build("llama").config, 20, kv_format="k3v3", max_batch_size=1, device="cpu"
    ).layers[0]
    assert layer.exact.shape[2] == layer.max_len == 32


def test_every_layer_of_a_mixed_cache_is_rewritten():
    model = build("llama", torch.float32)
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format=["k8v4", "k2v2"])
    ids = padded_batch()["input_ids"][1:]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        report = explain(model, ids[:, -1:], past_key_values=cache)
    assert len(report.rewritten) == len(report.rows) == 2


def test_skipped_layers_stay_and_other_kinds_use_no_name():
    config = build("gemma3_text").config
    names = ["k4v4", "k3v3", "k4v4", "k8v8"]
    cache = TurboQuantCache(config, MAX_LEN, kv_format=names, skip_layers=[-1])
    assert [layer.kv_format for layer in cache.layers[1::2]] == ["k3v3", "bf16"]


def test_refusals():
    config = build("llama").config
    with pytest.raises(ValueError, match=r"names 3 formats, but the model has 2 layers: give one name for"):
        TurboQuantCache(config, MAX_LEN, kv_format=["k4v4"] * 3)
    with pytest.raises(FormatError, match="unknown kv_format 'k4v5'"):
        TurboQuantCache(config, MAX_LEN, kv_format=["k4v4", "k4v5"])
    with pytest.raises(ValueError, match="sink_tokens=4: a bf16 cache keeps all tokens"):
        TurboQuantCache(config, MAX_LEN, kv_format=["bf16", "bf16"], sink_tokens=4)
    config.head_dim = 12
    with pytest.raises(FormatError, match="head_dim=12 cannot be stored as k2v2"):
        TurboQuantCache(config, MAX_LEN, kv_format=["bf16", "k2v2"])


@pytest.mark.parametrize(
    ("architecture", "head_dim", "expected", "why"),
    [
        ("llama", 128, "k4v4", "no bias and its head dimension is 128"),
        ("qwen3", 256, "k4v4", "no bias and its head dimension is 256"),
        ("llama", 64, "k8v4", "its head dimension is 64: below 128"),
        ("gpt_oss", 128, "k8v4", "its keys have a bias"),
        ("qwen2", 128, "k8v4", "does not say whether keys have a bias"),
    ],
)
def test_auto_is_four_bits_only_where_that_is_known_to_be_safe(architecture, head_dim, expected, why):
    name, reason = safe_format(AutoConfig.for_model(architecture), [head_dim, None])
    assert name == expected
    assert why in reason


def test_auto_says_what_it_chose(caplog):
    with caplog.at_level(logging.INFO, logger="tq_inductor"):
        cache = TurboQuantCache(build("qwen2").config, MAX_LEN, kv_format="auto")
    assert formats(cache) == ["k8v4"] * 2
    assert 'kv_format="auto" is k8v4: its config does not say whether keys have a bias' in caplog.text
    assert layer_formats("k3v3", None, [64, None]) == ["k3v3"] * 2
