"""`nn.MultiheadAttention` and the fused encoder layer become projections and SDPA."""

import pytest
import torch
from spelling import INF, assert_left, assert_rewritten, causal, compiled
from torch import nn
from torch.nn import functional as F

GONE = ("multi_head_attention_forward",)


def multi_head(**kwargs):
    module = nn.MultiheadAttention(16, 2, **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


def attended(module, **kwargs):
    return lambda *qkv: module(*qkv, need_weights=False, **kwargs)[0]


def tokens(*, batch=3, length=6, dim=16):
    return torch.randn(length, batch, dim)


PADDING = torch.zeros(3, 6, dtype=torch.bool)


PADDING[0, 4:] = True


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_self_multi_head(batch_first, bias):
    module = multi_head(batch_first=batch_first, bias=bias)
    x = tokens()
    targets = assert_rewritten(lambda x: attended(module)(x, x, x), x, gone=GONE)
    assert targets.count("linear") == 2
    assert_rewritten(lambda x: attended(module)(x, x, x), x, gone=GONE, dynamic=True)


def test_cross_attention_with_other_sizes():
    memory = tokens(length=9)
    assert_rewritten(attended(multi_head()), tokens(), memory, memory, gone=GONE)
    module = multi_head(kdim=6, vdim=7)
    assert_rewritten(
        attended(module), tokens(), tokens(length=9, dim=6), tokens(length=9, dim=7), gone=GONE
    )


FLOAT_MASK = torch.randn(6, 6)


MASKS = {
    "float": {"attn_mask": FLOAT_MASK},
    "bool": {"attn_mask": ~causal()},
    "per head": {"attn_mask": torch.randn(6, 6, 6)},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.where(PADDING, -INF, 0.0)},
    "both": {"attn_mask": ~causal(), "key_padding_mask": PADDING},
    "mixed": {"attn_mask": FLOAT_MASK, "key_padding_mask": torch.where(PADDING, -INF, 0.0)},
    "causal": {"attn_mask": ~causal(), "is_causal": True},
    "causal, padding": {"attn_mask": ~causal(), "is_causal": True, "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("name", MASKS)
def test_multi_head_masks(name):
    module, x = multi_head(), tokens()
    assert_rewritten(attended(module, **MASKS[name]), x, x.clone(), x.clone(), gone=GONE)
    # The weights are asked for, but not used.
    assert_rewritten(lambda x: module(x, x, x, **MASKS[name])[0], x, gone=GONE)


def test_bool_masks_of_the_function():
    module, x = multi_head(), tokens()

    def f(x, mask):
        return F.multi_head_attention_forward(
            x, x, x, 16, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, False, PADDING, False, mask,
        )[0]  # fmt: skip

    assert_rewritten(f, x, ~causal(), gone=GONE)


def test_causal_is_told_as_such():
    module, x = multi_head(), tokens()
    _, rows, _ = compiled(attended(module, **MASKS["causal"]), x, x, x)
    assert [row.mask for row in rows] == ["causal"]


def test_fully_masked_rows_when_weights_are_asked_for():
    module, x = multi_head(), tokens()
    mask = ~causal()
    mask[2] = True
    with torch.no_grad():
        assert module(x, x, x, attn_mask=mask)[0].isnan().any()
    assert_rewritten(lambda x: module(x, x, x, attn_mask=mask)[0], x, gone=GONE)
    assert_rewritten(attended(module, attn_mask=mask), x, x, x, gone=GONE)


def test_training_draws_the_same_random_numbers():
    module, x = multi_head(dropout=0.5).train(), tokens()
    torch.manual_seed(0)
    _, rows, result = compiled(attended(module), x, x, x, grad=True)
    assert [row.backend for row in rows] == ["sdpa"]
    torch.manual_seed(0)
    expected = attended(module)(x, x, x)
    torch.testing.assert_close(result, expected)
    weight = module.in_proj_weight
    ours, eager = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (result, expected))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_decoder_layer():
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    x, memory = torch.randn(3, 6, 16), torch.randn(3, 9, 16)
    _, rows, result = compiled(lambda x: layer(x, memory, tgt_mask=~causal(), tgt_is_causal=True), x)
    assert [row.backend for row in rows] == ["sdpa", "sdpa"]
    assert [row.module for row in rows] == ["self_attn", "multihead_attn"]
    torch.testing.assert_close(result, layer(x, memory, tgt_mask=~causal()), rtol=1e-4, atol=1e-5)


def both(module):
    return lambda x: sum(y.sum() for y in module(x, x, x))


def without_weights(x, module):
    return attended(module)(x, x, x)


@pytest.mark.parametrize(
    ("reason", "fn", "module"),
    [
        (
            "need_weights=True, and the attention weights are used",
            lambda x, module: sum(y.sum() for y in module(x, x, x)),
            multi_head(),
        ),
        (
            "need_weights=True with dropout p=0.5 while training",
            lambda x, module: module(x, x, x)[0],
            multi_head(dropout=0.5).train(),
        ),
        ("bias_k is given", without_weights, multi_head(add_bias_kv=True)),
        ("add_zero_attn=True", without_weights, multi_head(add_zero_attn=True)),
        (
            "query has no batch dimension",
            lambda x, module: without_weights(x[:, 0], module),
            multi_head(),
        ),
    ],
)
def test_multi_head_attention_left(reason, fn, module):
    assert_left(f"multi_head_attention_forward: {reason}", lambda x: fn(x, module), tokens())


def encoder_layer(**kwargs):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **kwargs).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def fused(layer, mask=None, mask_type=None):
    """What the layer calls in eval mode; whether Dynamo sees it there depends on the version."""
    attention = layer.self_attn
    return lambda x: torch._transformer_encoder_layer_fwd(
        x, 16, 2, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight,
        attention.out_proj.bias, layer.activation_relu_or_gelu == 2, layer.norm_first, layer.norm1.eps,
        layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias,
        layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
        mask, mask_type,
    )  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_fused_encoder_layer(norm_first, activation):
    layer, x = encoder_layer(norm_first=norm_first, activation=activation), torch.randn(3, 6, 16)
    with torch.no_grad():
        assert_rewritten(fused(layer), x, gone=["_transformer_encoder_layer_fwd"])
        _, rows, result = compiled(layer, x)
        assert [row.backend for row in rows] == ["sdpa"]
        torch.testing.assert_close(result, layer(x), rtol=1e-4, atol=1e-4)
        reason = "_transformer_encoder_layer_fwd: a mask whose kind the fused layer works out itself"
        assert_left(reason, fused(layer, ~causal(), 0), x)
