"""Snapshots of what attention becomes in the graphs of real models: every attention op and cache write."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx
from tq_inductor.lowering.rewrite import rewrite
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    WhisperConfig,
    WhisperModel,
)

from tq_inductor import TurboQuantCache

SHOWN = (
    "scaled_dot_product_attention", "attend", "tq_append_attend", "tq_decode", "tq_store", "tq_dequantize",
    "index_copy_", "roll", "copy_", "setitem",
)  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 99, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
NAMES = {
    torch.float32: "f32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
    torch.uint8: "u8",
}


def describe(value) -> str:
    if isinstance(value, fx.Node):
        value = value.meta["example_value"]
    if isinstance(value, torch.Tensor):
        return f"{NAMES[value.dtype]}[{', '.join(str(s) for s in value.shape)}]"
    return str(value)


def attention_lines(gm: fx.GraphModule) -> list[str]:
    lines = []
    for node in gm.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        name = name.removesuffix(".default")
        if node.op in ("call_function", "call_method") and name in SHOWN:
            said = {k: v for k, v in node.kwargs.items() if v not in (None, False, 0.0)}
            named = [f"{key}={describe(value)}" for key, value in sorted(said.items())]
            lines.append(f"{name}({', '.join([*map(describe, node.args), *named])})")
    return lines


def snapshot(model, *args, **kwargs) -> str:
    """The attention lines of all graphs of one call."""
    lines = []

    def backend(gm, example_inputs):
        rewrite(gm, {"prefill": "auto", "decode": "auto"})
        lines.extend(attention_lines(gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return "\n".join(lines)


def causal_lm(name: str, layers: int = 1, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL, num_hidden_layers=layers, **config)
    return AutoModelForCausalLM.from_config(config).eval()


IDS = torch.randint(3, 99, (2, 12))


def after_prompt(model, cache):
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return cache


def test_llama_prefill():
    assert_expected_inline(
        snapshot(causal_lm("llama"), IDS),
        """scaled_dot_product_attention(f32[2, 4, 12, 16], f32[2, 2, 12, 16], f32[2, 2, 12, 16], enable_gqa=True, is_causal=True, scale=0.25)""",
    )


def test_llama_decode_static():
    model = causal_lm("llama")
    cache = after_prompt(model, StaticCache(config=model.config, max_cache_len=32))
    assert_expected_inline(
        snapshot(model, IDS[:, :1], past_key_values=cache),
        """\
index_copy_(f32[2, 2, 32, 16], 2, i64[1], f32[2, 2, 1, 16])
index_copy_(f32[2, 2, 32, 16], 2, i64[1], f32[2, 2, 1, 16])
attend(f32[2, 4, 1, 16], f32[2, 2, 32, 16], f32[2, 2, 32, 16], None, i32[1, 1, 2], None, 0.25, triton)""",
    )


def test_llama_decode_dynamic():
    model = causal_lm("llama")
    cache = after_prompt(model, DynamicCache(config=model.config))
    assert_expected_inline(
        snapshot(model, IDS[:, :1], past_key_values=cache),
        """scaled_dot_product_attention(f32[2, 4, 1, 16], f32[2, 2, 13, 16], f32[2, 2, 13, 16], enable_gqa=True, scale=0.25)""",
    )


def test_llama_decode_turboquant():
    model = causal_lm("llama")
    cache = TurboQuantCache(model.config, 32, device="cpu", dtype=torch.float32, max_batch_size=2)
    after_prompt(model, cache)
    assert_expected_inline(
        snapshot(model, IDS[:, :1], past_key_values=cache),
        """tq_append_attend(u8[2, 2, 640], f32[2, 4, 1, 16], f32[2, 2, 1, 16], f32[2, 2, 1, 16], i64[], f32[16, 16], f32[16, 16], None, i32[1, 1, 2], None, k4v4, 32, 0.25, f32[2, 2, 1, 16], f32[2, 2, 16, 32], i64[], 4)""",
    )


@pytest.mark.parametrize("kind", ["static", "turboquant"])
def test_gemma3_decode(kind):
    types = ["sliding_attention", "full_attention"]
    model = causal_lm("gemma3_text", 2, sliding_window=8, layer_types=types)
    if kind == "static":
        cache = after_prompt(model, StaticCache(config=model.config, max_cache_len=32))
        assert_expected_inline(
            snapshot(model, IDS[:, :1], past_key_values=cache),
            """\
roll(f32[2, 2, 8, 16], -1, dims=-2)
roll(f32[2, 2, 8, 16], -1, dims=-2)
setitem(f32[2, 2, 8, 16], (slice(None, None, None), slice(None, None, None), index), f32[2, 2, 1, 16])
setitem(f32[2, 2, 8, 16], (slice(None, None, None), slice(None, None, None), index), f32[2, 2, 1, 16])
copy_(f32[2, 2, 8, 16], f32[2, 2, 8, 16])
copy_(f32[2, 2, 8, 16], f32[2, 2, 8, 16])
scaled_dot_product_attention(f32[2, 4, 1, 16], f32[2, 2, 8, 16], f32[2, 2, 8, 16], enable_gqa=True, scale=0.0625)
index_copy_(f32[2, 2, 32, 16], 2, i64[1], f32[2, 2, 1, 16])
index_copy_(f32[2, 2, 32, 16], 2, i64[1], f32[2, 2, 1, 16])
attend(f32[2, 4, 1, 16], f32[2, 2, 32, 16], f32[2, 2, 32, 16], None, i32[1, 1, 2], None, 0.0625, triton)""",
        )
    else:
        cache = TurboQuantCache(model.config, 32, device="cpu", dtype=torch.float32, max_batch_size=2)
        after_prompt(model, cache)
        assert_expected_inline(
            snapshot(model, IDS[:, :1], past_key_values=cache),
            """\
roll(f32[2, 2, 8, 16], -1, dims=-2)
roll(f32[2, 2, 8, 16], -1, dims=-2)
setitem(f32[2, 2, 8, 16], (slice(None, None, None), slice(None, None, None), index), f32[2, 2, 1, 16])
setitem(f32[2, 2, 8, 16], (slice(None, None, None), slice(None, None, None), index), f32[2, 2, 1, 16])
copy_(f32[2, 2, 8, 16], f32[2, 2, 8, 16])
copy_(f32[2, 2, 8, 16], f32[2, 2, 8, 16])
scaled_dot_product_attention(f32[2, 4, 1, 16], f32[2, 2, 8, 16], f32[2, 2, 8, 16], enable_gqa=True, scale=0.0625)
tq_append_attend(u8[2, 2, 640], f32[2, 4, 1, 16], f32[2, 2, 1, 16], f32[2, 2, 1, 16], i64[], f32[16, 16], f32[16, 16], None, i32[1, 1, 2], None, k4v4, 32, 0.0625, f32[2, 2, 1, 16], f32[2, 2, 16, 32], i64[], 4)""",
        )


def test_bert_with_padding():
    config = AutoConfig.for_model(
        "bert",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=99,
    )
    model = AutoModel.from_config(config).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    assert_expected_inline(
        snapshot(model, IDS, attention_mask=mask),
        """scaled_dot_product_attention(f32[2, 4, 12, 16], f32[2, 4, 12, 16], f32[2, 4, 12, 16], attn_mask=bool[2, 1, 12, 12], scale=0.25)""",
    )


def test_whisper_decoder():
    config = WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperModel(config).eval()
    cache = EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=24), StaticCache(config=config, max_cache_len=16)
    )
    with torch.no_grad():
        encoded = model.encoder(torch.randn(2, 8, 32))
        model.decoder(IDS[:, :4], encoder_hidden_states=encoded[0], past_key_values=cache)
    step = snapshot(model.decoder, IDS[:, 4:5], encoder_hidden_states=encoded[0], past_key_values=cache)
    assert_expected_inline(
        step,
        """\
index_copy_(f32[2, 4, 24, 16], 2, i64[1], f32[2, 4, 1, 16])
index_copy_(f32[2, 4, 24, 16], 2, i64[1], f32[2, 4, 1, 16])
attend(f32[2, 4, 1, 16], f32[2, 4, 24, 16], f32[2, 4, 24, 16], None, i32[1, 1, 2], None, 1.0, triton)
scaled_dot_product_attention(f32[2, 4, 1, 16], f32[2, 4, 16, 16], f32[2, 4, 16, 16], scale=1.0)""",
    )
