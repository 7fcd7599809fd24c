"""Which graphs may become CUDA graphs although they hold prefill attention."""

from __future__ import annotations

import pytest
import torch
from tq_inductor.lowering.kept_state import keep_in_place, keeps_keys, returns_keys
from tq_inductor.lowering.rewrite import rewrite
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from tq_inductor import TurboQuantCache

IDS = torch.randint(3, 99, (2, 20))
CACHES = {
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
    "dynamic": lambda config: DynamicCache(config=config),
    "turboquant": lambda config: TurboQuantCache(config, 32),
}


def small(name, auto=AutoModelForCausalLM, **config):
    config = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "vocab_size": 99, **config,
    }  # fmt: skip
    return auto.from_config(AutoConfig.for_model(name, **config)).eval()


def keeps(model, *args, what=keeps_keys, **kwargs):
    found = []

    def backend(gm, example_inputs):
        rewrite(gm, {"prefill": "auto", "decode": "auto"})
        found.append(what(gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    return found == [True]


@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_prefill_into_a_cache_keeps_keys(kind, initialised):
    model = small("llama", num_key_value_heads=2)
    cache = CACHES[kind](model.config)
    if initialised and kind != "dynamic":
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert keeps(model, IDS, past_key_values=cache)
    assert keeps(model, IDS)  # a DynamicCache is returned


@pytest.mark.parametrize("kind", CACHES)
def test_a_decode_step_returns_keys_of_a_growing_cache_only(kind):
    model = small("llama", num_key_value_heads=2)
    cache = CACHES[kind](model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    assert keeps(model, IDS[:, :1], past_key_values=cache, what=returns_keys) == (kind == "dynamic")


def test_encoders_keep_nothing():
    assert not keeps(small("bert", AutoModel), IDS, attention_mask=torch.ones_like(IDS))
    assert not keeps(small("llama", num_key_value_heads=2), IDS, use_cache=False)
    vit = small("vit", AutoModel, image_size=32, patch_size=8)
    assert not keeps(vit, torch.randn(1, 3, 32, 32))


def test_keys_that_are_the_queries_too_are_kept():
    def f(x):
        x = x * 2
        return torch.nn.functional.scaled_dot_product_attention(x, x, x), x

    assert keeps(f, torch.randn(1, 2, 6, 8))


def kept_in_place(f, *args, **kwargs):
    """The inputs that CUDA graphs take to stay where they are, by their last name."""
    found = []

    def backend(gm, example_inputs):
        rewrite(gm, {"prefill": "auto", "decode": "auto"})
        keep_in_place(gm)
        for node in gm.graph.find_nodes(op="placeholder"):
            static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
            if static and "past_key_values" in node.name:  # parameters are, by themselves
                found.append(node.name.rsplit("_", 1)[-1])
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend, fullgraph=True)(*args, **kwargs)
    return found


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_made_in_a_compiled_prefill_stays_where_it_is(kind):
    """It cannot say so itself, and a step that writes it would be no CUDA graph."""
    model = small("llama", num_key_value_heads=2, num_hidden_layers=1)
    cache = CACHES[kind](model.config)
    expected = {
        "static": {"length", "keys", "values"},
        "dynamic": set(),
        "turboquant": {"length", "packed", "mean", "exact", "from", "rotation"},
    }
    kept_in_place(model, IDS, past_key_values=cache)
    assert set(kept_in_place(model, IDS[:, :1], past_key_values=cache)) == expected[kind]


def test_an_argument_that_is_written_may_be_another_each_time():
    def f(past_key_values, x):
        past_key_values.add_(x)
        return past_key_values * 2

    assert not kept_in_place(f, torch.zeros(2, 3, 4), torch.ones(4))
