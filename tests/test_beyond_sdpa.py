"""Attention that SDPA has no arguments for: sinks and softcap."""

import pytest
import torch
from spelling import AUTO, INF, MIN, assert_left, causal, changed, compiled, float_mask, qkv
from torch.nn import functional as F
from tq_inductor.lowering.beyond_sdpa import find_calls_beyond_sdpa
from tq_inductor.lowering.rewrite import rewrite

from tq_inductor import PackedKVCache


def gpt_oss(q, k, v, sinks, mask=0.0, change=torch.add, last=1):
    scores = change(torch.matmul(q, k.transpose(2, 3)) * 0.3, mask)
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    weights = F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-last]
    weights = F.dropout(weights, p=0.0, training=False).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def gemma2(q, k, v, mask):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = torch.tanh(scores / 5.0) * 5.0 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=False), v).transpose(1, 2).contiguous()


@pytest.mark.parametrize("name", ["sinks", "softcap"])
def test_what_sdpa_has_no_arguments_for_is_found(name):
    found = []

    def backend(gm, example_inputs):
        found.extend(find_calls_beyond_sdpa(gm.graph))
        found.extend(rewrite(gm, AUTO).rows)
        return gm.forward

    fn, sinks = (gpt_oss, [torch.randn(4)]) if name == "sinks" else (gemma2, [])
    args = (*qkv(), *sinks, torch.where(causal(), 0.0, MIN)[None, None])
    result = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(result, fn(*args))
    call, row = found
    assert (call.scale, call.enable_gqa, call.is_causal) == (pytest.approx(0.3), False, False)
    nodes = (call.query, call.key, call.value, call.attn_mask)
    assert [node.target for node in nodes] == ["L_q_", "L_k_", "L_v_", "L_mask_"]
    assert call.node.target is torch.matmul
    if name == "sinks":
        assert call.sinks.target == "L_sinks_"
        assert call.softcap is None
        assert (row.backend, row.rewritten) == ("triton", True)
        assert row.not_chosen["sdpa"] == ["attention sinks: scaled_dot_product_attention has none"]
    else:
        assert call.sinks is None
        assert call.softcap == 5.0
        assert (row.backend, row.rewritten) == ("triton", True)
        assert row.not_chosen["sdpa"] == ["softcap=5.0: scaled_dot_product_attention has none"]


def test_softcap_over_a_packed_cache():
    caches = [PackedKVCache(2, 2, 16, 32, dtype=torch.float32, device="cpu") for _ in range(2)]

    def step(cache, q, k, v):
        keys, values = cache.update(k, v)
        keys, values = (x[:, :, None].expand(2, 2, 2, 32, 16).reshape(2, 4, 32, 16) for x in (keys, values))
        mask = torch.where(torch.arange(32) < cache.seq_length, 0.0, MIN)
        return gemma2(q, keys, values, mask[None, None, None])

    q, (k, v) = torch.randn(2, 4, 1, 16), qkv(2, 2, 1, 16, n=2)
    for cache in caches:
        torch.manual_seed(0)
        cache.update(*qkv(2, 2, 20, 16, n=2))  # enough for a mean, which the softcap must see
    targets, rows, result = compiled(step, caches[0], q, k, v)
    assert [row.backend for row in rows] == ["turboquant"]
    assert "tq_decode.default" in targets
    torch.testing.assert_close(result, step(caches[1], q, k, v), rtol=1e-4, atol=1e-4)


def test_look_alikes_of_softcap():
    reason = "softcap: the scores are more than scaled, capped and masked once"
    assert_left(reason, changed(lambda s: (s + float_mask).tanh() * 5), *qkv())
    assert_left(reason, changed(lambda s: s.tanh().tanh()), *qkv())
    assert_left("softcap=-5.0 (needs a positive number)", changed(lambda s: s.tanh() * -5), *qkv())
    assert_left("scale=-5.0 (needs a positive number)", changed(lambda s: (s * -1).tanh() * 5), *qkv())
    reason = "scores become the tanh of what they are less their maximum"
    assert_left(reason, changed(lambda s: (s - s.amax(-1, keepdim=True)).tanh() * 5), *qkv())


@pytest.mark.parametrize(
    ("reason", "fn"),
    {
        "the attention weights are changed by getitem": lambda q, k, v, s: gpt_oss(
            q, k, v[:, :, :-1], s, last=2
        ),
        "a column is appended to the scores or dropped": lambda q, k, v, s: (
            (q @ k.mT).softmax(-1)[..., :-1] @ v[:, :, :-1]
        ),
        "the scores are changed by cat": lambda q, k, v, s: (
            torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v
        ),
        "sinks are appended to scores less their maximum": lambda q, k, v, s: gpt_oss(
            q, k, v, s, change=lambda scores, mask: scores - scores.amax(-1, keepdim=True)
        ),
        "attention sinks: the scores are more than scaled, capped and masked once": lambda q, k, v, s: (
            gpt_oss(q, k, v, s, ~causal(), lambda scores, mask: scores.masked_fill(mask, -INF))
        ),
    }.items(),
)
def test_look_alikes_of_sinks(reason, fn):
    assert_left(reason, fn, *qkv(), torch.randn(4))
