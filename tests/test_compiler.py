"""The compiler: entry point, options, the rewritten graph, refusals, reports."""

import dataclasses
import functools
import json
import logging
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from torch._dynamo.utils import counters
from torch.nn import functional as F
from tq_inductor.lowering.rewrite import rewrite

from tq_inductor import PackedKVCache, attention_backends, explain
from tq_inductor.attention.call import AttentionCall
from tq_inductor.attention.select import BACKENDS, select
from tq_inductor.compiler import turboquant
from tq_inductor.errors import CacheFullError, NoAttentionBackendError, OptionError
from tq_inductor.format import KVFormat
from tq_inductor.options import parse_options
from tq_inductor.rotation import rotation_matrix

AUTO = {"prefill": "auto", "decode": "auto"}


def make_cache(**kwargs):
    return PackedKVCache(2, 2, 16, 32, **{"dtype": torch.float32, "device": "cpu", **kwargs})


def new_tokens(q_len=1, heads=2):
    return torch.randn(2, heads, q_len, 16)


def length_mask(cache):
    return (torch.arange(32) < cache.seq_length)[None]


def attend(cache, q, k, v):
    keys, values = cache.update(k, v)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=length_mask(cache), enable_gqa=True)


def rewritten(fn, *args):
    """(graph modules after the rewrite, rows of the report, result)."""
    graphs, rows = [], []

    def backend(gm, example_inputs):
        rows.extend(rewrite(gm, AUTO).rows)
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        result = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return graphs, rows, result


def targets(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method")]


def test_found_in_a_fresh_process_without_importing_us():
    code = "import torch; print(torch.compile(lambda x: x + 1, backend='turboquant')(torch.ones(2)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tensor([2., 2.])" in done.stdout


def test_everything_else_is_left_to_inductor():
    x, w = torch.randn(8, 16), torch.randn(16, 16, requires_grad=True)

    def f(x, w):
        return F.gelu(x @ w).sum()

    out = torch.compile(f, backend="turboquant")(x, w)
    assert torch.allclose(out, f(x, w), rtol=1e-4)
    (gradient,) = torch.autograd.grad(out, w)
    assert torch.allclose(gradient, torch.autograd.grad(f(x, w), w)[0], atol=1e-5)


def test_the_decode_graph_has_one_fused_op_and_no_dequantize():
    (gm,), _, result = rewritten(attend, make_cache(), new_tokens(heads=4), new_tokens(), new_tokens())
    assert result.shape == (2, 4, 1, 16)
    code = gm.print_readable(print_output=False, include_stride=False)
    lines = [line.split("#")[0].strip() for line in code.splitlines()]
    body = [line.split(";")[0].strip() for line in lines if " = torch.ops." in line or ".add_(" in line]
    assert_expected_inline(
        "\n".join(line.replace("torch.ops.tq_inductor.", "") for line in body),
        """\
add_: "i64[]" = l_cache_buffers_seq_length_.add_(1)
tq_append_attend_default: "f32[2, 4, 1, 16]" = tq_append_attend.default(l_cache_buffers_packed_, l_q_, l_k_, l_v_, l_cache_buffers_seq_length_, l_cache_buffers_k_rotation_, l_cache_buffers_k_rotation_, None, to, None, 'k4v4', 32, 0.25, l_cache_buffers_k_mean_, None, None, 0)""",
    )


def test_store_stays_when_the_keys_are_read_twice():
    def f(cache, q, k, v):
        keys, values = cache.update(k, v)
        mask = length_mask(cache)
        first = F.scaled_dot_product_attention(q, keys, values, mask, 0.0, False, enable_gqa=True)
        return F.scaled_dot_product_attention(first, keys, values, attn_mask=mask, enable_gqa=True)

    args = (new_tokens(heads=4), new_tokens(), new_tokens())
    (gm,), rows, result = rewritten(f, make_cache(), *args)
    names = targets(gm)
    assert [row.backend for row in rows] == ["turboquant", "turboquant"]
    assert sum("tq_store" in n for n in names) == 1
    assert sum("tq_decode" in n for n in names) == 2
    assert not any("dequantize" in n or "scaled_dot" in n for n in names)
    assert torch.allclose(result, f(make_cache(), *args), atol=1e-5)


@pytest.mark.parametrize("form", ["repeat_kv", "repeat_interleave", "unsqueeze"])
def test_repeated_heads_are_stripped(form):
    def repeat(x):
        if form == "repeat_interleave":
            return x.repeat_interleave(2, dim=1)
        x = x.unsqueeze(2) if form == "unsqueeze" else x[:, :, None, :, :]
        return x.expand(2, 2, 2, 32, 16).reshape(2, 4, 32, 16)

    def f(cache, q, k, v):
        keys, values = (repeat(x) for x in cache.update(k, v))
        return F.scaled_dot_product_attention(q, keys, values, length_mask(cache))

    args = (new_tokens(heads=4), new_tokens(), new_tokens())
    (gm,), rows, result = rewritten(f, make_cache(), *args)
    assert [row.backend for row in rows] == ["turboquant"]
    assert not any("reshape" in n or "repeat" in n or "dequantize" in n for n in targets(gm))
    assert torch.allclose(result, f(make_cache(), *args), atol=1e-5)


def refused(attention, reason, cache=None):
    """`attention(cache, q, k, v)` must not read the packed bytes, for `reason`, and still be right."""
    args = (new_tokens(heads=4), new_tokens(), new_tokens())
    (gm,), rows, result = rewritten(attention, cache or make_cache(), *args)
    assert rows[-1].backend != "turboquant"
    assert reason in "; ".join(rows[-1].not_chosen["turboquant"])
    assert not any("tq_decode" in n or "tq_append_attend" in n for n in targets(gm))
    assert torch.allclose(result, attention(make_cache(), *args), atol=1e-5)


def test_refuses_heads_in_another_order():
    def f(cache, q, k, v):
        keys, values = (x.repeat(1, 2, 1, 1) for x in cache.update(k, v))
        return F.scaled_dot_product_attention(q, keys, values, length_mask(cache))

    refused(f, "not read from a packed cache")


def test_refuses_a_call_without_a_mask():
    def f(cache, q, k, v):
        return F.scaled_dot_product_attention(q, *cache.update(k, v), enable_gqa=True)

    refused(f, "no attn_mask: over all kv_len=32 slots, empty ones would be visible")


def test_refuses_top_left_causal():
    def f(cache, q, k, v):
        return F.scaled_dot_product_attention(q, *cache.update(k, v), is_causal=True, enable_gqa=True)

    refused(f, "is_causal=True is aligned top-left")


def test_refuses_keys_and_values_swapped():
    def f(cache, q, k, v):
        keys, values = cache.update(k, v)
        return F.scaled_dot_product_attention(q, values, keys, length_mask(cache), enable_gqa=True)

    refused(f, "not read from a packed cache")


def test_refuses_changed_keys():
    def f(cache, q, k, v):
        keys, values = cache.update(k, v)
        return F.scaled_dot_product_attention(q, keys * 2, values, length_mask(cache), enable_gqa=True)

    refused(f, "not read from a packed cache")


def test_refuses_when_the_cache_changes_before_it_is_read():
    def f(cache, q, k, v):
        keys, values = cache.update(k, v)
        mask = length_mask(cache)
        cache.update(v, k)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    refused(f, "changes the cache between its reading and the attention call")


@pytest.mark.parametrize("change", ["method", "item", "foreach"])
def test_refuses_keys_changed_in_place(change):
    def f(cache, q, k, v):
        keys, values = cache.update(k, v)
        if change == "method":
            keys.mul_(2)
        elif change == "item":
            values[:, :, 0] = 0.5
        else:
            torch._foreach_mul_([keys, values], 2.0)
        return F.scaled_dot_product_attention(q, keys, values, length_mask(cache), enable_gqa=True)

    refused(f, "changes the keys or values that were read")


def test_a_mask_that_broadcasts_over_the_keys():
    def f(cache, q, k, v):
        keys, values = cache.update(k, v)
        mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    args = (new_tokens(heads=4), new_tokens(), new_tokens())
    _, rows, result = rewritten(f, make_cache(), *args)
    assert [row.backend for row in rows] == ["turboquant"]
    assert torch.allclose(result, f(make_cache(), *args), atol=1e-5)


def test_the_result_has_the_layout_of_sdpa():
    def f(cache, q, k, v):
        out = attend(cache, q.transpose(1, 2), k, v)
        return out.transpose(1, 2).view(2, 5, -1)

    args = (torch.randn(2, 5, 4, 16), new_tokens(5), new_tokens(5))
    _, rows, result = rewritten(f, make_cache(), *args)
    assert [row.backend for row in rows] == ["turboquant"]
    assert torch.allclose(result, f(make_cache(), *args), atol=1e-5)


def test_attention_of_other_ranks_is_left_alone():
    x = torch.randn(8, 5, 16)
    _, rows, result = rewritten(lambda x: F.scaled_dot_product_attention(x, x, x), x)
    assert [row.backend for row in rows] == ["sdpa"]
    assert torch.allclose(result, F.scaled_dot_product_attention(x, x, x), atol=1e-5)


def test_refuses_dropout_and_gradients():
    def f(cache, q, k, v):
        keys, values = cache.update(k, v)
        mask = length_mask(cache)
        return F.scaled_dot_product_attention(q, keys, values, mask, dropout_p=0.5, enable_gqa=True)

    args = (new_tokens(heads=4), new_tokens(), new_tokens())
    _, rows, _ = rewritten(f, make_cache(), *args)
    assert "dropout_p=0.5" in "; ".join(rows[0].not_chosen["turboquant"])
    report = explain(attend, make_cache(), args[0].requires_grad_(), *args[1:])
    assert "a gradient is needed" in "; ".join(report.rows[0].not_chosen["turboquant"])


@pytest.mark.parametrize("q_len", [17, 129, 512, 100_000, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_of_any_length_read_the_packed_bytes(q_len, dtype):
    call = AttentionCall(1, q_len, 4096, 32, 8, 128, 128, dtype, "cuda", (9, 0), "bool", kv_format="k4v4")
    assert call.phase == "prefill"
    assert select(call).backend == "turboquant"
    refused = select(dataclasses.replace(call, mask="none"))
    assert "no attn_mask" in refused.not_chosen["turboquant"][0]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_choice_for_simulated_gpus(capability):
    call = AttentionCall(
        8, 1, 4096, 32, 8, 128, 128, torch.bfloat16, "cuda", capability, "bool", kv_format="k4v4"
    )
    choice = select(call)
    assert choice.backend == ("turboquant" if capability >= (8, 0) else "sdpa")
    if capability < (8, 0):
        assert choice.not_chosen["turboquant"] == ["compute capability (7, 5) (needs at least (8, 0))"]


def gpu_prefill(**facts):
    shapes = (8, 2048, 2048, 32, 8, 128, 128, torch.bfloat16, "cuda", (9, 0), "bool")
    return AttentionCall(*shapes, **{"visible": "causal + padding", "interval": True, **facts})


@pytest.mark.parametrize(
    ("facts", "backend", "reason"),
    [
        ({}, "triton", ""),
        ({"q_len": None, "kv_len": None}, "triton", ""),
        ({"interval": False}, "sdpa", "every key is visible to some query"),
        ({"interval": False, "bits": True}, "triton", ""),
        (
            {"interval": False, "bounded": True},
            "sdpa",
            "q_len=2048 (at most 128) with a bool mask, no interval",
        ),
        (
            {"interval": False, "bounded": True, "mask": "float"},
            "sdpa",
            "q_len=2048 (at most 128) with a float",
        ),
        ({"interval": False, "bounded": True, "mask": "float", "q_len": 128}, "triton", ""),
        ({"dtype": torch.float32}, "sdpa", "q_len=2048 (at most 128) in float32"),
        ({"device": "cpu", "capability": None}, "sdpa", "every key is visible to some query"),
        ({"capability": (7, 5)}, "sdpa", "compute capability (7, 5) (needs at least (8, 0))"),
        ({"needs_grad": True}, "sdpa", "a gradient is needed"),
        ({"sinks": True, "needs_grad": True}, "none", "a gradient is needed"),
        ({"softcap": 30.0}, "triton", ""),
        ({"softcap": 30.0, "device": "cpu", "capability": None}, "triton", ""),
        ({"softcap": 30.0, "interval": False, "mask": "float"}, "flex", "q_len=2048 (at most 128) with"),
        ({"softcap": 30.0, "needs_grad": True}, "none", "a gradient is needed"),
    ],
)
def test_choice_for_masked_prefill(facts, backend, reason):
    choice = select(dataclasses.replace(gpu_prefill(), **facts))
    assert choice.backend == backend
    assert reason in "; ".join(choice.not_chosen.get("triton", []))


def test_a_cache_in_pages_is_read_through_its_block_table():
    ops, fmt = torch.ops.tq_inductor, KVFormat("k4v4", 16)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    turns = (rotation_matrix(16, "cpu"),) * 2

    def step(cache, length, q, k, v, table):
        length.add_(1)
        ops.tq_store(cache, k, v, length, *turns, "k4v4", block_table=table)
        both = ops.tq_dequantize(cache, length, *turns, "k4v4", 32, torch.float32, block_table=table)
        mask = (torch.arange(32) < length)[None]
        return F.scaled_dot_product_attention(q, *both, attn_mask=mask, enable_gqa=True)

    def state():
        return torch.zeros(4, 2, 16 * fmt.slot_bytes, dtype=torch.uint8), torch.tensor(0)

    new = (new_tokens(heads=4), new_tokens(), new_tokens())
    (compiled_cache, length), eager = state(), state()
    graphs, rows, result = rewritten(step, compiled_cache, length, *new, table)
    assert [row.backend for row in rows] == ["turboquant"]
    assert "tq_inductor.tq_append_attend.default" in targets(graphs[0])
    assert not any("tq_store" in name or "tq_dequantize" in name for name in targets(graphs[0]))
    assert torch.allclose(result, step(*eager, *new, table), atol=1e-5)
    assert torch.equal(compiled_cache, eager[0])

    def other_table(cache, length, q, k, v, table):
        ops.tq_store(cache, k, v, length, *turns, "k4v4", block_table=table)
        both = ops.tq_dequantize(
            cache, length, *turns, "k4v4", 32, torch.float32, block_table=table.flip(0)
        )
        mask = (torch.arange(32) < length)[None]
        return F.scaled_dot_product_attention(q, *both, attn_mask=mask, enable_gqa=True)

    graphs, _, _ = rewritten(other_table, *state(), *new, table)
    assert "tq_inductor.tq_decode.default" in targets(graphs[0])  # the store is of other pages


def test_a_full_cache_in_pages_is_refused():
    ops, fmt = torch.ops.tq_inductor, KVFormat("k4v4", 16)
    turns = (rotation_matrix(16, "cpu"),) * 2

    def step(cache, length, k, v, table):
        length.add_(20)
        ops.tq_store(cache, k, v, length, *turns, "k4v4", block_table=table)

    cache = torch.zeros(4, 2, 16 * fmt.slot_bytes, dtype=torch.uint8)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    arguments = (cache, torch.tensor(0), new_tokens(20), new_tokens(20), table)
    compiled = torch.compile(step, backend="turboquant")
    compiled(*arguments)
    with pytest.raises(CacheFullError, match="32"):
        compiled(*arguments)


def test_sub_graphs_are_rewritten():
    def f(cache, q, k, v):
        return torch.utils.checkpoint.checkpoint(lambda x: x * 2, q, use_reentrant=False) + attend(
            cache, q, k, v
        )

    def inside(q, k, v, mask):
        def attention(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return torch.utils.checkpoint.checkpoint(attention, q, k, v, use_reentrant=False)

    q = new_tokens()
    _, rows, _ = rewritten(inside, q, q, q, torch.ones(1, 1, dtype=torch.bool))
    assert len(rows) == 1
    args = (new_tokens(heads=4), new_tokens(), new_tokens())
    _, rows, result = rewritten(f, make_cache(), *args)
    assert [row.backend for row in rows] == ["turboquant"]
    assert torch.allclose(result, f(make_cache(), *args), atol=1e-5)


def test_explain_tells_modules_lines_and_reasons():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = make_cache()

        def forward(self, q, k, v):
            return attend(self.cache, q, k, v)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, q, k, v):
            for layer in self.layers:
                q = layer(q, k, v)
            return F.scaled_dot_product_attention(q, q, q)

    with torch.no_grad():
        report = explain(Model(), new_tokens(heads=4), new_tokens(), new_tokens())
    assert [row.backend for row in report.rows] == ["turboquant", "turboquant", "sdpa"]
    assert [row.module for row in report.rows[:2]] == ["layers.0", "layers.1"]
    first = report.rows[0]
    assert "test_compiler.py" in first.source
    assert "in attend" in first.source
    assert first.kv_source == "a packed cache, k4v4, max_len=32"
    assert first.mask == "key length"
    assert "turboquant is preferred" in first.not_chosen["sdpa"]
    text = str(report)
    assert "2 of 3 attention calls rewritten" in text
    assert "not turboquant: keys and values are not read from a packed cache" in text
    assert len(json.loads(report.to_json())) == 3


def test_explain_takes_functions_methods_and_what_was_compiled():
    class Model(torch.nn.Module):
        @functools.wraps(torch.nn.Module.forward)
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    model, q = Model(), new_tokens()
    compiled = Model()
    compiled.compile(backend="turboquant")
    with torch.no_grad():
        compiled(q)
        for f in (model, model.forward, torch.compile(model), torch.compile(model.forward), compiled):
            assert len(explain(f, q).rows) == 1


def test_report_reaches_counters_and_log(caplog):
    counters["turboquant"].clear()
    with caplog.at_level(logging.INFO, logger="tq_inductor"), torch.no_grad():
        compiled = torch.compile(attend, backend="turboquant", fullgraph=True)
        compiled(make_cache(), new_tokens(heads=4), new_tokens(), new_tokens())
    assert counters["turboquant"] == {"calls": 1, "rewritten.turboquant": 1}
    assert "1 of 1 attention calls rewritten" in caplog.text


def test_explain_leaves_nothing_behind():
    """Dynamo compiles a function only so many times, then runs it uncompiled."""

    def f(q):
        return F.scaled_dot_product_attention(q, q, q)

    q = new_tokens()
    rows = [explain(f, q).rows for _ in range(torch._dynamo.config.recompile_limit + 1)]
    assert [len(found) for found in rows] == [1] * len(rows)
    counters.clear()
    torch.compile(f, backend="turboquant")(q)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_explain_finds_reaches_counters_and_log_too(caplog):
    counters["turboquant"].clear()
    with caplog.at_level(logging.INFO, logger="tq_inductor"), torch.no_grad():
        report = explain(attend, make_cache(), new_tokens(heads=4), new_tokens(), new_tokens())
    assert counters["turboquant"] == {"calls": 1, "rewritten.turboquant": 1}
    assert str(report) in caplog.text


def compile_with(options=None, mode=None, fn=None):
    fn = fn or (lambda x: F.scaled_dot_product_attention(x, x, x))
    with torch.no_grad():
        return torch.compile(fn, backend="turboquant", options=options, mode=mode)(torch.randn(1, 2, 4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atention": "auto"}, r"unknown option 'atention'.*Nearest: attention"),
        ({"max_autotun": True}, r"unknown option 'max_autotun'.*Nearest: max_autotune"),
        ({1: True}, "unknown option '1'"),
        ({"attention": "turbo"}, r"unknown attention backend 'turbo'.*Nearest: turboquant"),
        ({"attention": {"decoding": "auto"}}, r"phase 'decoding'. Allowed: prefill, decode"),
        ({"attention": {"decode": "fast"}}, r"unknown attention backend 'fast'"),
        (["strict"], r"options=\['strict'\] must be a dict such as .*Allowed keys: attention, strict"),
        ({"strict": "yes"}, r"strict='yes' must be True or False"),
    ],
)
def test_bad_options_are_value_errors_that_name_the_nearest(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        compile_with(options)
    assert isinstance(caught.value, OptionError)


def test_bad_mode():
    with pytest.raises(ValueError, match=r"unknown mode 'fast'. Allowed: default, (?!default)"):
        turboquant(torch.fx.symbolic_trace(lambda x: x), [], mode="fast")


def test_good_options():
    parsed = parse_options("reduce-overhead", {"attention": {"decode": "sdpa"}, "max_autotune": True})
    assert parsed.attention == {"prefill": "auto", "decode": "sdpa"}
    assert parsed.inductor == {"triton.cudagraphs": True, "max_autotune": True}
    assert compile_with({"attention": "sdpa", "triton.cudagraphs": False}).shape == (1, 2, 4, 8)
    assert compile_with(mode="reduce-overhead").shape == (1, 2, 4, 8)


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(NoAttentionBackendError, match=r"not read from a packed cache") as caught:
        compile_with({"attention": "turboquant"})
    assert "q=[1, 2, 4, 8]" in str(caught.value)


def test_strict_lists_what_was_left():
    with pytest.raises(
        NoAttentionBackendError, match=r"strict.*\n.*(\n.*)*0 of 1 attention calls rewritten"
    ):
        compile_with({"strict": True})
    assert compile_with({"strict": True}, fn=torch.sin).shape == (1, 2, 4, 8)


def test_attention_backends_lists_all_in_order():
    assert list(attention_backends()) == [b.name for b in BACKENDS]
    assert list(attention_backends())[:2] == ["turboquant", "triton"]
    assert attention_backends()["sdpa"]
