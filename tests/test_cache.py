"""TurboQuantCache under transformers: every way of generating, compiled and eager, errors, memory."""

import logging
import re

import pytest
import torch
from expecttest import assert_expected_inline
from rounding import assert_equal_but_for_codes
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, StaticCache

from tq_inductor import KVFormat, TurboQuantCache, explain
from tq_inductor.cache_layers import SlidingLayer, TurboQuantLayer
from tq_inductor.errors import CacheFullError, CacheMismatchError, FormatError, UnsupportedModelError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gemma3_text"]
MAX_LEN = 64


def build(architecture, dtype=torch.bfloat16, device="cpu", seed=0, **changes):
    """A tiny model of this architecture with random weights."""
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "max_position_embeddings": 256,
    }  # fmt: skip
    if architecture == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    if architecture == "mistral":
        sizes["sliding_window"] = None
    if architecture == "gemma3_text":
        layer_types = ["sliding_attention", "full_attention"] * 2
        sizes |= {"num_hidden_layers": 4, "layer_types": layer_types, "sliding_window": 8, "head_dim": 16}
    tokens = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(architecture, **{**sizes, **tokens, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def padded_batch(device="cpu"):
    """Two prompts of 12 tokens, the first left-padded by 5."""
    ids = torch.randint(2, 99, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


REPETITIVE = torch.tensor([[5, 6, 7, 8, 9] * 5])
WAYS = {
    "greedy": lambda: ({"input_ids": REPETITIVE}, {}),
    "left-padded": lambda: (padded_batch(), {}),
    "beam": lambda: (padded_batch(), {"num_beams": 3}),
    "prompt lookup": lambda: ({"input_ids": REPETITIVE}, {"prompt_lookup_num_tokens": 3}),
    "chunked prefill": lambda: ({"input_ids": REPETITIVE}, {"prefill_chunk_size": 8}),
    "sampling": lambda: (padded_batch(), {"do_sample": True}),
    "return sequences": lambda: (padded_batch(), {"do_sample": True, "num_return_sequences": 2}),
}


def generate(model, cache, inputs, max_new_tokens=12, **options):
    torch.manual_seed(3)
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    options = {"do_sample": False, **options}
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lossless_format_gives_transformers_own_tokens(architecture, way):
    model = build(architecture)  # bf16: in float32 the format would round keys and values
    inputs, options = WAYS[way]()
    expected = generate(model, DynamicCache(config=model.config), inputs, **options)
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format="bf16")
    assert torch.equal(generate(model, cache, inputs, **options), expected)


@pytest.mark.parametrize("way", ["greedy", "left-padded", "beam", "prompt lookup", "chunked prefill"])
@pytest.mark.parametrize("name", ["k4v4", "k3v2", "k8v8"])
def test_packed_formats_generate(name, way):
    model = build("llama")
    inputs, options = WAYS[way]()
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format=name)
    out = generate(model, cache, inputs, **options)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 12
    assert int(cache.get_seq_length()) >= out.shape[1] - 1


@pytest.mark.parametrize("way", WAYS)
def test_exact_tokens_give_transformers_own_tokens(way):
    model = build("llama")
    inputs, options = WAYS[way]()
    expected = generate(model, DynamicCache(config=model.config), inputs, **options)
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format="k2v2", recent_tokens=MAX_LEN)
    assert torch.equal(generate(model, cache, inputs, **options), expected)


@pytest.mark.parametrize("way", ["greedy", "left-padded", "beam", "prompt lookup", "chunked prefill"])
def test_compiled_generation_equals_eager_with_few_exact_tokens(way):
    inputs, options = WAYS[way]()
    outputs = []
    for compiled in (False, True):
        model = build("llama", torch.float32)
        if compiled:
            model.compile(backend="turboquant")
        cache = TurboQuantCache(model.config, MAX_LEN, sink_tokens=2, recent_tokens=5)
        out = generate(model, cache, inputs, **options)
        if way == "greedy":  # and go on
            out = generate(model, cache, {"input_ids": torch.cat([out, out[:, :3]], 1)}, **options)
        outputs.append(out)
    assert torch.equal(*outputs)


def decode_logits(model, run, cache, ids, steps):
    with torch.no_grad():
        logits = [run(ids, past_key_values=cache).logits[:, -1]]
        for i in range(steps):
            token = ids[:, i % ids.shape[1], None]
            logits.append(run(token, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_compiled_equals_eager_and_recompiles_nothing(architecture, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = build(architecture, dtype, device)
    ids = padded_batch(device)["input_ids"].clamp(min=2)
    few = {"sink_tokens": 2, "recent_tokens": 5}
    eager = TurboQuantCache(model.config, MAX_LEN, **few)
    expected = decode_logits(model, model, eager, ids, 16)
    wide = build(architecture, dtype, device).float()
    oracle = decode_logits(wide, wide, TurboQuantCache(wide.config, MAX_LEN, **few), ids, 16)
    counter = CompileCounterWithBackend("turboquant")
    counters["turboquant"].clear()
    compiled = torch.compile(model, backend=counter)
    cache = TurboQuantCache(model.config, MAX_LEN, max_batch_size=2, device=device, dtype=dtype, **few)
    got = decode_logits(model, compiled, cache, ids, 16)
    assert counter.frame_count == 2  # one prefill graph and one decode graph
    packed, expected_packed = (
        [layer for layer in x.layers if isinstance(layer, TurboQuantLayer)] for x in (cache, eager)
    )
    assert_equal_but_for_codes(got, expected, packed, expected_packed, oracle)
    assert counters["turboquant"]["rewritten.turboquant"] == len(packed)


@pytest.mark.parametrize("compiled", ["nothing", "layers", "attention", "all by aot_eager"])
def test_a_step_without_a_mask_sees_no_empty_slot(compiled):
    model = build("llama", torch.float32)
    ids = torch.randint(2, 99, (2, 12))
    expected = decode_logits(model, model, DynamicCache(), ids, 4)
    if compiled == "all by aot_eager":
        model.compile(backend="aot_eager")
    for layer in model.model.layers:
        if compiled == "layers":
            layer.compile(backend="turboquant")
        elif compiled == "attention":
            layer.self_attn.compile(backend="turboquant")
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format="bf16")
    got = decode_logits(model, model, cache, ids, 4)
    assert (got - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_model_compile_and_generate(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, compiled = (build("llama", dtype, device) for _ in range(2))
    expected = generate(model, TurboQuantCache(model.config, MAX_LEN, kv_format="bf16"), padded_batch())
    counters["turboquant"].clear()
    compiled.compile(backend="turboquant")
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format="bf16")  # made inside the compiled prefill
    got = generate(compiled, cache, padded_batch())
    if device == "cpu":
        assert torch.equal(got, expected)
    assert counters["turboquant"]["rewritten.turboquant"] >= 2
    cache.reset()
    assert torch.equal(generate(compiled, cache, padded_batch()), got)


def test_the_decode_graph_has_one_op_a_layer_and_no_step_copies_a_cache():
    model = build("llama", torch.float32)
    ids = padded_batch()["input_ids"]
    cache = TurboQuantCache(model.config, MAX_LEN, max_batch_size=2, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        compiled = torch.compile(model, backend="turboquant", fullgraph=True)
        _, (code,) = run_and_get_code(compiled, ids[:, :1], past_key_values=cache)
    called = re.findall(r"^ +\w+ = torch\.ops\.tq_inductor\.(\w+)\.default\(", code, re.MULTILINE)
    assert_expected_inline(
        "\n".join(called),
        """\
tq_append_attend
tq_append_attend""",
    )
    # The caches change where they are, and so do their exact tokens.
    assert not re.findall(r"empty_strided\w*\(.*torch\.uint8", code)
    assert not re.findall(rf"empty_strided\w*\(\(2, 2, {4 + 32}, 32\)", code)


def test_explain_of_a_decode_step():
    model = build("gemma3_text", torch.float32)
    cache = TurboQuantCache(model.config, MAX_LEN)
    ids = padded_batch()["input_ids"]
    with torch.no_grad():
        first = explain(model, ids, past_key_values=cache)
        step = explain(model, ids[:, :1], past_key_values=cache)
    assert [row.phase for row in first.rows] == ["prefill"] * 4
    assert [row.mask for row in first.rows] == ["causal + window 8", "causal"] * 2
    assert [row.backend for row in step.rows] == ["sdpa", "turboquant"] * 2
    assert step.rows[1].module == "model.layers.1.self_attn"
    assert "sdpa_attention" in step.rows[1].source


def test_first_chunk_is_raw_and_later_ones_are_decoded():
    cache = TurboQuantCache(build("llama").config, MAX_LEN)
    k, v = torch.randn(2, 2, 2, 5, 16, dtype=torch.bfloat16)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    keys, values = cache.update(k, v, 0)
    assert keys is k
    assert values is v
    assert int(cache.get_seq_length()) == 5
    assert cache.get_mask_sizes(1, 0) == (6, 0)
    keys, _ = cache.update(k[:, :, :1], v[:, :, :1], 0)
    assert keys.shape == (2, 2, 6, 16)
    assert (keys[:, :, :5] - k).float().square().mean() < 0.02
    assert cache.layers[0].keys.shape == (2, 2, 6, 16)


def test_a_full_cache_changes_nothing():
    model = build("gemma3_text", torch.float32)  # its first layer is not packed
    cache = TurboQuantCache(model.config, 20)
    capacity = cache.get_max_length(1)
    assert capacity == 32  # rounded up to whole groups
    ids = torch.randint(2, 99, (1, 30))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = [layer.packed.clone() for layer in cache.layers[1::2]]
        window = cache.layers[0].keys.clone()
        with pytest.raises(CacheFullError, match=r"holds 30 of at most 32 tokens.*max_cache_len"):
            model(ids[:, :3], past_key_values=cache)
        assert all(torch.equal(a, x.packed) for a, x in zip(before, cache.layers[1::2], strict=True))
        assert torch.equal(window, cache.layers[0].keys)
        assert int(cache.get_seq_length(1)) == 30
        model(ids[:, :2], past_key_values=cache)
        cache.reset()
        with pytest.raises(CacheFullError, match="holds 0 of at most 32"):
            model(ids.repeat(1, 2), past_key_values=cache)


def test_a_full_cache_in_a_compiled_model():
    model = build("llama", torch.float32)
    model.compile(backend="turboquant")
    cache = TurboQuantCache(model.config, 16, max_batch_size=2, device="cpu", dtype=torch.float32)
    ids = padded_batch()["input_ids"]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for i in range(4):
            model(ids[:, i : i + 1], past_key_values=cache)
        before = [layer.packed.clone() for layer in cache.layers]
        with pytest.raises(CacheFullError, match="holds 16 of at most 16"):
            model(ids[:, :1], past_key_values=cache)
    assert all(torch.equal(a, layer.packed) for a, layer in zip(before, cache.layers, strict=True))
    assert int(cache.get_seq_length()) == 16


def test_what_does_not_fit_changes_nothing():
    cache = TurboQuantCache(build("llama").config, MAX_LEN, max_batch_size=2, device="cpu")
    k = torch.randn(2, 2, 3, 16, dtype=torch.bfloat16)
    cache.update(k, k, 0)
    before = cache.layers[0].packed.clone()
    for bad, message in (
        (k[:1], "batch_size=2"),
        (k.repeat(1, 2, 1, 1), "num_kv_heads=2"),
        (k.float(), "made for torch.bfloat16"),
    ):
        with pytest.raises(CacheMismatchError, match=message):
            cache.update(bad, bad, 0)
    assert torch.equal(before, cache.layers[0].packed)
    assert int(cache.get_seq_length()) == 3


def test_a_sliding_window_model_after_taking_tokens_back():
    model = build("gemma3_text", torch.float32)
    cache = TurboQuantCache(model.config, MAX_LEN)
    inputs = {"input_ids": REPETITIVE}
    first = generate(model, cache, inputs, prompt_lookup_num_tokens=3)
    cache.reset()
    assert torch.equal(
        generate(model, cache, inputs), generate(model, TurboQuantCache(model.config, 64), inputs)
    )
    cache.reset()
    assert torch.equal(generate(model, cache, inputs, prompt_lookup_num_tokens=3), first)


def test_a_mask_made_elsewhere_does_not_meet_an_old_length():
    model = build("llama", torch.float32)
    cache = TurboQuantCache(model.config, MAX_LEN, kv_format="bf16")
    ids = torch.randint(2, 99, (1, 6))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        torch.compile(model, backend="aot_eager")(ids[:, :1], past_key_values=cache)
        mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
        model(ids[:, :1], past_key_values=cache, attention_mask=mask)
    keys, _ = cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
    assert keys.shape[2] == 9


def test_multi_query_models_are_allocated_at_the_first_forward():
    model = build("falcon", torch.float32, multi_query=True, alibi=False, new_decoder_architecture=False)
    cache = TurboQuantCache(model.config, MAX_LEN, max_batch_size=2, device="cpu", dtype=torch.float32)
    generate(model, cache, padded_batch())
    assert cache.layers[0].packed.shape[1] == 1


def test_inference_mode():
    model = build("llama", torch.float32)
    expected = generate(model, TurboQuantCache(model.config, MAX_LEN), padded_batch())
    model.compile(backend="turboquant")
    cache = TurboQuantCache(model.config, MAX_LEN)
    with torch.inference_mode():
        assert torch.equal(generate(model, cache, padded_batch()), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_under_autocast(name):
    model = build(name, torch.float32)
    ids = torch.randint(1, 50, (2, 12))
    logits = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        packed = TurboQuantCache(model.config, 64, kv_format="fp16")
        for cache in (DynamicCache(config=model.config), packed):
            model(ids[:, :8], past_key_values=cache)
            logits.append(model(ids[:, 8:], past_key_values=cache).logits)
    assert torch.allclose(*logits, atol=0.02)


def test_bad_arguments():
    config = build("llama").config
    with pytest.raises(FormatError, match=r"unknown kv_format 'k4v5'.*Nearest"):
        TurboQuantCache(config, 64, kv_format="k4v5")
    with pytest.raises(ValueError, match="max_cache_len=0"):
        TurboQuantCache(config, 0)
    for sizes in ({"max_batch_size": 0}, {"max_batch_size": -1}, {"max_cache_len": 6.5}):
        with pytest.raises(ValueError, match=r"max_.*=(0|-1|6.5) must be a whole number, at least 1"):
            TurboQuantCache(config, **{"max_cache_len": 64, **sizes})
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM is no config: pass model.config"):
        TurboQuantCache(build("llama"), 64)
    for tokens in (-1, 1.5):
        with pytest.raises(ValueError, match=rf"recent_tokens={tokens} must be a whole number, at least 0"):
            TurboQuantCache(config, 64, recent_tokens=tokens)
    for name in (None, KVFormat("k4v4", 16), ["k4v4", None]):
        with pytest.raises(FormatError, match=r"give the name of a format.*one for each layer"):
            TurboQuantCache(config, 64, kv_format=name)
    for dtype in ("bfloat16", torch.int64):
        with pytest.raises(ValueError, match=f"dtype={dtype!r} cannot be that of keys and values"):
            TurboQuantCache(config, 64, dtype=dtype)
    with pytest.raises(UnsupportedModelError, match="deepseek_v4 has layers of a type"):
        TurboQuantCache(AutoConfig.for_model("deepseek_v4"), 64)
    assert TurboQuantCache(config, 64, skip_layers=torch.tensor([-1])).layers[1].kv_format == "bf16"
    with pytest.raises(ValueError, match=r"sink_tokens=4: a bf16 cache keeps all tokens.*Leave it out"):
        TurboQuantCache(config, 64, kv_format="bf16", sink_tokens=4)
    with pytest.raises(ValueError, match="skip_layers has 2, but the model has 2 layers"):
        TurboQuantCache(config, 64, skip_layers=[2])
    config.head_dim = 12
    with pytest.raises(FormatError, match="head_dim=12 cannot be stored as k4v4"):
        TurboQuantCache(config, 64)


@pytest.mark.parametrize("name", ["k4v4", "k8v3", "bf16"])
def test_nbytes_is_what_the_format_promises(name):
    config = build("llama").config
    cache = TurboQuantCache(config, 100, kv_format=name)
    assert cache.nbytes == 0
    few = {} if name == "bf16" else {"sink_tokens": 4, "recent_tokens": 32}
    cache = TurboQuantCache(config, 100, kv_format=name, max_batch_size=3, device="cpu", **few)
    beside = 3 * 2 * (16 + 36 * 2 * 16) * 2 if few else 0  # a mean, exact tokens: bf16
    assert cache.nbytes == 2 * (KVFormat(name, 16).cache_bytes(3, 2, 100) + beside)
    assert cache.batch_size == 3


def test_mixed_layers():
    model = build("gemma3_text")
    cache = TurboQuantCache(model.config, MAX_LEN, skip_layers=[-1])
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [SlidingLayer, TurboQuantLayer] * 2
    assert [layer.kv_format for layer in cache.layers[1::2]] == ["k4v4", "bf16"]
    assert not cache.is_compileable  # or `generate` would compile with Inductor by itself
    generate(model, cache, padded_batch())


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
HYBRIDS = {
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "mamba_chunk_size": 8, "head_dim": 16},
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1],
        "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_d_state": 8, "num_mem_blocks": 1,
        "mamba_ngroups": 1, "chunk_size": 8, "attention_head_dim": 32, "num_key_value_heads": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("chunks", [[1] * 6, [7, 1, 1, 5, 1]], ids=["one by one", "chunks"])
def test_attention_beside_a_linear_state(name, chunks):
    model = build(name, torch.bfloat16, **HYBRIDS[name])
    ids = torch.randint(3, 99, (2, sum(chunks)))
    caches = DynamicCache(config=model.config), TurboQuantCache(model.config, MAX_LEN, kv_format="bf16")
    assert "HybridLayer(bf16, max_len=" in str(caches[1].layers)
    for part in ids.split(chunks, 1):
        with torch.no_grad():
            expected, actual = (model(part, past_key_values=cache).logits for cache in caches)
        torch.testing.assert_close(actual, expected)


def test_tokens_without_room_leave_a_linear_state_before_packed_layers_as_it_was():
    layers = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
    linear = {f"linear_{name}": 4 for name in ("num_value_heads", "num_key_heads", "conv_kernel_dim")}
    dims = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    experts = {name: 32 for name in ("moe_intermediate_size", "shared_expert_intermediate_size")}
    experts |= {"num_experts": 4, "num_experts_per_tok": 2}
    model = build("qwen3_next", torch.float32, **layers, **linear, **dims, **experts)
    ids = torch.randint(3, 99, (2, 15))
    caches = DynamicCache(config=model.config), TurboQuantCache(model.config, 16, kv_format="bf16")
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :14], past_key_values=cache)
        with pytest.raises(CacheFullError):
            model(ids[:, :3], past_key_values=caches[1])
        expected, actual = (model(ids[:, 14:], past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-3)


def test_layers_with_keys_of_different_sizes():
    sizes = {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    }
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    model = build("gemma4_text", torch.float32, **sizes, **per_layer, **layers)
    cache = TurboQuantCache(model.config, MAX_LEN, max_batch_size=2, device="cpu")
    sliding, packed = cache.layers
    assert sliding.keys.shape == (2, 2, 8, 16)
    beside = 2 * (32 + 16 * 2 * 32) * 4  # a mean, 4 + 12 exact tokens: float32
    assert packed.nbytes == KVFormat("k4v4", 32).cache_bytes(2, 1, MAX_LEN) + beside
    expected = generate(model, TurboQuantCache(model.config, MAX_LEN), padded_batch())
    assert torch.equal(generate(model, cache, padded_batch()), expected)


def test_a_sliding_only_model_is_not_packed():
    model = build("mistral", sliding_window=6)
    cache = TurboQuantCache(model.config, MAX_LEN)
    assert {type(layer) for layer in cache.layers} == {SlidingLayer}
    expected = generate(model, StaticCache(model.config, MAX_LEN), padded_batch())
    assert torch.equal(generate(model, cache, padded_batch()), expected)


def test_a_bias_as_long_as_the_tokens_held_keeps_the_cache_out_of_graphs(caplog):
    config = AutoConfig.for_model(
        "bloom", n_layer=2, n_head=4, hidden_size=64, vocab_size=99, eos_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 99, (2, 6))
    with caplog.at_level(logging.WARNING, logger="tq_inductor"):
        caches = [TurboQuantCache(config, 32) for _ in range(2)]
    assert "ALiBi is as long as the tokens held" in caplog.text
    expected = model.generate(ids, past_key_values=caches[0], max_new_tokens=6, do_sample=False)
    model.compile(backend="turboquant")
    got = model.generate(ids, past_key_values=caches[1], max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected)


def test_a_cache_that_packs_nothing_says_so(caplog):
    config = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=8)
    with caplog.at_level(logging.WARNING, logger="tq_inductor"):
        TurboQuantCache(config, MAX_LEN)
    assert "0 of 2 layers are packed" in caplog.text


def test_latent_attention_is_kept_in_16_bits(caplog):
    model = build(
        "deepseek_v3", torch.float32, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4, n_routed_experts=4,
        first_k_dense_replace=2,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="tq_inductor"):
        cache = TurboQuantCache(model.config, MAX_LEN)
    assert "multi-head latent attention caches latents" in caplog.text
    assert {layer.kv_format for layer in cache.layers} == {"bf16"}
    out = generate(model, cache, padded_batch())
    assert torch.equal(out[:, 12:15], generate(model, DynamicCache(), padded_batch())[:, 12:15])


def test_self_attention_cache_of_an_encoder_decoder_model():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, forced_eos_token_id=None,
        decoder_start_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    ids = torch.randint(3, 99, (2, 9))
    outputs = []
    for own in (DynamicCache(), TurboQuantCache(config, MAX_LEN, kv_format="bf16")):
        cache = EncoderDecoderCache(own, DynamicCache())
        outputs.append(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False))
    assert torch.equal(outputs[0][:, :4], outputs[1][:, :4])


def test_batch_operations():
    cache = TurboQuantCache(build("llama").config, MAX_LEN, kv_format="bf16")
    k, v = torch.randn(2, 3, 2, 7, 16, dtype=torch.bfloat16)
    for layer in range(2):
        cache.update(k, v, layer)
    assert torch.equal(cache.layers[0].keys, k)
    assert torch.equal(cache.layers[1].values, v)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[0].keys, k[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 1]))
    assert torch.equal(cache.layers[1].values, v[[2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, k[[2, 2, 0, 0]])
    cache.crop(-3)
    assert torch.equal(cache.layers[0].keys, k[[2, 2, 0, 0], :, :4])
    cache.crop(0)
    assert int(cache.get_seq_length()) == 4
    cache.crop(-9)
    assert cache.get_seq_length() == 0


STATES = {
    "lfm2": {"layer_types": ["full_attention", "conv"], "block_multiple_of": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    **HYBRIDS,
}


@pytest.mark.parametrize("name", STATES)
def test_batch_operations_beside_other_layers(name):
    model = build(name, torch.float32, **STATES[name])
    ids = torch.randint(3, 99, (2, 12))
    cache, expected = (TurboQuantCache(model.config, MAX_LEN, kv_format="bf16") for _ in range(2))
    with torch.no_grad():
        model(ids[:, :11], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([3, 0, 2]))
        model(ids[[1, 0, 0], :11], past_key_values=expected)
        actual, expected = (
            model(ids[[1, 0, 0], 11:], past_key_values=each).logits for each in (cache, expected)
        )
    torch.testing.assert_close(actual, expected)
    assert cache.batch_size == 3


@pytest.mark.parametrize("name", STATES)
def test_a_crop_that_one_layer_refuses_leaves_all_as_they_were(name):
    model = build(name, torch.float32, **STATES[name])
    cache = TurboQuantCache(model.config, MAX_LEN)
    with torch.no_grad():
        model(torch.randint(3, 99, (1, 12)), past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot crop"):
        cache.crop(-3)
    lengths = {int(x.get_seq_length()) for x in cache.layers if hasattr(x, "get_seq_length")}
    assert lengths == {12}


def test_sliding_layers_are_cropped_or_say_why_not():
    layer = SlidingLayer(MAX_LEN, 8)
    k = torch.randn(1, 2, 6, 16)
    layer.update(k, k)
    layer.crop(-2)
    keys, _ = layer.update(k[:, :, :1], k[:, :, :1])
    assert torch.equal(keys[:, :, :5], torch.cat([k[:, :, :4], k[:, :, :1]], 2))
    layer.update(k, k)
    with pytest.raises(RuntimeError, match=r"kept the last 8 only.*activate_past_recording"):
        layer.crop(-1)
    rollback = layer.rollback_layer()
    assert rollback.get_seq_length() == 11
    assert rollback.keys.shape[2] == 7  # a dynamic layer holds one token less than its window


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k4v4", "bf16"])
def test_cuda_graph_replays_equal_eager(name):
    model = build("llama", device="cuda", hidden_size=256, intermediate_size=256)
    ids = padded_batch("cuda")["input_ids"].clamp(min=2)

    def cache():
        return TurboQuantCache(
            model.config, 256, kv_format=name, max_batch_size=2, device="cuda", dtype=torch.bfloat16,
            recent_tokens=5 if name == "k4v4" else 0,
        )  # fmt: skip

    expected = decode_logits(model, model, cache(), ids, 10)
    counters.clear()
    options = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
    compiled = torch.compile(model, backend="turboquant", options=options)
    with torch.no_grad():
        packed = cache()
        got = [compiled(ids, past_key_values=packed).logits[:, -1].clone()]
        for i in range(10):
            torch.compiler.cudagraph_mark_step_begin()
            got.append(compiled(ids[:, i : i + 1], past_key_values=packed).logits[:, -1].clone())
    assert (torch.stack(got) - expected).abs().max() <= 0.05 * expected.abs().max()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert int(packed.get_seq_length()) == 22
