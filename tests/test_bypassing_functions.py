"""What bypasses SDPA is told, and every sub-graph is read."""

import pytest
import torch
from spelling import AUTO, assert_rewritten, compiled, plain, qkv
from torch._higher_order_ops import scan, while_loop
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from tq_inductor.lowering.rewrite import rewrite

from tq_inductor.errors import NoAttentionBackendError


@torch.library.custom_op("flash_attn_test::_flash_attn_forward", mutates_args=())
def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).clone()


@flash_attn.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def test_functions_that_bypass_sdpa_are_told():
    def bypass(q, k, v):
        aten = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        return aten + flash_attn(q, k, v) + flex_attention(q, k, v)

    _, rows, _ = compiled(bypass, *qkv(2, 4, 6, 8))
    assert [(row.backend, row.rewritten, row.shapes) for row in rows] == [
        ("none", False, "q=[2, 4, 6, 8] kv=[2, 4, 6, 8] float32 cpu"),
        ("none", False, "q=[2, 6, 4, 8] kv=[2, 6, 4, 8] float32 cpu"),
        ("none", False, "q=[2, 4, 6, 8] kv=[2, 4, 6, 8] float32 cpu"),
    ]
    assert [row.not_chosen["sdpa"][0].split()[0] for row in rows] == [
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "flash_attn_test._flash_attn_forward",
        "flex_attention",
    ]


def test_variable_lengths_are_told():
    from torch.nn.attention.varlen import varlen_attn

    rows = []

    def backend(gm, example_inputs):
        rows.extend(rewrite(gm, AUTO).rows)
        return lambda *args: (example_inputs[0],)

    ends = torch.tensor([0, 5, 10], dtype=torch.int32)
    x = torch.randn(10, 2, 8, dtype=torch.bfloat16)
    torch.compile(varlen_attn, backend=backend)(x, x, x, ends, ends, 5, 5)
    (row,) = rows
    assert row.not_chosen["sdpa"] == ["torch_attn._varlen_attn bypasses scaled_dot_product_attention"]
    assert row.shapes == "q=[?, ?, ?, ?] kv=[?, ?, ?, ?] bfloat16 cpu"


def test_strict_counts_what_bypasses():
    with pytest.raises(NoAttentionBackendError, match="_flash_attn_forward bypasses"):
        torch.compile(flash_attn, backend="turboquant", options={"strict": True})(*qkv())


def test_the_op_itself_is_sdpa():
    assert_rewritten(lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v), *qkv())


def sdpa_and_hand_written(q, k, v):
    return F.scaled_dot_product_attention(plain(q, k, v), k, v)


def test_every_sub_graph_is_read():
    def branches(q, k, v):
        return torch.cond(q.sum() > 0, sdpa_and_hand_written, plain, (q, k, v))

    def loop(q, k, v):
        start = torch.tensor(0)
        return while_loop(lambda i, q: i < 3, lambda i, q: (i + 1, plain(q, k, v)), (start, q))[1]

    def scanned(q, k, v):
        return scan(lambda c, x: (c + 1, plain(x, x, x)), torch.zeros(1), q)[1]

    def checkpointed(q, k, v):
        return checkpoint(sdpa_and_hand_written, q, k, v, use_reentrant=False)

    args = qkv()
    for fn, calls in ((branches, 3), (loop, 1), (scanned, 1), (checkpointed, 2)):
        targets, rows, result = compiled(fn, *args)
        assert [row.backend for row in rows] == ["sdpa"] * calls, fn
        assert targets.count("scaled_dot_product_attention") == calls
        torch.testing.assert_close(result, fn(*args), rtol=1e-4, atol=1e-5)
