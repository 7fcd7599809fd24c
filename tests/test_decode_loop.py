"""64 tokens are decoded without any compilation after the warm-up, however the model was compiled."""

from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from tq_inductor import TurboQuantCache

LLAMA = ARCHITECTURES["llama"]
NEW_TOKENS = 65  # one of them by the prefill


def static_cache(config):
    return StaticCache(config=config, max_cache_len=80)


def turboquant_cache(config):
    return TurboQuantCache(config, 80)


def model_compile(model):
    model.compile(backend="turboquant")
    return {}


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="turboquant")
    return {}


def compile_config(model):
    config = CompileConfig(backend="turboquant", mode="default")
    config._compile_all_devices = True  # `generate` compiles for GPUs only, unless told
    return {"compile_config": config}


@pytest.mark.parametrize("padding", ["", "left"])
@pytest.mark.parametrize(
    ("compiled", "cache"),
    [
        (model_compile, static_cache),
        (model_compile, turboquant_cache),
        (compiled_forward, static_cache),
        (compiled_forward, turboquant_cache),
        (compile_config, static_cache),  # of a cache that it may compile for, as transformers calls it
    ],
)
def test_no_compilation_after_warm_up(compiled: Callable, cache: Callable, padding: str):
    batch = LLAMA.inputs(padding)

    def generate(model, new_tokens, **options):
        options |= {"do_sample": False, "max_new_tokens": new_tokens}
        return model.generate(**batch, past_key_values=cache(model.config), **options)

    expected = generate(LLAMA.build(), NEW_TOKENS)
    model = LLAMA.build()
    options = compiled(model)
    counters.clear()
    generate(model, 4, **options)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (1 if compiled is compile_config else 2)  # `generate` leaves its prefill uncompiled
    assert not counters["graph_break"]
    assert counters["turboquant"]["calls"] == 2 * graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(generate(model, NEW_TOKENS, **options), expected)
    assert counters["stats"]["unique_graphs"] == graphs
