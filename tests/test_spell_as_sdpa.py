"""Hand-written attention becomes `scaled_dot_product_attention`, exactly, or is left with a reason."""

import pytest
import torch
from spelling import (
    AUTO,
    INF,
    MIN,
    assert_left,
    assert_rewritten,
    causal,
    changed,
    compiled,
    float_mask,
    plain,
    qkv,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from tq_inductor.lowering.rewrite import rewrite

from tq_inductor import explain
from tq_inductor.errors import NoAttentionBackendError


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


def test_the_maximum_may_be_taken_before_or_after_all_masks():
    mask = causal()
    mask[2] = False
    for lowest in (MIN, -INF):
        for fn in (
            changed(lambda s, lowest=lowest: less_maximum(less_maximum(s).masked_fill(~mask, lowest))),
            changed(lambda s, lowest=lowest: less_maximum(s.masked_fill(~mask, lowest))),
        ):
            args = qkv()
            if lowest == MIN:
                assert torch.allclose(fn(*args)[:, :, 2], args[2].mean(-2), atol=1e-5)
            _, rows, result = compiled(fn, *args)
            assert rows[0].rewritten
            torch.testing.assert_close(result, fn(*args), rtol=1e-4, atol=1e-4, equal_nan=True)


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


def test_scores_written_over_a_bias():
    def f(q, k, v, bias):
        return torch.bmm(bias.clone().baddbmm_(q, k.mT).softmax(-1), v)

    reason = "baddbmm writes the scores over another tensor"
    assert_left(reason, f, *qkv(2, 6, 8), torch.randn(2, 6, 6))


@pytest.mark.parametrize("inplace", [True, False])
def test_a_query_that_an_activation_changes(inplace):
    def f(q, k, v):
        q = q * 1
        scores = q @ k.mT
        gate = F.silu(q, inplace=inplace)
        return (scores.softmax(-1) @ v) * gate

    if inplace:
        assert_left("changes an input of the attention before its end", f, *qkv())
    else:
        assert_rewritten(f, *qkv(), gone=("softmax",))


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


def test_a_named_backend_that_cannot_run_it_raises():
    def f(q, k, v):
        return (torch.sigmoid(q @ k.mT).softmax(-1)) @ v

    with pytest.raises(NoAttentionBackendError, match=r"'triton' was asked for.*\n.*\n.*by sigmoid"):
        torch.compile(f, backend="turboquant", options={"attention": "triton"})(*qkv())


def test_questions_whether_a_kernel_can_run_are_no_calls():
    q, k, v = qkv()
    mask = causal_lower_right(4, 6)
    _, rows, _ = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), q[:, :, :4], k, v)
    assert [row.backend for row in rows] == ["sdpa"]


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
    assert "spelling.py" in report.rows[0].source
    assert "in plain" in report.rows[0].source
    assert report.rows[0].shapes == "q=[2, 4, 6, 8] kv=[2, 4, 6, 8] float32 cpu"


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


tensor_scale = torch.tensor(0.3)


def less_maximum(scores):
    return scores - scores.amax(-1, keepdim=True)


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
    # A row that is MIN everywhere is 0 everywhere less its maximum; the second mask leaves a part of it.
    "scores are masked before and after their maximum is taken from them": changed(
        lambda s: less_maximum(s.masked_fill(causal(), MIN)).masked_fill(~causal(), MIN)
    ),
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
