"""The op `dense_attn`, and what the compiler says to it of a mask; on a CPU it runs the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F
from tq_inductor.lowering.describe_call import describe
from tq_inductor.lowering.rewrite import rewrite

import tq_inductor.ops  # noqa: F401
from tq_inductor.attention import select, triton
from tq_inductor.attention.call import AttentionCall
from tq_inductor.attention.limits import Limits

OPS = torch.ops.tq_inductor
B, H, HKV, D = 2, 4, 2, 16
ANY = Limits(alignment="", dtypes=(torch.float32,), masks=("bool", "float"), softcap=True, sinks=True)


def qkv(q_len, kv_len):
    return [torch.randn(B, heads, n, D) for heads, n in ((H, q_len), (HKV, kv_len), (HKV, kv_len))]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_opcheck(softcap):
    q, k, v = qkv(3, 20)
    mask = torch.rand(B, 1, 3, 20) < 0.7
    sinks, slopes = torch.randn(H), torch.rand(H)
    how = (softcap, 0.25, "flex")
    opcheck(OPS.dense_attn.default, (q, k, v, mask, None, sinks, "", -1, -1, *how))
    opcheck(OPS.dense_attn.default, (q, k, v, None, slopes, None, "bottom-right", 7, 0, *how))
    packed = torch.randn(B, 3, H + 2 * HKV, D).transpose(1, 2).split((H, HKV, HKV), 1)
    opcheck(OPS.dense_attn.default, (*packed, None, None, None, "equal", -1, 0, *how))


def test_alibi_is_a_slope_times_the_distance():
    q, k, v = qkv(6, 9)
    slopes = torch.rand(H)
    query, key = torch.arange(6)[:, None] + 3, torch.arange(9)
    bias = (slopes[:, None, None] * (key - query)).masked_fill(key > query, float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=0.25, enable_gqa=True)
    got = OPS.dense_attn(q, k, v, None, slopes, None, "bottom-right", -1, 0, None, 0.25, "fa2")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_backends_of_other_ops_are_refused_on_a_gpu_only():
    q, k, v = qkv(3, 3)
    assert OPS.dense_attn(q, k, v, None, None, None, "equal", -1, 0, None, 0.25, "triton").shape == q.shape


def test_reports_tell_alike_reasons_once():
    reports = []

    def backend(gm, example_inputs):
        reports.append(rewrite(gm, dict.fromkeys(("prefill", "decode"), "auto")))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(sdpa, backend=backend)(*qkv(9, 9))
    assert ": not fa3, fa4, fa2, flashinfer, cudnn, torch_flash, flex: device cpu (needs cuda)" in str(
        reports[0]
    )


@pytest.fixture
def willing(monkeypatch):
    """`flex` says that it can run any call that is described to it as on an H200."""

    def why_not(call):
        return ANY.why_not(dataclasses.replace(call, device="cuda", capability=(9, 0)))

    backends = tuple(
        dataclasses.replace(b, why_not=why_not) if b.name == "flex" else b for b in select.BACKENDS
    )
    monkeypatch.setattr(select, "BACKENDS", backends)


def check(f, *args, said):
    """The call of `f` becomes `dense_attn` with these (mask?, alignment, back, ahead), and is eager's."""
    found = []

    def backend(gm, example_inputs):
        rows = rewrite(gm, dict.fromkeys(("prefill", "decode"), "flex")).rows
        (node,) = (n for n in gm.graph.nodes if n.target is OPS.dense_attn.default)
        found.extend((rows[0].backend, rows[0].rewritten, node.args))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = f(*args)
        result = torch.compile(f, backend=backend, fullgraph=True)(*args)
    name, rewritten, node_args = found
    assert (name, rewritten, node_args[-1]) == ("flex", True, "flex")
    assert (node_args[3] is not None, *node_args[6:9]) == said
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    return node_args


def sdpa(q, k, v, mask=None, **options):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, **options)


def offsets(q, k):
    """Key minus query, queries counted from 0."""
    return torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]


@pytest.mark.usefixtures("willing")
class TestWhatIsSaid:
    """Of the masks of one call."""

    def test_nothing(self):
        check(lambda q, k, v: sdpa(q, k, v), *qkv(5, 9), said=(False, "equal", -1, -1))

    def test_a_mask_that_hides_nothing(self):
        check(lambda q, k, v: sdpa(q, k, v, offsets(q, k) < 20), *qkv(5, 9), said=(False, "equal", -1, -1))

    def test_the_flag_with_equal_lengths(self):
        check(lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv(9, 9), said=(False, "equal", -1, 0))

    def test_the_flag_is_top_left(self):
        check(lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv(5, 9), said=(False, "top-left", -1, 0))

    @pytest.mark.parametrize("shift", [0, 1, 3])
    def test_a_mask_aligned_top_left(self, shift):
        check(
            lambda q, k, v: sdpa(q, k, v, offsets(q, k) <= shift),
            *qkv(5, 9),
            said=(False, "top-left", -1, shift),
        )

    @pytest.mark.parametrize("ahead", [0, 2])
    def test_a_mask_aligned_bottom_right(self, ahead):
        check(
            lambda q, k, v: sdpa(q, k, v, offsets(q, k) <= k.shape[2] - q.shape[2] + ahead),
            *qkv(5, 9),
            said=(False, "bottom-right", -1, ahead),
        )

    def test_lengths_that_are_not_known(self):
        def f(q, k, v):
            return sdpa(q, k, v, offsets(q, k) <= k.shape[2] - q.shape[2])

        args = qkv(5, 9)
        for x in args:
            torch._dynamo.mark_dynamic(x, 2)
        check(f, *args, said=(False, "bottom-right", -1, 0))

    def test_a_sliding_window(self):
        def f(q, k, v):
            far = offsets(q, k) - (k.shape[2] - q.shape[2])
            return sdpa(q, k, v, (far <= 0) & (far > -4))

        check(f, *qkv(5, 9), said=(False, "bottom-right", 3, 0))
        check(f, *qkv(9, 9), said=(False, "equal", 3, 0))

    def test_a_window_on_both_sides(self):
        def f(q, k, v):
            far = offsets(q, k)
            return sdpa(q, k, v, (far <= 2) & (far >= -3))

        check(f, *qkv(9, 9), said=(False, "equal", 3, 2))

    @pytest.mark.parametrize("function", [abs, torch.abs, torch.Tensor.abs])
    def test_a_window_by_distance(self, function):
        def f(q, k, v):
            return sdpa(q, k, v, function(offsets(q, k)) <= 3)

        check(f, *qkv(9, 9), said=(False, "equal", 3, 3))

    def test_further_than_a_distance_is_no_window(self):
        check(lambda q, k, v: sdpa(q, k, v, offsets(q, k).abs() > 1), *qkv(9, 9), said=(True, "", -1, -1))

    def test_a_window_before_its_own_place_needs_the_mask(self):
        check(lambda q, k, v: sdpa(q, k, v, offsets(q, k) <= -1), *qkv(9, 9), said=(True, "", -1, -1))

    def test_padding_needs_the_mask(self):
        def f(q, k, v, real):
            return sdpa(q, k, v, (offsets(q, k) <= 0) & real[:, None, None])

        real = torch.ones(B, 9, dtype=torch.bool)
        real[1, 6:] = False
        check(f, *qkv(9, 9), real, said=(True, "", -1, -1))

    def test_a_bias_needs_the_mask(self):
        check(sdpa, *qkv(5, 9), torch.randn(1, H, 5, 9), said=(True, "", -1, -1))

    def test_heads_are_not_repeated(self):
        def f(q, k, v):
            k, v = (x.repeat_interleave(H // HKV, 1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        args = check(f, *qkv(9, 9), said=(False, "equal", -1, 0))
        assert args[1].meta["example_value"].shape[1] == HKV

    def test_softcap(self):
        def f(q, k, v):
            k, v = (x.repeat_interleave(H // HKV, 1) for x in (k, v))
            scores = q @ k.transpose(2, 3) * 0.25
            return (torch.tanh(scores / 5.0) * 5.0).softmax(-1) @ v

        args = check(f, *qkv(5, 9), said=(False, "equal", -1, -1))
        assert args[9] == 5.0


def test_our_kernel_takes_a_full_decode_call_on_a_gpu(monkeypatch):
    """One query over all of an encoder's keys: of what is described as on an H200, nothing is masked."""

    def on_an_h200(*args):
        return dataclasses.replace(describe(*args), device="cuda", capability=(9, 0), cached=True)

    monkeypatch.setattr("tq_inductor.lowering.rewrite.describe", on_an_h200)
    found = []

    def backend(gm, example_inputs):
        rows = rewrite(gm, {"prefill": "auto", "decode": "auto"}).rows
        found.append(
            (rows[0].backend, [n.args[3:5] for n in gm.graph.nodes if n.target is OPS.attend.default])
        )
        return gm.forward

    q, k, v = qkv(1, 300)
    for f, expected in (
        (lambda q, k, v: sdpa(q, k, v), ("triton", [(None, None)])),
        (lambda q, k, v: sdpa(q, k, v, torch.ones(B, 1, 1, 300)), ("sdpa", [])),  # a mask that is added
    ):
        found.clear()
        torch._dynamo.reset()
        with torch.no_grad():
            result = torch.compile(f, backend=backend, fullgraph=True)(q, k, v)
        assert found == [expected]
        torch.testing.assert_close(result, f(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, False),
        ({"is_causal": True}, True),  # top-left: not told to the kernel by its lengths
        ({"mask": "bool"}, True),
        ({"q_len": 17}, True),  # no decode call
        ({"device": "cpu", "capability": None}, True),
        ({"capability": (7, 5)}, True),
    ],
)
def test_look_alikes_of_a_full_decode_call(changes, refused):
    full = AttentionCall(
        2, 1, 300, 8, 2, 64, 64, torch.bfloat16, "cuda", (9, 0), mask="none", alignment="equal", cached=True
    )
    assert bool(triton.why_not(dataclasses.replace(full, **changes))) is refused
