"""Each attention backend on a GPU: what it says it can, it computes; what it says it cannot is true."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from tq_inductor.lowering.rewrite import rewrite

import tq_inductor.ops  # noqa: F401
from tq_inductor.attention import flashinfer
from tq_inductor.attention.arguments import DenseArguments
from tq_inductor.attention.call import AttentionCall
from tq_inductor.attention.select import BACKENDS, BY_NAME
from tq_inductor.compiler import turboquant
from tq_inductor.reference import attention
from tq_inductor.reference_attention import visible_window

pytestmark = pytest.mark.gpu
OPS = torch.ops.tq_inductor
DENSE = [b.name for b in BACKENDS if b.attend]
FULL, CAUSAL = (None, None), (None, 0)


def described(batch, q_len, kv_len, heads, kv_heads, dim, v_dim, alignment, window, dtype=torch.bfloat16):
    capability = torch.cuda.get_device_capability()
    return AttentionCall(
        batch, q_len, kv_len, heads, kv_heads, dim, v_dim, dtype, "cuda", capability,
        mask="none" if window == FULL else "bool", alignment=alignment, window=window,
    )  # fmt: skip


CALLS = {
    "causal": (2, 200, 200, 8, 2, 128, 128, "equal", CAUSAL),
    "full": (2, 200, 200, 8, 2, 64, 64, "equal", FULL),
    "fewer queries": (1, 77, 300, 8, 1, 128, 128, "bottom-right", CAUSAL),
    "fewer queries, top-left": (1, 77, 300, 8, 1, 128, 128, "top-left", CAUSAL),
    "MHA, D=256": (2, 130, 130, 4, 4, 256, 256, "equal", CAUSAL),
    "one query": (3, 1, 1000, 8, 2, 128, 128, "equal", FULL),
    "four queries": (3, 4, 1000, 8, 2, 64, 64, "bottom-right", CAUSAL),
    "window": (1, 300, 300, 8, 2, 128, 128, "equal", (63, 0)),
    "window, fewer queries": (1, 100, 300, 8, 2, 64, 64, "bottom-right", (63, 0)),
    "window on both sides": (1, 300, 300, 4, 4, 64, 64, "equal", (40, 40)),
    "cross-attention": (2, 50, 77, 4, 4, 64, 64, "equal", FULL),
    "values of 128": (1, 128, 128, 4, 4, 192, 128, "equal", CAUSAL),
    "D=512": (1, 64, 64, 4, 2, 512, 512, "equal", CAUSAL),
}


def tensors_for(call):
    shapes = (
        (call.batch_size, call.q_len, call.num_heads, call.head_dim),
        (call.batch_size, call.kv_len, call.num_kv_heads, call.head_dim),
        (call.batch_size, call.kv_len, call.num_kv_heads, call.v_head_dim),
    )
    return [torch.randn(s, dtype=call.dtype, device="cuda").transpose(1, 2) for s in shapes]


def run(name, call, q, k, v, softcap=None, sinks=None, mask=None):
    back, ahead = (-1 if side is None else side for side in call.window)
    scale = call.head_dim**-0.5
    how = (call.alignment, back, ahead, softcap, scale)
    return OPS.dense_attn(q, k, v, mask, None, sinks, *how, name)


def expected(call, q, k, v, softcap=None, sinks=None):
    visible = visible_window(call.q_len, call.kv_len, call.alignment, call.window)
    wide = [x.double().cpu() for x in (q, k, v)]
    sinks = None if sinks is None else sinks.double().cpu()
    return attention(*wide, visible, call.head_dim**-0.5, None, sinks, softcap)


def ready(name, call):
    """Skip what cannot run; of FlashInfer also what is not built, but for TQ_TEST_FLASHINFER=1."""
    backend = BY_NAME[name]
    reasons = backend.why_not(call) or backend.broken()
    if not reasons and not os.environ.get("TQ_TEST_FLASHINFER"):
        reasons = backend.unbuilt(call)
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("name", DENSE)
def test_what_it_says_it_can_it_computes(name, what):
    call = described(*CALLS[what])
    ready(name, call)
    q, k, v = tensors_for(call)
    out = run(name, call, q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double().cpu(), expected(call, q, k, v), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", DENSE)
def test_tensors_that_lie_otherwise(name):
    call = described(*CALLS["causal"])
    ready(name, call)
    q, k, v = tensors_for(call)
    k = k.contiguous()  # as a cache: head by head
    v = torch.cat((v, v), -1)[..., 1 : 1 + call.v_head_dim]  # no multiple of 16 bytes
    q = q[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        run(name, call, q, k, v).double().cpu(), expected(call, q, k, v), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("name", DENSE)
def test_softcap_and_sinks(name):
    call = described(*CALLS["causal"])
    q, k, v = tensors_for(call)
    capped, sinking = dataclasses.replace(call, softcap=5.0), dataclasses.replace(call, sinks=True)
    ready(name, capped)
    got = run(name, capped, q, k, v, softcap=5.0)
    torch.testing.assert_close(got.double().cpu(), expected(call, q, k, v, 5.0), atol=2e-2, rtol=2e-2)
    ready(name, sinking)
    sinks = torch.randn(call.num_heads, device="cuda")
    got = run(name, sinking, q, k, v, sinks=sinks)
    torch.testing.assert_close(
        got.double().cpu(), expected(call, q, k, v, None, sinks), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("name", DENSE)
def test_alibi_slopes(name):
    call = dataclasses.replace(described(*CALLS["fewer queries"]), alibi=True)
    ready(name, call)
    q, k, v = tensors_for(call)
    slopes = 2.0 ** -torch.arange(1, call.num_heads + 1)
    how = (call.alignment, -1, 0, None, call.head_dim**-0.5, name)
    got = OPS.dense_attn(q, k, v, None, slopes.cuda(), None, *how)
    bias = slopes.double().view(1, -1, 1, 1) * torch.arange(call.kv_len)
    visible = visible_window(call.q_len, call.kv_len, call.alignment, call.window)
    wide = [x.double().cpu() for x in (q, k, v)]
    want = attention(*wide, visible, call.head_dim**-0.5, bias)
    torch.testing.assert_close(got.double().cpu(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.varlen])
def test_ragged(name, causal):
    call = dataclasses.replace(described(*CALLS["causal"]), varlen=True)
    ready(name, call)
    lens_q, lens_k = [30, 1, 0, 64, 5], [30, 90, 7, 64, 0]
    cu_q, cu_k = (torch.tensor([0, *x], device="cuda").cumsum(0).int() for x in (lens_q, lens_k))
    q = torch.randn(104, 8, 128, dtype=call.dtype, device="cuda")  # 4 tokens more
    k, v = (torch.randn(191, 2, 128, dtype=call.dtype, device="cuda") for _ in range(2))
    args = (cu_q, cu_k, 64, 90, causal, 0.1)
    got = OPS.varlen_attn(q, k, v, *args, name).float().cpu()
    want = OPS.varlen_attn(q.cpu(), k.cpu(), v.cpu(), *(x.cpu() for x in args[:2]), *args[2:]).float()
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    assert got[100:].abs().max() == 0


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.varlen])
def test_pages(name, page_size):
    """Those that take no pages get them copied."""
    call = dataclasses.replace(described(*CALLS["causal"]), varlen=True)
    ready(name, call)
    lens = [30, 200, 0, 1]
    cu = torch.tensor([0, *lens], device="cuda").cumsum(0).int()
    q, (k, v) = torch.randn(231, 8, 128), torch.randn(2, 231, 2, 128)
    q, k, v = (x.to("cuda", call.dtype) for x in (q, k, v))
    width = -(-200 // page_size)
    order = torch.randperm(4 * width)
    table = order.view(4, width).int()
    pages = torch.ones(2, 4 * width, page_size, 2, 128, dtype=call.dtype, device="cuda")
    for row, (start, length) in enumerate(zip(cu.tolist(), lens, strict=False)):
        for i in range(0, length, page_size):
            n = min(page_size, length - i)
            pages[0, table[row, i // page_size], :n] = k[start + i : start + i + n]
            pages[1, table[row, i // page_size], :n] = v[start + i : start + i + n]
        table[row, -(-length // page_size) :] = -1  # not needed
    args = (cu, cu, 200, 200, True, 0.1, name)
    got = OPS.varlen_attn(q, *pages, *args, block_table=table.cuda())
    torch.testing.assert_close(got, OPS.varlen_attn(q, k, v, *args), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.varlen])
def test_padded_batches_replay_with_other_lengths(name, causal):
    """Every query is right, of padding too; lengths are read on the device."""
    q_len = 200
    call = dataclasses.replace(
        described(*CALLS["full"]), mask="bool", alignment="", padding="causal" if causal else "full"
    )
    ready(name, call)

    def f(q, k, v, real):
        mask = real[:, None, None, :]
        if causal:
            at = torch.arange(q_len, device=q.device)
            mask = mask & (at[None, None, None, :] <= at[None, None, :, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    options = {"attention": name, "triton.cudagraphs": True}
    place = torch.arange(q_len)
    rows = [(place < 90, place >= 170), (place >= 0, place % 3 == 1), (place < 0, place >= 199)]
    with torch.no_grad():
        compiled = torch.compile(f, backend=turboquant, options=options)
        for real in [torch.stack(pair) for pair in (*rows, *rows)]:
            q, k, v = tensors_for(call)
            out = compiled(q, k, v, real.cuda()).double().cpu()
            visible = real[:, None, None].expand(-1, 1, q_len, -1)
            visible = visible & (place <= place[:, None]) if causal else visible
            wide = [x.double().cpu() for x in (q, k, v)]
            torch.testing.assert_close(
                out, attention(*wide, visible, call.head_dim**-0.5), atol=2e-2, rtol=2e-2
            )


@pytest.mark.parametrize(
    ("name", "what", "changes"),
    [
        ("torch_flash", "D=512", {}),
        ("torch_flash", "values of 128", {}),
        ("torch_flash", "causal", {"dtype": torch.float32}),
        ("cudnn", "causal", {"dtype": torch.float32}),
        ("fa3", "window", {}),
        ("fa3", "D=512", {}),
        ("fa3", "causal", {"dtype": torch.float16}),
        ("fa4", "D=512", {}),
        ("fa4", "causal", {"dtype": torch.float32}),
    ],
)
def test_what_it_says_it_cannot_is_true(name, what, changes):
    call = dataclasses.replace(described(*CALLS[what]), **changes)
    if reasons := BY_NAME[name].unavailable() or BY_NAME[name].broken():
        pytest.skip("; ".join(reasons))
    assert BY_NAME[name].why_not(call)
    q, k, v = tensors_for(call)
    try:
        got = run(name, call, q, k, v).double().cpu()
    except Exception:
        return
    wrong = (got - expected(call, q, k, v)).abs().max()
    assert not wrong < 0.1, "it gives the right result: why does it say that it cannot?"


@pytest.mark.parametrize("name", DENSE)
def test_a_named_backend_is_a_constant_of_the_graph_and_replays(name):
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    call = described(*CALLS["causal"])
    ready(name, call)
    q, k, v = tensors_for(call)
    seen = []

    def backend(gm, example_inputs):
        rows = rewrite(gm, {"prefill": name, "decode": "auto"}).rows
        seen.extend((rows[0].backend, str(gm.graph)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend)(q, k, v)
        assert seen[0] == name
        assert f", {name})" in seen[1]
        torch._dynamo.reset()
        compiled = torch.compile(
            f, backend=turboquant, options={"attention": {"prefill": name}, "triton.cudagraphs": True}
        )
        for _ in range(3):
            out = compiled(q, k, v).clone()
    torch.testing.assert_close(out.double().cpu(), expected(call, q, k, v), atol=2e-2, rtol=2e-2)


def test_flex_takes_any_mask():
    call = dataclasses.replace(described(*CALLS["cross-attention"]), mask="bool")
    q, k, v = tensors_for(call)
    mask = torch.rand(2, 1, 50, 77, device="cuda") < 0.5
    mask[0, 0, 3] = False
    got = run("flex", call, q, k, v, mask=mask)
    want = DenseArguments(
        *(x.cpu() for x in (q, k, v)), mask.cpu(), None, None, "", FULL, None, call.head_dim**-0.5
    )
    from tq_inductor.reference_attention import dense_attention

    torch.testing.assert_close(
        got.float().cpu(), dense_attention(want).transpose(1, 2).float(), atol=2e-2, rtol=2e-2
    )


def ragged_for(lens_q, lens_k, page_size=None):
    """`varlen_attn`'s tensors and how, for 200 query tokens; with the answer in float64."""
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lens_q, lens_k))
    q, k, v = (torch.randn(n, heads, 128).bfloat16() for n, heads in ((200, 8), (400, 2), (400, 2)))
    args = (cu_q, cu_k, max(16, *lens_q), 200, True, 0.1)
    want = OPS.varlen_attn(q.double(), k.double(), v.double(), *args)
    if page_size is None:
        return [x.cuda() for x in (q, k, v, cu_q, cu_k)], {}, want
    width = -(-200 // page_size)
    table = torch.randperm(len(lens_k) * width).view(-1, width).int()
    pages = torch.ones(2, table.numel(), page_size, 2, 128, dtype=q.dtype)
    for row, (start, length) in enumerate(zip(cu_k.tolist(), lens_k, strict=False)):
        for i in range(0, length, page_size):
            n = min(page_size, length - i)
            for there, plain in zip(pages, (k, v), strict=True):
                there[table[row, i // page_size], :n] = plain[start + i : start + i + n]
    tensors = [x.cuda() for x in (q, *pages, cu_q, cu_k)]
    return tensors, {"block_table": table.cuda()}, want


RAGGED = {  # few queries are another kernel's
    "prefill": [([100, 0, 60, 40], [100, 7, 200, 40]), ([1, 99, 20, 0], [200, 60, 30, 5])],
    "decode": [([1, 1, 1, 1], [100, 7, 200, 40]), ([1, 16, 0, 1], [3, 200, 30, 0])],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("what", RAGGED)
def test_flashinfer_in_cuda_graphs(what, page_size, compiled):
    """A replay reads other lengths, and other pages, after a plan outside."""
    longest = 100 if what == "prefill" else 16
    call = dataclasses.replace(described(*CALLS["causal"]), varlen=True, page_size=page_size, q_len=longest)
    ready("flashinfer", call)
    steps = [ragged_for(*lengths, page_size) for lengths in RAGGED[what] * 3]
    (q, k, v, cu_q, cu_k), how, _ = steps[0]
    args = (longest, 200, True, 0.1)

    def f(q, k, v, cu_q, cu_k, block_table=None):
        out = OPS.varlen_attn(q, k, v, cu_q, cu_k, *args, "flashinfer", block_table=block_table)
        return out + OPS.varlen_attn(q, k, v, cu_q, cu_k, *args, "flashinfer", block_table=block_table)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(f, backend=turboquant, options={"triton.cudagraphs": True})
        with torch.no_grad():
            for tensors, kept, want in steps:
                out = run(*tensors, **kept).double().cpu() / 2
                torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
        return
    flashinfer.plan(q, k, v, cu_q, cu_k, *args, **how)
    f(q, k, v, cu_q, cu_k, **how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f(q, k, v, cu_q, cu_k, **how)
    for tensors, kept, want in steps:
        for there, new in zip(
            (q, k, v, cu_q, cu_k, *how.values()), (*tensors, *kept.values()), strict=True
        ):
            there.copy_(new)
        flashinfer.plan(q, k, v, cu_q, cu_k, *args, **how)
        graph.replay()
        torch.testing.assert_close(out.double().cpu() / 2, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("what", RAGGED)
def test_flashinfer_sees_lengths_and_pages_that_change_in_place(what, page_size):
    longest = 100 if what == "prefill" else 16
    call = dataclasses.replace(described(*CALLS["causal"]), varlen=True, page_size=page_size, q_len=longest)
    ready("flashinfer", call)
    steps = [ragged_for(*lengths, page_size) for lengths in RAGGED[what] * 2]
    steps += [ragged_for(*RAGGED[what][1], page_size) for _ in range(2)]  # only pages change
    here, how, _ = steps[0]
    for tensors, kept, want in steps:
        for there, new in zip((*here, *how.values()), (*tensors, *kept.values()), strict=True):
            there.copy_(new)
        for _ in range(2):
            got = OPS.varlen_attn(*here, longest, 200, True, 0.1, "flashinfer", **how)
            torch.testing.assert_close(got.double().cpu(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("kv_format", ["e4m3", "e5m2"])
def test_fp8_as_it_is(kv_format, page_size):
    """FlashInfer reads the bytes; what others get is made 16 bits first."""
    call = dataclasses.replace(described(*CALLS["causal"]), varlen=True, page_size=page_size)
    ready("flashinfer", dataclasses.replace(call, kv_bytes=kv_format))
    (q, k, v, *cu), how, _ = ragged_for(*RAGGED["prefill"][0], page_size)
    k, v = (x.to(flashinfer.STORED[kv_format]).view(torch.uint8) for x in (k, v))
    args = (q, k, v, *cu, 100, 200, True, 0.1)
    got, want = (
        OPS.varlen_attn(*args, name, kv_format, 0.5, 4.0, **how) for name in ("flashinfer", "torch_flash")
    )
    torch.testing.assert_close(got, want, atol=4e-2, rtol=2e-2)


STALE_REPLAY = """
import torch, tq_inductor.ops
from tq_inductor.attention import flashinfer
q, k, v = (torch.randn(200, heads, 128, device="cuda").bfloat16() for heads in (8, 2, 2))
cu = torch.tensor([0, 50, 200], device="cuda").int()
args = (q, k, v, cu, cu, 200, 200, True, 0.1)
flashinfer.plan(*args)
torch.ops.tq_inductor.varlen_attn(*args, "flashinfer")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    torch.ops.tq_inductor.varlen_attn(*args, "flashinfer")
graph.replay()
torch.cuda.synchronize()
print("replayed")
cu[1] = 60
graph.replay()
torch.cuda.synchronize()
print("wrong")
"""


def test_a_replay_with_lengths_that_were_not_planned_stops():
    """In its own process: a GPU that met a failed assertion serves no longer."""
    ready("flashinfer", dataclasses.replace(described(*CALLS["causal"]), varlen=True))
    command = [sys.executable, "-c", STALE_REPLAY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "replayed\n", done.stdout + done.stderr
    assert "are not those of the plan" in done.stderr
