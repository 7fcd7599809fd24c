"""The families of hand-written attention of PyTorch's own `test/inductor/test_fused_attention.py`, and
random ones: each becomes `scaled_dot_product_attention` and gives what eager gives."""

import math
import random

import pytest
import torch
from spelling import INF, MIN, assert_rewritten, causal, compiled, heads_first, qkv
from torch.nn import functional as F


def family_1(q, k, v):
    return torch.matmul(q, k.transpose(-2, -1)).div(3.0).softmax(dim=-1).matmul(v)


def family_2(q, k, v):
    return torch.matmul(q, k.transpose(-2, -1)).mul(0.4).softmax(dim=-1).matmul(v)


def family_3(q, k, v):
    weights = torch.matmul(q, k.transpose(-2, -1)).div(3.0).softmax(dim=-1)
    return F.dropout(weights, p=0.4, training=False).matmul(v)


def family_4(q, k, v):
    weights = torch.matmul(q, k.transpose(-2, -1)).mul(0.4).softmax(dim=-1)
    return F.dropout(weights, p=0.0, training=True).matmul(v)


def family_5(q, k, v):
    mask = torch.zeros(6, 6).masked_fill(~causal(), MIN)
    return torch.softmax((q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))) + mask, dim=-1) @ v


def family_6(q, k, v):
    mask = torch.zeros(6, 6).masked_fill(~causal(), -INF)
    weights = torch.softmax((q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))) + mask, dim=-1)
    return torch.dropout(weights, 0.5, False) @ v


def family_7(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = torch.softmax((q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).to(torch.float32), dim=-1)
    return torch.dropout(weights, 0.3, False).to(torch.float16) @ v.to(torch.float16)


def family_8(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = torch.softmax((q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).to(torch.float32), dim=-1)
    return weights.to(torch.float16) @ v


def family_9(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = torch.softmax((q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)).to(torch.float32), dim=-1)
    return torch.dropout(weights, 0.3, False).to(torch.float16) @ v


def family_10(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = torch.softmax((q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)).to(torch.float32), dim=-1)
    return weights.to(torch.float16) @ v


def family_11(q, k, v):
    q, k, v = heads_first(q, k, v)
    return torch.matmul(q, k.transpose(-2, -1)).div(math.sqrt(8)).softmax(dim=-1).matmul(v)


def family_12(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = torch.matmul(q, k.transpose(-2, -1)).div(math.sqrt(8)).softmax(dim=-1)
    return F.dropout(weights, 0.4, False).matmul(v)


def family_13(q, k, v):
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(F.dropout(weights, p=0.5, training=False), v)


def family_14(q, k, v):
    q, k, v = heads_first(q, k, v)
    mask = torch.where(torch.arange(4) < 3, 0.0, -10000.0).view(1, 1, 1, 4)
    return (torch.matmul(q, k.transpose(-2, -1)).div(3.0) + mask).softmax(dim=-1).matmul(v)


def family_15(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.transpose(-2, -1)).div(3.0)
    hidden = (torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]) == 0).view(2, 1, 1, 4).expand_as(scores)
    lowest = torch.full((), -INF, dtype=q.dtype, device=q.device)
    return torch.softmax(scores.masked_fill(hidden, lowest), dim=-1) @ v


def family_16(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = (torch.matmul(q, k.transpose(-2, -1)).div(3.0) + torch.zeros(2, 1, 1, 4)).softmax(dim=-1)
    return F.dropout(weights, 0.1, False).to(dtype=q.dtype).matmul(v)


def family_17(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.transpose(-2, -1)).div(3.0)
    hidden = (torch.ones(2, 4) == 0).view(2, 1, 1, 4).expand_as(scores)
    return F.dropout(torch.softmax(scores.masked_fill(hidden, -INF), dim=-1), 0.1, False) @ v


def family_18(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    scores = scores.div(torch.full([], 3.0, dtype=scores.dtype, device=scores.device))
    lowest = torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    scores = torch.where(causal(4), scores, lowest)
    return F.dropout(scores.softmax(dim=-1), 0.2, False).matmul(v)


def family_19(q, k, v):
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)).div(torch.full([], 3.0))
    scores = torch.where(causal(), scores, torch.full((), MIN)) + torch.randn(6, generator=None) * 0
    weights = scores.softmax(dim=-1).type(v.dtype)
    return F.dropout(weights, 0.2, False).matmul(v)


def family_20(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = q.div(3.0) @ k.transpose(-2, -1)
    hidden = (torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]) == 0).view(2, 1, 1, 4).expand_as(scores)
    return F.dropout(torch.softmax(scores.masked_fill(hidden, -INF), dim=-1), 0.2, False) @ v


def family_21(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) + torch.zeros(1, 1, 4, 4)
    scores = scores.type_as(q)
    return scores.float().softmax(dim=-1).type_as(q).matmul(v)


def family_22(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    scores += torch.zeros(1, 1, 4, 4)
    return scores.float().softmax(dim=-1).type_as(scores).matmul(v)


def family_23(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)).float().type_as(q)
    return scores.float().softmax(dim=-1).type_as(q).matmul(v)


def family_24(q, k, v):
    q3, k3, v3 = q.view(8, -1, 8), k.reshape(8, -1, 8), v.reshape(8, -1, 8)
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(2, 4, 6, -1) + torch.zeros(2, 1, 6, 6)
    weights = F.softmax(scores.view(8, 6, -1), dim=-1)
    return torch.bmm(weights, v3).view(2, 4, 6, 8)


def family_25(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) + torch.zeros(1, 1, 4, 4)
    return F.dropout(scores.float().softmax(dim=-1).type_as(q), 0.1, False).matmul(v)


def family_27(q, k, v):
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    return F.dropout(scores.float().softmax(dim=-1).type_as(q), 0.1, False).matmul(v)


def family_29(q, k, v):
    q, k, v = heads_first(q, k, v)
    root = 8**-0.25
    scores = torch.mul(q, root) @ torch.mul(k.transpose(-2, -1), root) + torch.zeros(1, 1, 1, 4)
    return torch.ops.aten._safe_softmax(scores, -1) @ v


FAMILIES = {name: fn for name, fn in globals().items() if name.startswith("family_")}


HALF = ("family_7", "family_8", "family_9", "family_10")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_inductor_recognises(name):
    shape = (8, 6, 8) if name == "family_13" else (2, 4, 6, 8)
    args = qkv(*shape, dtype=torch.float16 if name in HALF else torch.float32)
    if name == "family_19":
        args = [x.abs() for x in args]
    assert_rewritten(FAMILIES[name], *args)


def random_attention(choose):
    """A random program of the forms above: some can be rewritten, some cannot."""
    masks = (causal(), torch.rand(6) < 0.7, torch.rand(2, 1, 6, 6) < 0.5, torch.rand(2, 1, 1, 6) < 0.7)
    biases = (torch.randn(6, 6), torch.randn(2, 4, 1, 6), torch.where(causal(), 0.0, -INF))
    steps = [
        choose(
            ("scale", choose((0.3, 2, -0.5, 1e-3))),
            ("divide", choose((3.0, 0.5, torch.full((), 3.0)))),
            ("add", choose(biases)),
            ("subtract", choose(biases)),
            ("add in place", choose(biases)),
            ("fill", choose(masks), choose((-INF, MIN, -1e9))),
            ("fill in place", choose(masks), choose((-INF, MIN))),
            ("select", choose(masks), choose((-INF, MIN, torch.tensor(-INF)))),
            ("less maximum",),
            ("tanh",),
            ("view",),
        )
        for _ in range(choose(range(5)))
    ]
    scaled, last = choose((True, False)), choose(("matmul", "einsum", "bmm"))
    sinks, stable = choose((None, None, torch.randn(4))), choose((True, False))

    def f(q, k, v):
        scores = (q * 0.5 if scaled else q) @ k.transpose(2, 3)
        for name, *what in steps:
            if name == "scale":
                scores = what[0] * scores
            elif name == "divide":
                scores = scores / what[0]
            elif name == "add":
                scores = what[0] + scores
            elif name == "subtract":
                scores = scores - what[0]
            elif name == "add in place":
                scores += what[0]
            elif name == "fill":
                scores = scores.masked_fill(~what[0], what[1])
            elif name == "fill in place":
                scores.masked_fill_(what[0], what[1])
            elif name == "select":
                scores = torch.where(what[0], scores, what[1])
            elif name == "less maximum":
                scores = scores - scores.amax(-1, keepdim=True)
            elif name == "tanh":
                scores = scores.tanh()
            else:
                scores = scores.reshape(8, 6, 6).view(2, 4, 6, 6)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 6, 1)], dim=-1)
            if stable:
                scores = scores - scores.amax(-1, keepdim=True)
        weights = scores.softmax(dim=-1)
        if sinks is not None:
            weights = weights[..., :-1]
        if last == "einsum":
            return torch.einsum("bhij,bhjd->bihd", weights, v)
        if last == "bmm":
            return torch.bmm(weights.view(8, 6, 6), v.reshape(8, 6, 8)).view(2, 4, 6, 8)
        return weights @ v

    return f


def test_random_attention_equals_eager():
    # Seeded by torch, whose seed pytest shows.
    draw = random.Random(torch.randint(2**31, ()).item())
    backends = set()
    for _ in range(60):
        fn = random_attention(lambda *of: draw.choice(of if len(of) > 1 else of[0]))
        args = qkv()
        _, rows, result = compiled(fn, *args)
        assert len(rows) == 1
        backends.add(rows[0].backend)
        torch.testing.assert_close(result, fn(*args), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert {"sdpa", "none"} <= backends <= {"sdpa", "none", "triton"}  # triton: softcaps and sinks


def test_inductor_compiles_what_was_rewritten():
    args = qkv()
    fn = torch.compile(family_15, backend="turboquant", fullgraph=True)
    torch.testing.assert_close(fn(*args), family_15(*args), rtol=1e-4, atol=1e-5)
