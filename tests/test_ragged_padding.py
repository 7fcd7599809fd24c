"""Padded batches as ragged sequences: exact for any mask over keys; on a CPU the ops run the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F
from tq_inductor.lowering.rewrite import rewrite

import tq_inductor.ops  # noqa: F401
from tq_inductor.attention import select, torch_flash
from tq_inductor.attention.call import AttentionCall
from tq_inductor.errors import NoAttentionBackendError

OPS = torch.ops.tq_inductor
B, H, HKV, L, D = 4, 4, 2, 9, 16
PADDED = AttentionCall(
    2, 512, 512, 32, 8, 128, 128, torch.bfloat16, "cuda", (9, 0), mask="bool", padding="full", cached=False,
    visible="padding", interval=True,
)  # fmt: skip


@pytest.fixture
def willing(monkeypatch):
    """`torch_flash` says that it can run any call that is described to it as of bf16 on an H200."""

    def why_not(call):
        facts = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16}
        return torch_flash.why_not(dataclasses.replace(call, **facts))

    backends = tuple(
        dataclasses.replace(b, why_not=why_not) if b.name == "torch_flash" else b for b in select.BACKENDS
    )
    monkeypatch.setattr(select, "BACKENDS", backends)


def qkv(q_len=L):
    shapes = ((q_len, H), (L, HKV), (L, HKV))
    return [torch.randn(B, n, heads, D).transpose(1, 2) for n, heads in shapes]


PADDINGS = {
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9, [1] + [0] * 8, [1, 1, 1, 0, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 0, 0, 1, 1, 1, 1], [1] * 9, [0] * 8 + [1], [0, 0, 0, 1, 1, 1, 1, 1, 1]],
    "holes": [[0, 1, 0, 0, 1, 0, 1, 1, 0], [1] * 9, [1, 0] * 4 + [1], [0, 1] * 4 + [0]],
    "an empty row": [[0, 0, 1, 1, 1, 1, 1, 0, 0], [0] * 9, [1] * 9, [0] * 9],
    "nothing at all": [[0] * 9] * 4,
}


def padding(name):
    return torch.tensor(PADDINGS[name]).bool()


def full(q, k, v, real):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None], enable_gqa=True)


def causal(q, k, v, real):
    """With repeated heads, as transformers writes it."""
    k, v = (x[:, :, None].expand(-1, -1, H // HKV, -1, -1).reshape(B, H, L, D) for x in (k, v))
    at = torch.arange(L)
    mask = (at[None, None, None, :] <= at[None, None, :, None]) & real[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def compiled(f, *args, name="torch_flash"):
    """(result, graph) with a named backend; nothing is guarded on, nothing falls out of the graph."""
    graphs = []

    def backend(gm, example_inputs):
        rows = rewrite(gm, dict.fromkeys(("prefill", "decode"), name)).rows
        assert {row.backend for row in rows} == {name}
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(f, backend=backend, fullgraph=True)(*args)
    return result, graphs[0]


def calls(graph, function):
    return [node for node in graph.nodes if node.target is function]


@pytest.mark.usefixtures("willing")
@pytest.mark.parametrize("name", PADDINGS)
@pytest.mark.parametrize("f", [full, causal])
def test_every_query_gets_what_eager_gives(f, name):
    args = (*qkv(), padding(name))
    result, graph = compiled(f, *args)
    torch.testing.assert_close(result, f(*args), rtol=1e-4, atol=1e-5)
    assert len(calls(graph, OPS.varlen_attn.default)) == 1
    assert not calls(graph, F.scaled_dot_product_attention)


@pytest.mark.usefixtures("willing")
def test_cross_attention():
    args = (*qkv(q_len=5), padding("right"))
    result, _ = compiled(full, *args)
    torch.testing.assert_close(result, full(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("willing")
def test_one_mask_for_all_rows_and_a_mask_of_numbers():
    q, k, v = qkv()

    def f(q, k, v, real):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=real, enable_gqa=True)

    for real in (padding("holes")[:1], padding("holes")[:1, None, None]):
        result, _ = compiled(f, q, k, v, real)
        torch.testing.assert_close(result, f(q, k, v, real), rtol=1e-4, atol=1e-5)

    def g(q, k, v, real):
        bias = torch.zeros(B, 1, 1, L).masked_fill(~real[:, None, None], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)

    real = padding("left")
    result, _ = compiled(g, q, k, v, real)
    torch.testing.assert_close(result, g(q, k, v, real), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("willing")
@pytest.mark.parametrize("f", [full, causal])
def test_the_layout_is_the_one_of_sdpa(f):
    """Dynamo has traced `view`s of it."""

    def flat(q, k, v, real):
        return f(q, k, v, real).transpose(1, 2).contiguous().view(B, L, H * D)

    for args in (qkv(), [x.contiguous() for x in qkv()]):
        result, _ = compiled(flat, *args, padding("left"))
        torch.testing.assert_close(result, flat(*args, padding("left")), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("willing")
@pytest.mark.parametrize("f", [full, causal])
def test_layers_share_what_is_counted(f):
    def three(q, k, v, real):
        for _ in range(3):
            q = f(q, k, v, real)
        return q

    args = (*qkv(), padding("holes"))
    result, graph = compiled(three, *args)
    torch.testing.assert_close(result, three(*args), rtol=1e-4, atol=1e-5)
    assert len(calls(graph, torch.scatter)) == 1
    assert len([n for n in graph.nodes if n.target == "masked_fill"]) == (f is causal)


@pytest.mark.usefixtures("willing")
def test_the_graph():
    _, graph = compiled(causal, *qkv(), padding("left"))
    found = []
    for node in graph.nodes:
        if node.target in (OPS.varlen_attn.default, OPS.attend.default):
            values = [n.meta["example_value"] if isinstance(n, torch.fx.Node) else n for n in node.args]
            said = [str(list(x.shape) if isinstance(x, torch.Tensor) else x) for x in values]
            found += [f"{node.target}", f"    {' '.join(said)}"]
    assert_expected_inline(
        "\n".join(found),
        """\
tq_inductor.varlen_attn.default
    [36, 4, 16] [36, 2, 16] [36, 2, 16] [5] [5] 9 9 True 0.25 torch_flash
tq_inductor.attend.default
    [4, 4, 9, 16] [4, 2, 9, 16] [4, 2, 9, 16] [4, 1, 1, 9] [4, 9, 4] None 0.25 triton""",
    )


@pytest.mark.usefixtures("willing")
def test_a_number_of_tokens_that_is_not_known_is_refused():
    args = [*qkv(), padding("left")]
    for x, dim in zip(args, (2, 2, 2, 1), strict=True):
        torch._dynamo.mark_dynamic(x, dim)
    with pytest.raises(NoAttentionBackendError, match=r"padding\) is more than alignment and window"):
        compiled(full, *args)


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("torch_flash", {}, ""),
        ("torch_flash", {"padding": "causal"}, ""),
        ("torch_flash", {"padding": ""}, "mask (bool: padding) is more than alignment and window"),
        ("torch_flash", {"softcap": 30.0}, "softcap=30.0 with padding: ragged sequences have none"),
        ("torch_flash", {"sinks": True}, "attention sinks with padding: ragged sequences have none"),
        ("torch_flash", {"needs_grad": True}, "a gradient is needed"),
        ("torch_flash", {"dtype": torch.float32}, "dtype float32"),
        ("torch_flash", {"capability": (7, 5)}, "architecture sm75"),
        ("cudnn", {}, "mask (bool: padding) is more than alignment and window"),
        ("flashinfer", {}, "in the graph: plan() needs lengths on the host"),
    ],
)
def test_who_takes_padding(name, facts, reason):
    reasons = "; ".join(select.BY_NAME[name].why_not(dataclasses.replace(PADDED, **facts)))
    assert reason in reasons
    assert bool(reasons) == bool(reason)
