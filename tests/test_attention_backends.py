"""What each attention backend says of simulated GPUs, packages and calls; no GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from backends_page import PAGE, page_with_tables

from tq_inductor.attention import fa2, fa3, fa4, packages
from tq_inductor.attention.arguments import DenseArguments, VarlenArguments
from tq_inductor.attention.call import AttentionCall
from tq_inductor.attention.order import LAST, ORDERS, Order
from tq_inductor.attention.select import BACKENDS, BY_NAME, attention_backends, select
from tq_inductor.errors import NoAttentionBackendError

ALL = {
    "flash-attn": "2.8.3.post2",
    "flash-attn-3": None,
    "fa3-fwd": "0.0.3",
    "flash-attn-4": "4.0.0b36",
    "flashinfer-python": "0.6.18.post1",
}
GPUS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
PLAIN = AttentionCall(2, 2048, 2048, 32, 8, 128, 128, torch.bfloat16, "cuda", (9, 0), cached=False)
CAUSAL = {"is_causal": True, "alignment": "equal", "window": (None, 0)}
BOTTOM_RIGHT = {"q_len": 512, "mask": "bool", "alignment": "bottom-right", "window": (None, 0)}
TOP_LEFT = {"q_len": 512, "is_causal": True, "alignment": "top-left", "window": (None, 0)}


@pytest.fixture
def installed(monkeypatch):
    """Call with distribution -> version: those are what is installed, and all of it can be imported."""

    def pretend(versions):
        monkeypatch.setattr(packages, "version_of", versions.get)
        monkeypatch.setattr(packages, "import_failure", lambda module: "")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)

    pretend(ALL)
    return pretend


def call(**facts):
    return dataclasses.replace(PLAIN, **facts)


def willing(**facts):
    """The backends of others that can run a call."""
    names = [b.name for b in BACKENDS if b.name not in ("turboquant", "triton", "sdpa")]
    return [name for name in names if not BY_NAME[name].why_not(call(**facts))]


def gpu(name):
    if name.startswith("gfx"):
        return {"capability": None, "rocm": name}
    return {"capability": (int(name[2:-1]), int(name[-1]))}


# The capability matrix of shared/reference/attention-kernels.md: who runs what, where.
NEWEST = "fa4 fa2 flashinfer cudnn torch_flash flex"
HOPPER = f"fa3 {NEWEST}"
MATRIX = [
    # architectures, all of them with plain full attention in bf16
    *((f"sm{a}{b}", {}, HOPPER if (a, b) == (9, 0) else NEWEST) for a, b in GPUS),
    ("sm75", {}, ""),
    ("gfx942", {}, "flex"),
    # dtypes
    ("sm90", {"dtype": torch.float16}, NEWEST),  # fa3-fwd is built for bf16
    ("sm90", {"dtype": torch.float32}, "flex"),
    ("sm90", {"dtype": torch.float64}, ""),
    # sizes of a head
    ("sm90", {"head_dim": 64, "v_head_dim": 64}, HOPPER),
    ("sm90", {"head_dim": 96, "v_head_dim": 96}, "fa3 fa4 fa2 cudnn torch_flash flex"),
    ("sm90", {"head_dim": 100, "v_head_dim": 100}, "flex"),
    ("sm90", {"head_dim": 8, "v_head_dim": 8}, "fa3 fa4 fa2 cudnn torch_flash"),
    ("sm90", {"head_dim": 4, "v_head_dim": 4}, ""),
    ("sm90", {"head_dim": 256, "v_head_dim": 256}, HOPPER),
    ("sm80", {"head_dim": 256, "v_head_dim": 256}, "fa2 flashinfer torch_flash flex"),
    ("sm100", {"head_dim": 256, "v_head_dim": 256}, "fa4 fa2 flashinfer torch_flash flex"),
    ("sm120", {"head_dim": 256, "v_head_dim": 256}, "fa2 flashinfer torch_flash flex"),
    ("sm90", {"head_dim": 512, "v_head_dim": 512}, "flashinfer cudnn"),
    ("sm80", {"head_dim": 512, "v_head_dim": 512}, "flashinfer"),
    ("sm100", {"head_dim": 512, "v_head_dim": 512}, "fa4 flashinfer"),
    ("sm103", {"head_dim": 512, "v_head_dim": 512}, "fa4 flashinfer"),
    ("sm90", {"head_dim": 192, "v_head_dim": 128}, "fa3 fa4 flashinfer cudnn flex"),
    ("sm100", {"head_dim": 192, "v_head_dim": 128}, "fa4 flashinfer flex"),
    ("sm80", {"head_dim": 192, "v_head_dim": 128}, "flashinfer flex"),
    ("sm90", {"head_dim": 64, "v_head_dim": 512}, "fa3 cudnn"),
    ("sm100", {"head_dim": 64, "v_head_dim": 512}, "fa4"),
    ("sm90", {"head_dim": None}, ""),
    # causal, as many queries as keys and fewer, both alignments
    ("sm90", CAUSAL, HOPPER),
    ("sm90", BOTTOM_RIGHT, "fa3 fa4 fa2 flashinfer torch_flash flex"),
    ("sm90", TOP_LEFT, "cudnn flex"),
    ("sm90", {**BOTTOM_RIGHT, "q_len": 4096}, ""),  # queries without a key
    # windows
    ("sm90", {**CAUSAL, "window": (255, 0)}, "fa4 fa2 flashinfer torch_flash flex"),
    ("sm90", {"alignment": "equal", "window": (64, 64)}, "fa4 fa2 torch_flash flex"),
    ("sm90", {"alignment": "equal", "window": (64, None)}, "fa4 fa2 torch_flash flex"),
    # scores
    ("sm90", {**CAUSAL, "softcap": 30.0}, "fa3 fa4 fa2 flashinfer flex"),
    ("sm80", {**CAUSAL, "softcap": 30.0}, "fa4 fa2 flashinfer flex"),
    ("sm90", {**CAUSAL, "sinks": True}, "fa4"),
    ("sm90", {**CAUSAL, "mask": "float", "is_causal": False, "alibi": True}, "fa2 flex"),
    ("sm100", {"head_dim": 256, "v_head_dim": 256, "softcap": 30.0}, "fa2 flashinfer flex"),
    # masks that need to be given
    ("sm90", {"mask": "bool"}, "flex"),
    ("sm90", {"mask": "float"}, "flex"),
    ("sm90", {"mask": "bool", "is_causal": True}, ""),
    ("sm90", {"mask": "bool", "padding": "full"}, "fa3 fa4 fa2 torch_flash flex"),
    ("sm90", {"mask": "bool", "padding": "causal", "softcap": 30.0}, "flex"),
    # ragged and paged
    ("sm90", {**CAUSAL, "varlen": True}, "fa3 fa4 fa2 flashinfer torch_flash"),
    ("sm80", {**CAUSAL, "varlen": True, "page_size": 16}, "flashinfer"),
    ("sm90", {"page_size": 16}, "fa4 flashinfer"),
    ("sm90", {"page_size": 256}, "fa4 fa2 flashinfer"),
    ("sm80", {"page_size": 16}, "flashinfer"),
    ("sm120", {"page_size": 16}, "flashinfer"),
    ("sm100", {"page_size": 16}, "fa4 flashinfer"),
    # bytes
    *(("sm90", {"kv_bytes": kind}, "flashinfer") for kind in ("e4m3", "e5m2", "nvfp4")),
    *(("sm90", {"kv_bytes": kind}, "") for kind in ("undeclared", "k4v4")),
    ("sm90", {"kv_bytes": "nvfp4", "head_dim": 64, "v_head_dim": 64}, ""),
    ("sm90", {"kv_bytes": "e4m3", "head_dim": 512, "v_head_dim": 512}, ""),
    ("sm100", {"kv_bytes": "e4m3", "head_dim": 512, "v_head_dim": 512}, "flashinfer"),
    # the rest
    ("sm90", {"needs_grad": True}, ""),
    ("sm90", {"dropout": 0.1}, ""),
    ("sm90", {"deterministic": True}, "fa3 fa4 fa2 flashinfer torch_flash flex"),
    ("sm90", {"kv_len": 1}, "fa3 fa4 fa2 flashinfer torch_flash flex"),
    ("sm90", {"kv_len": 0}, ""),
    ("sm90", {"kv_len": None}, "fa3 fa4 fa2 torch_flash"),
    ("sm90", {"device": "cpu"}, ""),
    ("sm90", {"obstacles": ("inside torch.nn.attention.sdpa_kernel(MATH)",)}, ""),
]


@pytest.mark.parametrize(("where", "facts", "expected"), MATRIX)
def test_the_capability_matrix(installed, where, facts, expected):
    assert willing(**{**gpu(where), **facts}) == expected.split()


# Each reason names the value that caused it.
REASONS = [
    ("fa4", {"head_dim": 512, "v_head_dim": 512}, "head_dim=512 (needs a multiple of 8, 8 to 256)"),
    ("fa3", {"capability": (8, 0)}, "architecture sm80 (needs sm90)"),
    ("fa3", {"capability": None, "rocm": "gfx942"}, "architecture gfx942 (needs sm90)"),
    ("fa3", {"dtype": torch.float16}, "dtype float16 (needs bfloat16)"),
    ("fa3", {**CAUSAL, "window": (255, 0)}, "window of 255 keys back: it has none"),
    ("fa3", {"mask": "float", "alibi": True}, "ALiBi: it has none"),
    ("fa4", {"mask": "float", "alibi": True}, "ALiBi: it has none"),
    ("cudnn", BOTTOM_RIGHT, "aligned bottom-right with q_len=512, kv_len=2048 (aligns top-left)"),
    ("fa3", TOP_LEFT, "aligned top-left with q_len=512, kv_len=2048 (aligns bottom-right)"),
    ("torch_flash", {"softcap": 30.0}, "softcap=30.0: it has none"),
    ("torch_flash", {"mask": "bool", "visible": "padding"}, "mask (bool: padding) is more than"),
    ("torch_flash", {"kv_bytes": "e4m3"}, "keys and values are e4m3 bytes (takes tensors of bfloat16)"),
    ("flashinfer", {"kv_bytes": "undeclared"}, "undeclared bytes (takes e4m3 or e5m2 or nvfp4)"),
    ("fa2", {"page_size": 16}, "pages of 16 tokens (needs multiples of 256)"),
    ("flex", {"kv_len": None}, "batch or lengths are not known at compile time"),
    ("cudnn", {"deterministic": True}, "deterministic algorithms are asked for"),
    ("flashinfer", {"mask": "bool", "padding": "full"}, "in the graph: plan() needs lengths on the host"),
    ("sdpa", {"page_size": 16}, "pages of 16 tokens: scaled_dot_product_attention has none"),
    ("triton", {"page_size": 16}, "pages of 16 tokens: our kernels take none"),
    ("triton", {"kv_bytes": "e4m3"}, "keys and values are e4m3 bytes"),
]


@pytest.mark.parametrize(("name", "facts", "reason"), REASONS)
def test_reasons_name_the_value(installed, name, facts, reason):
    assert reason in "; ".join(BY_NAME[name].why_not(call(**facts)))


def test_with_no_package_only_what_pytorch_brings_is_left(installed):
    installed({})
    assert willing() == ["cudnn", "torch_flash", "flex"]
    reasons = BY_NAME["fa4"].why_not(call())
    assert reasons == ["flash-attn-4 is not installed (pip install 'tq_inductor[fa4]')"]


def test_some_packages(installed):
    installed({"flash-attn-4": "4.0.0b36"})  # brings a module flash_attn, but no FlashAttention 2
    assert willing() == ["fa4", "cudnn", "torch_flash", "flex"]
    installed({"flash-attn": "2.8.3"})
    assert willing() == ["fa2", "cudnn", "torch_flash", "flex"]
    assert select(call()).backend != "fa2"  # on Hopper FlashAttention 2 is not what one gets unasked


def test_packages_are_known_by_version(installed):
    old = {"flashinfer-python": "0.6.11", "flash-attn-4": "4.0.0b35", "flash-attn": "2.6.3"}
    installed({**old, "fa3-fwd": "0.0.2"})
    assert willing() == ["flashinfer", "cudnn", "torch_flash", "flex"]
    assert BY_NAME["fa4"].why_not(call()) == ["flash-attn-4 4.0.0b35 (needs 4.0.0b36 or newer)"]
    assert willing(head_dim=512, v_head_dim=512) == ["cudnn"]
    installed({"flash-attn-3": "3.0.0", "fa3-fwd": "0.0.3"})  # the full build goes first
    assert "fa3" in willing(dtype=torch.float16)
    assert "fa3" in willing(alignment="equal", window=(255, 0))
    assert "fa3" in willing(page_size=1)


def test_cudnn_is_known_by_version(installed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90700)
    assert "cudnn" in willing()
    assert "cudnn" not in willing(head_dim=256, v_head_dim=256)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    assert "cudnn" in willing(head_dim=256, v_head_dim=256)
    assert "cudnn" not in willing(head_dim=512, v_head_dim=512)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert BY_NAME["cudnn"].why_not(call()) == ["cuDNN 0 (needs 90000 or newer)"]


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Installs flash-attn 2.8.3 with a given `flash_attn_interface.py` on `sys.path`."""

    def install(source):
        info = tmp_path / "flash_attn-2.8.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    clear = (packages.version_of.cache_clear, packages.import_failure.cache_clear)
    for forget in clear:
        forget()
    yield install
    for forget in clear:
        forget()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_a_package_that_lacks_something_is_a_reason(package):
    package("import nothing_of_this_name")
    reason = "flash-attn 2.8.3 cannot be imported: No module named 'nothing_of_this_name'"
    assert BY_NAME["fa2"].why_not(call()) == []
    assert BY_NAME["fa2"].broken() == [reason]
    with pytest.raises(NoAttentionBackendError, match=reason):
        select(call(), "fa2")
    window = call(capability=(8, 0), alignment="equal", window=(255, 0), mask="bool")
    choice = select(window)  # where fa2 would be the first
    assert (choice.backend, choice.not_chosen["fa2"]) == ("torch_flash", [reason])


def test_a_package_that_fails_surfaces(package):
    package("raise RuntimeError('built for another torch')")
    window = call(capability=(8, 0), alignment="equal", window=(255, 0), mask="bool")
    with pytest.raises(RuntimeError, match="built for another torch"):
        select(window)
    assert BY_NAME["fa2"].why_not(call(device="cpu")) == ["device cpu (needs cuda)"]


def test_only_what_is_chosen_is_imported(package):
    package("raise RuntimeError('imported')")
    assert select(call(**CAUSAL)).backend == "sdpa"
    assert "flash_attn" not in sys.modules


RECORDER = """
calls = []
def flash_attn_func(**kwargs):
    calls.append(kwargs)
    return (kwargs["q"][..., :kwargs["v"].shape[-1]], "lse", "dmask") if as_tuple else kwargs["q"]
flash_attn_varlen_func = flash_attn_func
as_tuple = False
"""


def dense(q_len=8, kv_len=8, window=(None, 0), softcap=None):
    q, k, v = (torch.randn(1, heads, n, 16) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len)))
    return DenseArguments(q, k, v, None, None, None, "bottom-right", window, softcap, 0.25)


def ragged():
    q, k, v = (torch.randn(8, heads, 16) for heads in (4, 2, 2))
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    return VarlenArguments(q, k, v, starts, starts, 5, 5, True, 0.25)


@pytest.mark.parametrize(("window", "asked"), [((None, 0), (True, (-1, -1))), ((7, 0), (False, (7, 0)))])
def test_fa2_is_called_by_keyword(package, window, asked):
    package(RECORDER)
    from flash_attn import flash_attn_interface

    assert fa2.attend(dense(window=window)).shape == (1, 8, 4, 16)
    fa2.varlen(ragged())
    first, second = flash_attn_interface.calls
    assert (first["causal"], first["window_size"]) == asked
    assert first["softmax_scale"] == 0.25
    assert second["max_seqlen_q"] == 5


@pytest.fixture
def interface(monkeypatch):
    """A FlashAttention 4 that notes what it is called with."""
    made = types.ModuleType("flash_attn.cute.interface")
    exec(RECORDER, made.__dict__)
    for name, module in (("flash_attn", None), ("flash_attn.cute", None), (made.__name__, made)):
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    return made


def test_fa4_reads_pages_where_they_lie(interface):
    x = ragged()
    pages = [y.unflatten(0, (2, 4)) for y in (x.k, x.v)]
    table = torch.tensor([[0, -1], [1, 99]], dtype=torch.int32)
    fa4.varlen(dataclasses.replace(x, k=pages[0], v=pages[1], block_table=table))
    (said,) = interface.calls
    assert "cu_seqlens_k" not in said
    assert said["k"] is pages[0]
    assert said["page_table"].tolist() == [[0, 0], [1, 1]]  # there is no page -1
    assert (said["seqused_k"].tolist(), said["seqused_k"].dtype) == ([3, 5], torch.int32)


@pytest.mark.parametrize(("capability", "takes"), [((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_who_takes_pages(monkeypatch, capability, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = [b.name for b in BACKENDS if b.pages(torch.device("cuda"))]
    assert found == (["fa4", "flashinfer"] if takes else ["flashinfer"])


@pytest.mark.parametrize("as_tuple", [False, True])
def test_fa4_may_return_a_tuple(interface, as_tuple):
    """Versions and functions differ: plain calls give (out, lse), the ragged ones a tensor."""
    interface.as_tuple = as_tuple
    assert fa4.attend(dense()).shape == (1, 8, 4, 16)
    assert fa4.varlen(ragged()).shape == (8, 4, 16)
    assert all(kwargs["causal"] for kwargs in interface.calls)


@pytest.mark.parametrize("namespace", ["fa3_fwd", "flash_attn_3"])
def test_fa3_calls_the_op_of_its_own_package(monkeypatch, installed, namespace):
    """Never a module that another version of FlashAttention may have put in its place."""
    build = next(b for b in fa3.BUILDS if b.namespace == namespace)
    installed({build.package: build.oldest})
    seen = []

    def fwd(**kwargs):
        seen.append(kwargs)
        return kwargs.get("out", kwargs["q"]), None, None, None

    monkeypatch.setattr(torch.ops, namespace, types.SimpleNamespace(fwd=fwd), raising=False)
    assert fa3.attend(dense()).shape == (1, 8, 4, 16)
    assert fa3.varlen(ragged()).shape == (8, 4, 16)
    assert [kwargs["is_causal"] for kwargs in seen] == [True, True]


def test_packed_bytes_are_refused_by_all_but_ours(installed):
    """No special case: `turboquant` wins because the others say that they cannot read its bytes."""
    for backend in BACKENDS:
        assert backend.name == "turboquant" or backend.why_not(call(kv_bytes="k4v4"))


def test_a_named_backend_that_cannot_says_why(installed):
    with pytest.raises(NoAttentionBackendError, match="head_dim=512"):
        select(call(head_dim=512, v_head_dim=512), "fa4")
    assert select(call(head_dim=512, v_head_dim=512), "flashinfer").backend == "flashinfer"


def test_what_auto_never_takes_says_so(installed):
    choice = select(call(**CAUSAL))
    assert choice.not_chosen["cudnn"] == ["only if asked for by name (see attention/order.py)"]
    assert choice.not_chosen["sdpa"] == [f"{choice.backend} is preferred"]


def test_the_orders_name_backends_that_exist():
    for order in ORDERS:
        assert order.names[0] == "turboquant"
        assert set(order.names) <= set(BY_NAME)
        assert len(set(order.names)) == len(order.names)
        assert set(LAST) <= set(order.names)
    assert ORDERS[-1] == Order(first=ORDERS[-1].first)  # fits everything


EVIDENCE = json.loads((Path(__file__).parents[1] / "benchmarks/results/backends.json").read_text())


@pytest.mark.parametrize("case", EVIDENCE["cases"], ids=lambda c: f"{c['name']} {c['batch']}x{c['kv_len']}")
def test_the_order_follows_from_what_was_measured(installed, case):
    """Within 5% of the best, or of the runs' spread, with all packages of the evidence, and with none."""
    if case["ragged"]:
        return
    window = (case["back"], case["ahead"])
    equal = window == (None, None) or case["q_len"] == case["kv_len"]
    flag = equal and window in ((None, None), (None, 0))
    names = ("batch_size", "q_len", "kv_len", "num_heads", "num_kv_heads", "head_dim", "v_head_dim")
    keys = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "head_dim")
    facts = {name: case[key] for name, key in zip(names, keys, strict=True)}
    facts |= {"cached": case["cached"], "alignment": "equal" if equal else "bottom-right", "window": window}
    facts |= {
        "mask": "none" if flag else "bool",
        "is_causal": flag and window == (None, 0),
        "interval": not flag,
    }
    default = case["default"]["median_us"]
    for versions in (EVIDENCE["environment"], {"flash-attn-4": "4.0.0b36"}, {}):
        installed(versions)
        options = {
            b.name: case[b.name] for b in BACKENDS if b.name in case and not b.why_not(call(**facts))
        }
        options["sdpa"] = case["default"]
        chosen = options[select(call(**facts)).backend]
        best = min(options.values(), key=lambda way: way["median_us"])
        slack = max(0.05 * best["median_us"], best["spread_us"], chosen["spread_us"])
        assert chosen["median_us"] <= best["median_us"] + slack
        assert chosen["median_us"] <= default + default * 0.01


PADDING = json.loads((Path(__file__).parents[1] / "benchmarks/results/padding.json").read_text())


@pytest.mark.parametrize("case", PADDING["cases"], ids=lambda case: case["name"])
def test_the_order_for_padding_follows_from_what_was_measured(installed, case):
    """Within 5% of the best, or of the runs' spread, with the packages of the evidence."""
    facts = {"batch_size": case["batch"], "q_len": case["length"], "kv_len": case["length"], "mask": "bool"}
    facts |= {"num_heads": case["heads"], "num_kv_heads": case["kv_heads"]}
    facts |= {"head_dim": case["head_dim"], "v_head_dim": case["head_dim"], "interval": True}
    # As `describe_call` has it: what a mask over keys hides too is no alignment and no window.
    facts["padding"] = "causal" if case["causal"] else "full"
    installed(PADDING["environment"])
    choice = select(call(**facts))
    ways = [way for way in case.values() if isinstance(way, dict)]
    best, chosen = min(ways, key=lambda way: way["median_us"]), case[choice.backend]
    slack = max(0.05 * best["median_us"], best["spread_us"], chosen["spread_us"])
    assert chosen["median_us"] <= best["median_us"] + slack


def test_layers_are_chosen_for_one_by_one(installed):
    """A model with packed, full and sliding layers: nothing assumes that they are alike."""
    packed = call(q_len=1, mask="bool", kv_format="k4v4", cached=True)
    sliding = call(alignment="equal", window=(255, 0), mask="bool", interval=True)
    wide = call(head_dim=512, v_head_dim=512)
    assert [select(c).backend for c in (packed, sliding, wide)] != ["turboquant"] * 3
    assert select(packed).backend == "turboquant"


def test_availability_on_this_machine_says_why():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, found in attention_backends().items():
        assert bool(found) == (name in ("turboquant", "triton", "sdpa"))
        assert bool(found) or "no CUDA device" in found.reasons


def test_the_docs_page_is_made_of_the_tables():
    page = PAGE.read_text()
    assert page_with_tables(page) == page, "run: python tests/backends_page.py --write"
