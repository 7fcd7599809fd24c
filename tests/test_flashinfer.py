"""FlashInfer's plans, modules and CUDA graphs, on a CPU: its package is one that computes as planned."""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import types

import pytest
import torch

import tq_inductor.ops  # noqa: F401
from tq_inductor import cli
from tq_inductor.attention import flashinfer as backend
from tq_inductor.attention import flashinfer_modules, flashinfer_plans, packages, select
from tq_inductor.attention.arguments import DenseArguments, VarlenArguments
from tq_inductor.attention.call import AttentionCall
from tq_inductor.reference_attention import dense_attention, varlen_attention

LENS_Q, LENS_K = [3, 1, 0, 4, 2], [3, 9, 7, 4, 0]
CALL = AttentionCall(
    2, 2048, 2048, 32, 8, 128, 128, torch.bfloat16, "cuda", (9, 0), cached=False, varlen=True,
    window=(None, 0), alignment="equal",
)  # fmt: skip


class Wrapper:
    """Attention over the lengths that were planned; rows without a key give NaN, as one kernel's may."""

    made: list[Wrapper]

    def __init__(self, float_workspace_buffer, kv_layout, backend, use_cuda_graph=False, **buffers):
        assert kv_layout == "NHD"
        self.backend, self.fixed, self.plans = backend, buffers if use_cuda_graph else None, []
        Wrapper.made.append(self)

    def plan(self, **said):
        self.plans.append(said)
        if self.fixed is not None:  # as in FlashInfer, what a graph reads lies in the caller's buffers
            for name, buffer in self.fixed.items():
                value = said[name.removesuffix("_buf")]
                assert len(value) == len(buffer) or name == "paged_kv_indices_buf"
                buffer[: len(value)].copy_(value)
        for name in ("qo_indptr", "kv_indptr", "paged_kv_indptr", "paged_kv_last_page_len"):
            assert said.get(name, torch.zeros(1, dtype=torch.int32)).dtype == torch.int32

    def run(self, q, k=None, v=None, paged_kv_cache=None):
        said = self.plans[-1]
        starts_q = said["qo_indptr"].tolist()
        assert q.shape[0] == starts_q[-1]
        if paged_kv_cache is None:
            starts_k = said["kv_indptr"].tolist()
        else:
            k, v = paged_kv_cache
            indices = said["paged_kv_indices"]
            if self.fixed is not None:
                indices = self.fixed["paged_kv_indices_buf"]
            first = said["paged_kv_indptr"].tolist()
            last = said["paged_kv_last_page_len"].tolist()
            tokens, starts_k = [], [0]
            for row, page in enumerate(last):
                numbers = indices[first[row] : first[row + 1]].long()
                own = k[numbers].flatten(0, 1), v[numbers].flatten(0, 1)
                length = max(len(numbers) - 1, 0) * said["page_size"] + page
                tokens.append([x[:length] for x in own])
                starts_k.append(starts_k[-1] + length)
            k, v = (torch.cat(x) for x in zip(*tokens, strict=True))
        cu = [torch.tensor(x, dtype=torch.int32) for x in (starts_q, starts_k)]
        assert said["window_left"] == -1
        out = varlen_attention(q, k, v, *cu, 99, 99, said["causal"], said["sm_scale"])
        for row in range(len(starts_q) - 1):
            q_len, k_len = (x[row + 1] - x[row] for x in (starts_q, starts_k))
            blind = q_len if not k_len else max(q_len - k_len, 0) if said["causal"] else 0
            out[starts_q[row] : starts_q[row] + blind] = torch.nan
        return out


@pytest.fixture
def package(monkeypatch, tmp_path):
    """FlashInfer on a machine with an SM90 GPU; `capturing[0]`: whether a CUDA graph is captured."""
    made = types.ModuleType("flashinfer")
    made.BatchPrefillWithRaggedKVCacheWrapper = made.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    made.jit, made.capturing = types.ModuleType("flashinfer.jit"), [False]
    made.jit.env = types.SimpleNamespace(FLASHINFER_AOT_DIR=tmp_path / "aot", FLASHINFER_JIT_DIR=tmp_path)
    made.jit.get_batch_prefill_uri = lambda *said: "_".join(["batch_prefill", *map(str, said)])
    made.jit.get_single_prefill_uri = lambda *said: "_".join(["single_prefill", *map(str, said)])
    for name in ("flashinfer", "flashinfer.jit"):
        monkeypatch.setitem(sys.modules, name, made if name == "flashinfer" else made.jit)
    monkeypatch.setattr(packages, "version_of", {"flashinfer-python": "0.6.18.post1"}.get)
    monkeypatch.setattr(packages, "import_failure", lambda module: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing[0])
    monkeypatch.setattr(flashinfer_plans, "WORKSPACE_BYTES", 16)
    Wrapper.made = []
    caches = (
        flashinfer_plans.workspace, flashinfer_plans.plan_of, flashinfer_plans.plans_for_graphs,
        flashinfer_plans.planned_rows, flashinfer_modules.announce,
    )  # fmt: skip
    for cache in caches:
        cache.cache_clear()
    yield made
    for cache in caches:
        cache.cache_clear()


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ragged(lens_q=LENS_Q, lens_k=LENS_K, causal=True, tokens=12, longest=40, keys=25):
    """Two query tokens and two keys more than sequences have."""
    q, k, v = (torch.randn(n, heads, 16) for n, heads in ((tokens, 4), (keys, 2), (keys, 2)))
    return VarlenArguments(q, k, v, starts(lens_q), starts(lens_k), longest, longest, causal, 0.25)


def paged(x, page_size=4, order=(6, 2, 5, 0, 3, 1, 4, 7)):
    """The same call over pages."""
    lengths = x.cu_seqlens_k.diff().tolist()
    table = torch.full((len(lengths), 3), -1, dtype=torch.int32)  # pages that nobody needs may be anything
    pages, free = torch.ones(2, 8, page_size, 2, 16), list(order)
    for row, (start, length) in enumerate(zip(x.cu_seqlens_k.tolist(), lengths, strict=False)):
        for i in range(0, length, page_size):
            n, table[row, i // page_size] = min(page_size, length - i), free[-1]
            for kind, plain in zip(pages, (x.k, x.v), strict=True):
                kind[free[-1], :n] = plain[start + i : start + i + n]
            free.pop()
    return dataclasses.replace(x, k=pages[0], v=pages[1], block_table=table)


def expected(x):
    cu = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    return varlen_attention(x.q, x.k, x.v, *cu, x.causal, x.scale)


def arguments(x):
    """What `plan` is called with."""
    cu = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    return (x.q, x.k, x.v, *cu, x.causal, x.scale)


def plans():
    return [len(wrapper.plans) for wrapper in Wrapper.made]


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("package")
def test_ragged(causal, pages):
    """Sequences of no tokens, of no keys, of more queries than keys, and tokens that belong to none."""
    for lens_q, lens_k in ((LENS_Q, LENS_K), ([4, 0, 0, 0, 6], [2, 0, 1, 0, 12])):
        x = ragged(lens_q, lens_k, causal)
        got = backend.varlen(paged(x) if pages else x)
        torch.testing.assert_close(got, expected(x))
        assert got[10:].abs().max() == 0


@pytest.mark.usefixtures("package")
def test_planned_once_for_all_layers_and_again_when_lengths_change():
    x = ragged()
    layers = [dataclasses.replace(x, q=torch.randn_like(x.q), v=torch.randn_like(x.v)) for _ in range(16)]
    for layer in layers:
        torch.testing.assert_close(backend.varlen(layer), expected(layer))
    assert plans() == [1]
    same = dataclasses.replace(x, cu_seqlens_q=starts(LENS_Q), cu_seqlens_k=starts(LENS_K))
    backend.varlen(same)
    assert plans() == [1]  # other tensors, the same lengths
    x.cu_seqlens_k.copy_(starts([3, 8, 8, 4, 0]))
    for layer in layers:
        torch.testing.assert_close(backend.varlen(layer), expected(layer))
    assert plans() == [2]  # changed in place
    longer = ragged(LENS_Q, LENS_K, tokens=13)
    torch.testing.assert_close(backend.varlen(longer), expected(longer))
    assert plans() == [3]  # one more token behind the last sequence


@pytest.mark.usefixtures("package")
def test_lengths_are_read_only_if_their_tensors_changed(monkeypatch):
    read = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: read.append(1) or tensor.clone())
    x = ragged()
    for _ in range(16):
        backend.varlen(x)
    assert len(read) == 1
    with torch.inference_mode():  # where PyTorch counts no versions
        y = dataclasses.replace(x, cu_seqlens_q=starts(LENS_Q), cu_seqlens_k=starts(LENS_K))
        for _ in range(3):
            backend.varlen(y)
    assert len(read) == 4
    assert plans() == [1]


@pytest.mark.usefixtures("package")
def test_pages_may_move_without_a_new_plan():
    x = ragged()
    for order in ((6, 2, 5, 0, 3, 1, 4, 7), (0, 1, 2, 3, 4, 5, 6, 7)):
        torch.testing.assert_close(backend.varlen(paged(x, order=order)), expected(x))
    assert plans() == [1]


@pytest.mark.usefixtures("package")
def test_kinds_of_layers_have_their_own_plans():
    x = ragged()
    for y in (x, dataclasses.replace(x, causal=False), paged(x), x, paged(x)):
        torch.testing.assert_close(
            backend.varlen(y)[:10], expected(dataclasses.replace(x, causal=y.causal))[:10]
        )
    assert plans() == [1, 1, 1]


@pytest.mark.usefixtures("package")
def test_lengths_changed_unseen_are_an_error():
    x = ragged()
    backend.varlen(x)
    x.cu_seqlens_k.numpy()[:] = starts([3, 8, 8, 4, 0]).numpy()  # as a kernel would, past the version
    with pytest.raises(RuntimeError, match="cu_seqlens are not those of the plan"):
        backend.varlen(x)
    assert len(flashinfer_plans.STALE) < 256


@pytest.mark.parametrize("pages", [False, True])
def test_cuda_graphs_read_the_plan_made_outside(package, pages):
    x = ragged()
    how = {}
    if pages:
        x, plain = paged(x), x
        how["block_table"] = x.block_table
    package.capturing[0] = True
    with pytest.raises(RuntimeError, match=r"nothing is planned: call tq_inductor\.attention\.flashinfer"):
        backend.varlen(x)
    with pytest.raises(RuntimeError, match="before the capture"):
        backend.plan(*arguments(x), **how)
    package.capturing[0] = False
    on_meta = [y.to("meta") for y in (x.q, x.k, x.v)]
    backend.plan(*on_meta, *arguments(x)[3:], **how)
    package.capturing[0] = True
    (wrapper,) = Wrapper.made
    read = {**wrapper.fixed, **graph_buffers()}
    places = {name: buffer.data_ptr() for name, buffer in read.items()}
    want = expected(plain if pages else x)
    torch.testing.assert_close(backend.varlen(x), want)
    x.cu_seqlens_k.copy_(starts([3, 8, 8, 4, 0]))
    with pytest.raises(RuntimeError, match="not those of the plan"):  # on a GPU, at the replay
        backend.varlen(x)
    package.capturing[0] = False
    backend.plan(*on_meta, *arguments(x)[3:], **how)
    backend.plan(*on_meta, *arguments(x)[3:], **how)
    assert plans() == [2]
    read = {**wrapper.fixed, **graph_buffers()}
    assert places == {name: buffer.data_ptr() for name, buffer in read.items()}
    package.capturing[0] = True
    backend.varlen(x)


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.usefixtures("package")
def test_the_run_before_a_capture_takes_the_plan_of_the_graph(pages):
    """Or what it makes would lie in the memory of the CUDA graph."""
    x = ragged()
    call = paged(x) if pages else x
    backend.plan(*arguments(call), block_table=call.block_table)
    torch.testing.assert_close(backend.varlen(call), expected(x))
    assert plans() == [1]
    other = dataclasses.replace(call, cu_seqlens_k=starts([3, 8, 8, 4, 0]))
    backend.varlen(other)
    assert plans() == [2]
    x = ragged(tokens=13)
    backend.varlen(paged(x) if pages else x)  # of other sizes: a plan that is no graph's
    assert plans() == [2, 1]


@pytest.mark.usefixtures("package")
def test_plans_made_in_inference_mode_serve_outside():
    x = ragged()
    with torch.inference_mode():
        backend.varlen(x)
        backend.plan(*arguments(x))
    x.cu_seqlens_k.copy_(starts([3, 8, 8, 4, 0]))
    torch.testing.assert_close(backend.varlen(x), expected(x))


def test_a_plan_that_failed_serves_no_graph(package, monkeypatch):
    x = ragged()
    backend.plan(*arguments(x))

    def fail(wrapper, **said):
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Wrapper, "plan", fail)
        with pytest.raises(RuntimeError, match="no room"):
            backend.plan(*arguments(dataclasses.replace(x, cu_seqlens_k=starts([3, 8, 8, 4, 0]))))
    assert graph_buffers(ready=False)["lengths"].max() < 0  # a replay stops
    package.capturing[0] = True
    with pytest.raises(RuntimeError, match="nothing is planned"):
        backend.varlen(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": starts([3, 3])}, "cu_seqlens_q has 3 entries, cu_seqlens_k 6"),
        ({"cu_seqlens_q": starts(LENS_Q) + 1}, "cu_seqlens_q .* starts at 0 and never falls"),
        ({"cu_seqlens_k": starts([9, -2, 0, 0, 0])}, "cu_seqlens_k .* starts at 0 and never falls"),
        ({"cu_seqlens_q": starts([9, 9, 0, 0, 0])}, "cu_seqlens_q ends at 18 of 12 tokens"),
        ({"cu_seqlens_k": starts([9, 90, 0, 0, 0])}, "cu_seqlens_k ends at 99 of 25 tokens"),
    ],
)
@pytest.mark.usefixtures("package")
def test_lengths_that_cannot_be(changes, message):
    x = dataclasses.replace(ragged(), **changes)
    with pytest.raises(ValueError, match=message):
        backend.varlen(x)
    assert not Wrapper.made


@pytest.mark.usefixtures("package")
def test_more_keys_than_the_block_table_has_room_for():
    x = paged(ragged())
    with pytest.raises(ValueError, match="a sequence has 13 keys, block_table room for 12"):
        backend.varlen(dataclasses.replace(x, cu_seqlens_k=starts([13, 0, 0, 0, 0])))


@pytest.mark.usefixtures("package")
def test_nothing_to_attend():
    x = ragged()
    none = torch.zeros(1, dtype=torch.int32)
    for y in (
        dataclasses.replace(x, cu_seqlens_q=none, cu_seqlens_k=none),
        dataclasses.replace(x, k=x.k[:0], v=x.v[:0]),
        dataclasses.replace(x, q=x.q[:0]),
    ):
        got = backend.varlen(y)
        assert got.shape == (len(y.q), 4, 16)
        assert not got.any()
    assert not Wrapper.made


@pytest.mark.usefixtures("package")
def test_tensors_that_lie_otherwise():
    x = ragged()
    y = dataclasses.replace(x, q=x.q.transpose(0, 1).contiguous().transpose(0, 1), k=x.k.mT.contiguous().mT)
    torch.testing.assert_close(backend.varlen(y), expected(x))


@pytest.mark.parametrize(
    ("longest", "sizes", "pages", "kernel"),
    [
        (40, (128, 128), False, "fa3"),
        (16, (128, 128), False, "fa2"),
        (40, (192, 128), False, "fa3"),
        (40, (192, 128), True, "fa2"),
        (40, (512, 512), False, "fa2"),
    ],
)
@pytest.mark.usefixtures("package")
def test_which_kernel(longest, sizes, pages, kernel):
    q, k, v = torch.randn(12, 4, sizes[0]), torch.randn(25, 2, sizes[0]), torch.randn(25, 2, sizes[1])
    x = ragged(longest=longest)
    table = torch.arange(25, dtype=torch.int32).view(5, 5) if pages else None
    if pages:
        k, v = (y[:, None].expand(-1, 4, -1, -1).contiguous() for y in (k, v))
    x = dataclasses.replace(x, q=q, k=k, v=v, block_table=table)
    backend.varlen(x)
    assert Wrapper.made[0].backend == kernel


@pytest.mark.usefixtures("package")
def test_fp8_pages_are_planned_as_the_tokens_that_they_become():
    """Heads of 512 are no kernel's before SM100."""
    x = paged(ragged())
    assert backend.formats(torch.device("cpu"), 512) == ()
    q, k, v = (y.repeat(*[1] * (y.dim() - 1), 32) for y in (x.q, x.k, x.v))
    x = dataclasses.replace(x, q=q, k=k, v=v)
    backend.plan(*arguments(x), kv_format="e4m3", k_scale=0.5, block_table=x.block_table)
    (said,) = Wrapper.made[0].plans
    assert (said["sm_scale"], said["kv_indptr"].tolist()[-1]) == (0.125, 23)


def stored(x, dtype):
    return dataclasses.replace(x, k=x.k.to(dtype), v=x.v.to(dtype))


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("kv_format", ["e4m3", "e5m2"])
def test_fp8_goes_to_the_fa2_kernel_as_it_is(package, kv_format, pages):
    dtype = backend.STORED[kv_format]
    assert kv_format in backend.formats(torch.device("cpu"), 64)
    x = stored(ragged(), dtype)
    call = dataclasses.replace(stored(paged(ragged()), dtype) if pages else x, max_seqlen_q=40)
    as_bytes = dataclasses.replace(call, k=call.k.view(torch.uint8), v=call.v.view(torch.uint8), scale=0.5)
    backend.plan(*arguments(as_bytes), kv_format=kv_format, k_scale=0.5, block_table=call.block_table)
    (wrapper,) = Wrapper.made
    (said,) = wrapper.plans
    assert (wrapper.backend, said["sm_scale"]) == ("fa2", 0.25)
    assert (said["q_data_type"], said["kv_data_type"]) == (torch.float32, dtype)
    package.capturing[0] = True
    assert backend.varlen(call).shape == (12, 4, 16)
    package.capturing[0] = False
    if not pages:
        torch.testing.assert_close(backend.varlen(x), expected(x))


def test_modules_of_fp8_are_their_own(package):
    build(package, dataclasses.replace(CALL, q_len=1))
    assert backend.unbuilt(dataclasses.replace(CALL, q_len=1)) == []
    (reason,) = backend.unbuilt(dataclasses.replace(CALL, q_len=1, kv_bytes="e4m3"))
    assert "bfloat16_torch.float8_e4m3fn_torch.bfloat16" in reason
    assert "fa2" in backend.unbuilt(dataclasses.replace(CALL, kv_bytes="e4m3"))[0]


def dense(q_len, batch):
    q, k, v = (torch.randn(batch, heads, n, 64) for heads, n in ((4, q_len), (2, 40), (2, 40)))
    return DenseArguments(q, k, v, None, None, None, "bottom-right", (None, 0), None, 0.25)


@pytest.mark.parametrize(("q_len", "kernel"), [(3, "fa2"), (20, "fa3")])
def test_dense_calls_are_planned_once_per_shape(package, q_len, kernel):
    x = dense(q_len, 2)
    package.capturing[0] = True
    with pytest.raises(RuntimeError, match="once before a CUDA graph"):
        backend.attend(x)
    package.capturing[0] = False
    for _ in range(2):
        torch.testing.assert_close(backend.attend(x), dense_attention(x))
    assert plans() == [1]
    assert Wrapper.made[0].backend == kernel
    backend.attend(dense(q_len, 3))
    assert plans() == [1, 1]


def test_a_single_row_needs_no_plan(package):
    seen = []
    package.single_prefill_with_kv_cache = lambda **said: seen.append(said) or said["q"]
    backend.attend(dense(20, 1))
    assert (seen[0]["causal"], seen[0]["window_left"], seen[0]["logits_soft_cap"]) == (True, -1, 0.0)
    assert not Wrapper.made


def build(package, call):
    """As if the module of a call had been compiled before."""
    name = backend.unbuilt(call)[0].split()[0]
    (package.jit.env.FLASHINFER_JIT_DIR / name).mkdir()
    (package.jit.env.FLASHINFER_JIT_DIR / name / f"{name}.so").touch()
    return name


def test_a_module_is_announced_once(package, caplog, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "2")
    x = ragged()
    with caplog.at_level(logging.WARNING):
        backend.varlen(x)
        backend.varlen(ragged(tokens=13))
        backend.plan(*arguments(x))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "flashinfer: compiling batch_prefill_fa2_torch.float32" in said
    assert f"(about 3 min with 2 processes), kept in {package.jit.env.FLASHINFER_JIT_DIR}" in said


def test_nothing_is_said_of_a_module_that_is_built(package, caplog):
    build(package, dataclasses.replace(CALL, dtype=torch.float32, head_dim=64, v_head_dim=64))
    q, k, v = (torch.randn(n, heads, 64) for n, heads in ((12, 4), (25, 2), (25, 2)))
    with caplog.at_level(logging.WARNING):
        backend.varlen(dataclasses.replace(ragged(), q=q, k=k, v=v))
    assert not caplog.records


def test_auto_takes_only_what_is_built(package):
    """On an SM80 GPU nothing else reads pages; asked for by name it may be compiled."""
    call = dataclasses.replace(CALL, capability=(8, 0), page_size=16)
    choice = select.select(call)
    assert choice.backend == "none"
    assert "is not built (about" in choice.not_chosen["flashinfer"][0]
    assert select.select(call, "flashinfer").backend == "flashinfer"
    build(package, call)
    assert select.select(call).backend == "flashinfer"
    assert select.select(dataclasses.replace(call, softcap=30.0, varlen=False)).backend == "none"


@pytest.mark.parametrize(
    "facts",
    [
        {"dtype": torch.float16},
        {"head_dim": 64, "v_head_dim": 64},
        {"window": (255, 0)},
        {"softcap": 30.0},
        {"q_len": 1},
        {"varlen": False, "batch_size": 1},
    ],
)
def test_modules_are_told_apart(package, facts):
    build(package, CALL)
    assert backend.unbuilt(CALL) == []
    assert backend.unbuilt(dataclasses.replace(CALL, **facts))


def test_doctor_counts_modules(package, capsys, monkeypatch):
    build(package, CALL)
    monkeypatch.setattr(backend, "why_not_here", lambda limits: [])
    assert cli.main(["doctor"]) == 0
    folder = package.jit.env.FLASHINFER_JIT_DIR
    assert (
        f"flashinfer   yes: 1 modules are built, in {folder / 'aot'} and {folder}"
        in capsys.readouterr().out
    )


def graph_buffers(ready=True):
    """Of the one plan for graphs."""
    plans = [plan for plan in gc.get_objects() if type(plan) is flashinfer_plans.Plan]
    (buffers,) = [plan._buffers for plan in plans if plan._for_graph and plan.ready == ready]
    return buffers
