"""What a user writes first: compile with CUDA graphs, then `generate`, with every way to have a cache.

Under Inductor these lines end in an error or a crash on a GPU. Each is run twice, since a cache that a
graph made, or that lives in a CUDA graph's pool, only shows in the second call. `generate` compiles models
for GPUs by itself; that is switched on here for CPUs too.
"""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from tq_inductor import TurboQuantCache

LLAMA = ARCHITECTURES["llama"]
NEW_TOKENS, MAX_LEN = 8, 48


def static(model, initialised):
    cache = StaticCache(config=model.config, max_cache_len=MAX_LEN)
    if initialised:
        cache.early_initialization(2, 2, 16, dtype=model.dtype, device=model.device)
    return cache


def turboquant(model, initialised):
    made = {"max_batch_size": 2, "dtype": model.dtype, "device": model.device} if initialised else {}
    return TurboQuantCache(model.config, MAX_LEN, **made)


CACHES = {
    "no cache argument": lambda model: {},
    "cache_implementation": lambda model: {"cache_implementation": "static"},
    "a fresh StaticCache": lambda model: {"past_key_values": static(model, False)},
    "an initialised StaticCache": lambda model: {"past_key_values": static(model, True)},
    "a fresh TurboQuantCache": lambda model: {"past_key_values": turboquant(model, False)},
    "an initialised TurboQuantCache": lambda model: {"past_key_values": turboquant(model, True)},
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunk", [None, 5], ids=["whole prompt", "chunks"])
@pytest.mark.parametrize("cache", CACHES)
def test_compile_then_generate(cache, chunk, device):
    if (cache, chunk, device, torch.__version__[:4]) == ("no cache argument", 5, "cpu", "2.11"):
        pytest.xfail("Inductor's C++ for DynamicCache does not compile there, our backend or not")
    batch = {name: x.to(device) for name, x in LLAMA.inputs("left").items()}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "prefill_chunk_size": chunk}
    model = LLAMA.build().to(device)
    expected = [  # uncompiled: on a GPU transformers would compile it with Inductor by itself
        model.generate(**batch, **options, **CACHES[cache](model), disable_compile=True) for _ in range(2)
    ]

    compile_config = CompileConfig()
    compile_config._compile_all_devices = True
    model = LLAMA.build().to(device)
    model.compile(backend="turboquant", mode="reduce-overhead")
    counters.clear()
    for tokens in expected:
        out = model.generate(**batch, **options, **CACHES[cache](model), compile_config=compile_config)
        assert torch.equal(out, tokens)
    assert counters["turboquant"]["calls"] == 2 * counters["stats"]["unique_graphs"] > 0  # all are ours
    assert not counters["graph_break"]
    assert device == "cpu" or counters["inductor"]["cudagraph_skips"] == 0
