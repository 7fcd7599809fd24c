"""Other spellings of attention become `scaled_dot_product_attention`, exactly, or are left with a reason.

The families of hand-written attention are those of PyTorch's own `test/inductor/test_fused_attention.py`.
"""

import math
import random

import pytest
import torch
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from tq_inductor.lowering.beyond_sdpa import find_calls_beyond_sdpa
from tq_inductor.lowering.rewrite import rewrite

from tq_inductor import explain
from tq_inductor.errors import NoAttentionBackendError

AUTO = {"prefill": "auto", "decode": "auto"}
INF, MIN = float("inf"), torch.finfo(torch.float32).min


def qkv(*shape, n=3, dtype=torch.float32):
    return [torch.randn(shape or (2, 4, 6, 8), dtype=dtype) for _ in range(n)]


def causal(n=6):
    return torch.ones(n, n, dtype=torch.bool).tril()


def compiled(fn, *args, dynamic=None, grad=False):
    """(targets of the rewritten graphs, rows of the report, result)."""
    torch._dynamo.reset()
    targets, rows = [], []

    def backend(gm, example_inputs):
        rows.extend(rewrite(gm, AUTO).rows)
        for module in gm.modules():
            if isinstance(module, torch.fx.GraphModule):
                module.graph.lint()
                targets.extend(getattr(n.target, "__name__", str(n.target)) for n in module.graph.nodes)
        return gm.forward

    with torch.set_grad_enabled(grad):
        result = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return targets, rows, result


def assert_rewritten(
    fn, *args, gone=("softmax", "matmul", "bmm", "baddbmm", "einsum"), backend="sdpa", **kwargs
):
    """`fn(*args)` becomes one SDPA, or what follows made of it, with the same result and layout."""
    targets, rows, result = compiled(fn, *args, **kwargs)
    expected = fn(*args)
    assert [row.backend for row in rows] == [backend], [row.not_chosen for row in rows]
    assert targets.count("scaled_dot_product_attention") == (backend == "sdpa")
    assert not set(gone) & set(targets)
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert result.is_contiguous() or result.stride() == expected.stride()
    return targets


def assert_left(reason, fn, *args, **kwargs):
    """`fn(*args)` stays as it is, and the report says why."""
    torch.manual_seed(0)
    targets, rows, result = compiled(fn, *args, **kwargs)
    torch.manual_seed(0)
    expected = fn(*args)
    assert [row.backend for row in rows] == ["none"]
    assert not rows[0].rewritten
    assert reason in rows[0].not_chosen["sdpa"][0]
    assert "scaled_dot_product_attention" not in targets
    torch.testing.assert_close(result, expected, equal_nan=True)


def heads_first(*tensors):
    return [x.permute(0, 2, 1, 3) for x in tensors]


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
        weights = scores.softmax(dim=-1)
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
    assert backends == {"sdpa", "none"}


def plain(q, k, v):
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def test_einsum_in_the_usual_layouts():
    def heads_first(q, k, v):
        weights = F.softmax(torch.einsum("bhid, bhjd -> bhij", q, k) * 0.3, dim=-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)

    def heads_second(q, k, v):
        weights = (0.3 * torch.einsum("bqhd,bkhd->bhqk", q, k)).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    def keys_first(q, k, v):
        return torch.einsum("bij,bjd->bid", torch.einsum("bjd,bid->bij", k, q).softmax(-1), v)

    assert_rewritten(heads_first, *qkv())
    assert_rewritten(heads_second, *qkv())
    assert_rewritten(keys_first, *qkv(3, 5, 8))


def test_key_without_a_transpose_in_the_graph():
    q, k, v = qkv()
    assert_rewritten(lambda q, k, v: (q @ k).softmax(-1) @ v, q, k.mT.contiguous(), v)


def test_baddbmm_with_and_without_its_input():
    def diffusers(q, k, v):
        scores = torch.baddbmm(torch.empty(8, 6, 6), q, k.transpose(-1, -2), beta=0, alpha=0.3)
        return torch.bmm(scores.softmax(dim=-1), v)

    def bloom(q, k, v, alibi):
        q3, k3, v3 = (x.reshape(8, -1, 8) for x in (q, k, v))
        scores = alibi.baddbmm(batch1=q3, batch2=k3.transpose(-1, -2), beta=0.5, alpha=0.3)
        scores = scores.view(2, 4, 6, -1) + torch.where(causal(), 0.0, MIN)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights.view(8, 6, -1), v3)

    assert_rewritten(diffusers, *qkv(8, 6, 8))
    assert_rewritten(bloom, *qkv(), torch.randn(8, 1, 6))
    reason = "the number of heads is not known at compile time"
    assert_left(reason, bloom, *qkv(), torch.randn(8, 1, 6), dynamic=True)
    assert_rewritten(bloom, *qkv(), torch.randn(1, 1, 6))


def test_scale_after_a_bias_scales_the_bias():
    def falcon(q, k, v, alibi):
        scores = (q @ k.transpose(-1, -2)).view(2, 4, 6, 6) + alibi.view(2, 4, 1, -1)
        scores *= 0.3
        return F.softmax(scores + torch.where(causal(), 0.0, MIN), dim=-1) @ v

    assert_rewritten(falcon, *qkv(), torch.randn(8, 6))


def test_bias_of_another_product():
    def transformer_xl(q, k, v, r):
        return ((q @ k.mT + q @ r.mT) * 0.3).softmax(-1) @ v

    assert_rewritten(transformer_xl, *qkv(n=4), gone=["softmax"])


def test_steps_in_place():
    def xlm(q, k, v, bias):
        scores = torch.matmul(q, k.transpose(2, 3))
        scores /= 3.0
        bias = bias * 2
        bias += 1
        scores.add_(bias)
        hidden = ~causal()
        scores.masked_fill_(hidden.expand_as(scores), -INF)
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        return torch.matmul(weights, v)

    assert_rewritten(xlm, *qkv(), torch.randn(6))


def test_one_kv_head_for_all():
    targets = assert_rewritten(plain, *qkv(2, 4, 6, 8, n=1), *qkv(2, 1, 6, 8, n=2))
    assert targets.count("expand") == 0


def test_repeated_kv_heads_stay_visible():
    def eager_attention_forward(q, k, v, mask):
        k, v = (x[:, :, None, :, :].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8) for x in (k, v))
        weights = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = F.dropout(weights, p=0.1, training=False)
        return torch.matmul(weights, v).transpose(1, 2).contiguous()

    mask = torch.where(causal(), 0.0, MIN)
    mask[0] = MIN  # all keys alike
    args = (*qkv(n=1), *qkv(2, 2, 6, 8, n=2), mask[None, None])
    assert_rewritten(eager_attention_forward, *args)
    args = [x.bfloat16() for x in args]
    assert_rewritten(eager_attention_forward, *args)


@pytest.mark.parametrize("dynamic", [None, True])
def test_layout_of_the_result_is_kept(dynamic):
    # SDPA's own result is laid out as [B, q, H, D]: this view would fail.
    assert_rewritten(lambda q, k, v: plain(q, k, v).view(8, 6, 8), *qkv(), dynamic=dynamic)
    assert_rewritten(lambda q, k, v: plain(q, k, v).transpose(1, 2).reshape(2, 6, -1), *qkv())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fully_masked_rows_are_nan_as_in_eager(dtype):
    mask = causal()
    mask[2] = False

    def filled(q, k, v):
        return (q @ k.mT * 0.3).masked_fill(~mask, -INF).softmax(-1) @ v

    def selected(q, k, v):
        return torch.where(mask[None], q @ k.mT * 0.3, -INF).softmax(-1) @ v

    def added(q, k, v):
        return (q @ k.mT * 0.3 + torch.where(mask, 0.0, -INF).to(q.dtype)).softmax(-1) @ v

    def twice(q, k, v):
        scores = (q @ k.mT * 0.3).masked_fill(~causal(), -INF)
        return (scores.masked_fill(torch.arange(6) < 2, -INF) + torch.ones(6, dtype=dtype)).softmax(-1) @ v

    for fn in (filled, selected, added, twice):
        args = qkv(dtype=dtype)
        assert fn(*args).isnan().any()
        assert_rewritten(fn, *args, backend="triton" if fn is twice else "sdpa")  # hides keys 0 and 1


def test_large_finite_numbers_leave_fully_masked_rows_uniform():
    mask = causal()
    mask[2] = False

    def f(q, k, v):
        return (q @ k.mT * 0.3).masked_fill(~mask, MIN).softmax(-1) @ v

    args = qkv()
    assert torch.allclose(f(*args)[:, :, 2], args[2].mean(-2), atol=1e-5)
    assert_rewritten(f, *args)
    # Here a score survives the sum with the number: to add is not to replace.
    for lowest in (-1e4, -1e9):
        assert_left(
            f"masked scores become {lowest}",
            lambda q, k, v, lowest=lowest: (q @ k.mT).masked_fill(~mask, lowest).softmax(-1) @ v,
            *qkv(),
        )


def test_gradients_are_those_of_eager():
    def f(q, k, v, bias):
        return ((q @ k.mT + bias) * 0.3).masked_fill(~causal(), -INF).softmax(-1) @ v

    args = [x.requires_grad_() for x in (*qkv(), torch.randn(1, 4, 6, 6))]
    _, rows, result = compiled(f, *args, grad=True)
    assert [row.backend for row in rows] == ["sdpa"]
    for ours, eager in zip(
        torch.autograd.grad(result.square().sum(), args),
        torch.autograd.grad(f(*args).square().sum(), args),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["query", "mask", "query behind a copy"])
def test_changes_before_the_end(what):
    def f(q, k, v, mask):
        q = q.clone()
        q3 = q.transpose(1, 2).reshape(8, 6, 8) if what == "query behind a copy" else q.view(8, 6, 8)
        scores = torch.bmm(q3, k.view(8, 6, 8).mT).view(2, 4, 6, 6) + mask
        (mask if what == "mask" else q).mul_(2)
        return torch.bmm(scores.softmax(-1).view(8, 6, 6), v.view(8, 6, 8))

    args = (*qkv(), torch.zeros(6, 6))
    if what == "query behind a copy":
        assert_rewritten(f, *args)
    else:
        assert_left("changes an input of the attention before its end", f, *args)


def test_the_lowest_float32_is_not_minus_infinity_in_bfloat16():
    mask = causal()
    mask[2] = False

    def f(q, k, v):
        scores = (q @ k.mT).float().masked_fill(~mask, MIN)
        return scores.softmax(-1).to(q.dtype) @ v

    args = qkv(dtype=torch.bfloat16)
    assert not f(*args).isnan().any()
    assert_rewritten(f, *args)
    half = qkv(dtype=torch.float16)
    assert_left("masked scores become -3.4028234663852886e+38, which no mask does exactly", f, *half)
    assert_left(
        "a mask of torch.float32 is added to the scores, but q is torch.bfloat16",
        lambda q, k, v: ((q @ k.mT).float() + torch.zeros(6)).softmax(-1).to(q.dtype) @ v,
        *args,
    )
    assert_left(
        "the mask is computed in torch.float32, but q is torch.bfloat16",
        lambda q, k, v: (((q @ k.mT).float() + q[..., :1]) * 0.3).softmax(-1).to(q.dtype) @ v,
        *args,
    )


def test_autocast_changes_types():
    def f(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(q, k, v)

    assert_left("v is torch.float32, the result torch.bfloat16", f, *qkv())
    assert_rewritten(f, *qkv(dtype=torch.bfloat16))


def test_chosen_sdpa_backends_are_not_for_hand_written_attention():
    def f(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return plain(q, k, v)

    assert_left("inside torch.nn.attention.sdpa_kernel(FLASH_ATTENTION)", f, *qkv())


def test_tensors_that_are_more_than_that():
    assert_left("is no plain tensor (inside vmap", lambda q, k, v: torch.vmap(plain)(q, k, v), *qkv())


def test_arguments_by_keyword():
    def softmax(q, k, v):
        return F.softmax(input=torch.add(input=q @ k.mT, other=torch.zeros(6)), dim=-1) @ v

    def matmul(q, k, v):
        return torch.matmul(input=q, other=k.mT).softmax(dim=-1) @ v

    assert_rewritten(softmax, *qkv())
    assert_left("matmul with other arguments than two tensors", matmul, *qkv())


def test_shapes_that_sdpa_does_not_take():
    q, k, v = qkv()
    assert_left("batches and heads broadcast: q=[2, 4]", plain, q, k[:1], v[:1])
    assert_left("batches and heads broadcast: q=[1, 4]", plain, q[:1], k, v)
    assert_left("the scores have 5 dimensions (needs 3 or 4)", plain, q[None], k[None], v[None])
    assert_left("the scores have 2 dimensions (needs 3 or 4)", plain, q[0, 0], k[0, 0], v[0, 0])
    assert_left(
        "the scores are changed by add, which gives them another shape",
        lambda q, k, v: (q @ k.mT + torch.zeros(3, 1, 6, 6)).softmax(-1) @ v,
        *(x[:1] for x in (q, k)),
        v[:1].expand(3, -1, -1, -1),
    )
    assert_rewritten(lambda q, k, v: (q @ k.mT + torch.zeros(6)).softmax(-1) @ v, q, k, v)
    assert_rewritten(lambda q, k, v: (q @ k.mT + torch.zeros(4, 1, 6)).softmax(-1) @ v, q, k, v)


def test_symbolic_sizes_add_no_recompile():
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(rewrite(gm, AUTO))
        return gm.forward

    def f(q, k, v):
        mask = torch.arange(k.shape[-2]) <= torch.arange(q.shape[-2])[:, None]
        return (q @ k.mT * 0.3).masked_fill(~mask, -INF).softmax(-1) @ v

    fn = torch.compile(f, backend=backend, dynamic=True)
    for batch, length in ((2, 6), (3, 6), (3, 9), (2, 17)):
        args = qkv(batch, 4, length, 8)
        torch.testing.assert_close(fn(*args), f(*args), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert [row.backend for row in graphs[0].rows] == ["sdpa"]


def test_the_report_names_module_and_line():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return plain(q, k, v)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Attention(), Attention()])

        def forward(self, q, k, v):
            return self.layers[1](self.layers[0](q, k, v), k, v)

    report = explain(Model(), *qkv())
    assert [row.module for row in report.rows] == ["layers.0", "layers.1"]
    assert "test_spell_as_sdpa.py" in report.rows[0].source
    assert "in plain" in report.rows[0].source
    assert report.rows[0].shapes == "q=[2, 4, 6, 8] kv=[2, 4, 6, 8] float32 cpu"


def test_inductor_compiles_what_was_rewritten():
    args = qkv()
    fn = torch.compile(family_15, backend="turboquant", fullgraph=True)
    torch.testing.assert_close(fn(*args), family_15(*args), rtol=1e-4, atol=1e-5)


def test_what_is_no_attention_is_not_reported():
    weight = torch.randn(8, 8)

    def router(x):
        return (x @ weight).softmax(-1) @ weight

    def classifier(q, k, v):
        return (q @ k.mT).softmax(-1).argmax(-1)

    def gate(q, k, v):
        return q.softmax(-1) @ v.mT

    for fn, args in ((router, qkv(2, 6, 8, n=1)), (classifier, qkv()), (gate, qkv())):
        _, rows, _ = compiled(fn, *args)
        assert rows == []


def changed(before=lambda s: s, after=lambda w: w):
    return lambda q, k, v: after(before(q @ k.mT).softmax(-1)) @ v


tensor_scale = torch.tensor(0.3)
float_mask = torch.zeros(6, 6)
REFUSED = {
    "the attention weights are used elsewhere too (by sum_1)": lambda q, k, v: (
        (w := (q @ k.mT).softmax(-1)) @ v + w.sum()
    ),
    "the scores are used elsewhere too (by sum_1)": lambda q, k, v: (
        (s := q @ k.mT).softmax(-1) @ v + s.sum()
    ),
    "the scores are changed by sigmoid": changed(torch.sigmoid),
    "the scores are changed by clamp": changed(lambda s: s.clamp(min=-3)),
    "the scores are changed by relu": changed(F.relu),
    "the scores are changed by pow": changed(lambda s: s**2),
    "the scores are changed by mul, in place of a mask": changed(lambda s: torch.ones(2, 4, 6, 6).mul_(s)),
    "the scores are changed by add": changed(lambda s: torch.add(s, float_mask, alpha=2)),
    "the scores are changed by truediv": changed(lambda s: 1.0 / s),
    "the scores are changed by sub": changed(lambda s: float_mask - s),
    "the attention weights are changed by mul": changed(after=lambda w: w * 0.5),
    "the attention weights are changed by masked_fill": changed(
        after=lambda w: w.masked_fill(~causal(), 0)
    ),
    "scale is not known at compile time": changed(lambda s: s * tensor_scale),
    "scale=-1.0 (needs a positive number)": changed(lambda s: -1 * s),
    "softmax over dim=-2": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "dropout p=0.5 while training": changed(after=lambda w: F.dropout(w, 0.5)),
    "masked scores become a number that is not known": changed(
        lambda s: torch.where(causal(), s, s.detach().min())
    ),
    "half gives torch.float16, where q is torch.float32": changed(lambda s: s.half(), lambda w: w.float()),
    "softmax gives torch.float64, where q is torch.float32": lambda q, k, v: (
        (q @ k.mT).softmax(-1, dtype=torch.float64).float() @ v
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_look_alikes_are_left(reason):
    assert_left(reason, REFUSED[reason], *qkv())


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
        assert (row.backend, row.rewritten) == ("none", False)
        assert row.not_chosen["sdpa"] == ["softcap=5.0: scaled_dot_product_attention has none"]


def test_look_alikes_of_softcap():
    reason = "softcap: the scores are more than scaled, capped and masked once"
    assert_left(reason, changed(lambda s: (s + float_mask).tanh() * 5), *qkv())
    assert_left(reason, changed(lambda s: s.tanh().tanh()), *qkv())


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
        "attention sinks: the scores are more than scaled, capped and masked once": lambda q, k, v, s: (
            gpt_oss(q, k, v, s, ~causal(), lambda scores, mask: scores.masked_fill(mask, -INF))
        ),
    }.items(),
)
def test_look_alikes_of_sinks(reason, fn):
    assert_left(reason, fn, *qkv(), torch.randn(4))


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
