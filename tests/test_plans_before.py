"""What is planned before a graph that becomes a CUDA graph; on tensors that only pretend to be on a GPU."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from tq_inductor.lowering.plans_before import Before, plan_before

import tq_inductor.ops  # noqa: F401
from tq_inductor import compiler
from tq_inductor.attention import flashinfer

OPS = torch.ops.tq_inductor
NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")


def graph_of(body, device="cuda", mode=None):
    """A graph of inputs `NAMES` and "table", of which `body(graph, *inputs)` adds nodes."""
    graph = fx.Graph()
    with mode or FakeTensorMode():
        values = [torch.empty(12, heads, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2)]
        values += [torch.empty(6, dtype=torch.int32, device=device) for _ in range(2)]
        values += [torch.empty(5, 3, dtype=torch.int32, device=device)]
    inputs = []
    for name, value in zip((*NAMES, "table"), values, strict=True):
        inputs.append(graph.placeholder(name))
        inputs[-1].meta["example_value"] = value
    body(graph, *inputs)
    return graph


def ragged(graph, q, k, v, cu_q, cu_k, table, backend="flashinfer", **named):
    return graph.call_function(
        OPS.varlen_attn.default, (q, k, v, cu_q, cu_k, 40, 40, True, 0.25, backend), named
    )


def planned(monkeypatch, before, args):
    """What `flashinfer.plan` is called with."""
    said = []
    monkeypatch.setattr(flashinfer, "plan", lambda **named: said.append(named))
    before.plan(args)
    return said


def test_layers_that_share_a_plan_are_planned_once(monkeypatch):
    def layers(graph, *inputs):
        for _ in range(16):
            ragged(graph, *inputs)

    before = plan_before(graph_of(layers))
    args = tuple(object() for _ in range(6))
    (said,) = planned(monkeypatch, before, args)
    assert (said["cu_seqlens_q"], said["cu_seqlens_k"]) == (args[3], args[4])
    assert said["q"].shape == (12, 4, 64)
    assert {said[name].device.type for name in ("q", "k", "v")} == {"meta"}
    rest = {name: said[name] for name in said if name not in NAMES}
    assert rest == {
        "max_seqlen_q": 40, "max_seqlen_k": 40, "is_causal": True, "scale": 0.25, "kv_format": None,
        "k_scale": 1.0, "block_table": None, "read": False,
    }  # fmt: skip


def test_layers_that_differ_are_planned_each(monkeypatch):
    def layers(graph, q, k, v, cu_q, cu_k, table):
        ragged(graph, q, k, v, cu_q, cu_k, table)
        ragged(graph, q, k, v, cu_q, cu_q, table)
        graph.call_function(
            OPS.varlen_attn.default, (q, k, v, cu_q, cu_k, 40, 40, False, 0.25, "flashinfer")
        )
        ragged(graph, q, k, v, cu_q, cu_k, table, backend="fa3")

    said = planned(monkeypatch, plan_before(graph_of(layers)), (0, 1, 2, 3, 4, 5))
    assert [(call["cu_seqlens_k"], call["is_causal"]) for call in said] == [
        (4, True),
        (3, True),
        (4, False),
    ]


def test_of_pages_only_the_size_of_the_table_counts(monkeypatch):
    def layer(graph, q, k, v, cu_q, cu_k, table):
        pages = [graph.call_method("unsqueeze", (x, 1)) for x in (k, v)]
        with FakeTensorMode():
            for page in pages:
                page.meta["example_value"] = torch.empty(12, 1, 2, 64, device="cuda")
        moved = graph.call_method("clone", (table,))  # the graph may compute it
        moved.meta["example_value"] = table.meta["example_value"]
        ragged(graph, q, *pages, cu_q, cu_k, table, block_table=moved)

    (said,) = planned(monkeypatch, plan_before(graph_of(layer)), (0, 1, 2, 3, 4, 5))
    assert (said["block_table"].shape, said["k"].shape) == ((5, 3), (12, 1, 2, 64))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("backend", ["flashinfer", "triton"])
def test_nothing_to_plan(device, backend):
    graph = graph_of(lambda graph, *inputs: ragged(graph, *inputs, backend=backend), device)
    assert (plan_before(graph).plan is None) == ((device, backend) != ("cuda", "flashinfer"))
    assert not plan_before(graph).obstacle


def test_lengths_computed_in_the_graph_stand_against_a_cuda_graph():
    def layer(graph, q, k, v, cu_q, cu_k, table):
        inside = graph.call_method("clone", (cu_k,))
        inside.meta["example_value"] = cu_k.meta["example_value"]
        ragged(graph, q, k, v, cu_q, inside, table)

    before = plan_before(graph_of(layer))
    assert (before.plan, before.obstacle) == (None, "cu_seqlens are computed in the graph")


def test_unknown_sizes_stand_against_a_cuda_graph():
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    with mode:
        size = env.create_unbacked_symint()
        q = torch.empty(size, 4, 64, device="cuda", dtype=torch.bfloat16)

    def layer(graph, other, *rest):
        other.meta["example_value"] = q
        ragged(graph, other, *rest)

    assert plan_before(graph_of(layer, mode=mode)).obstacle == "sizes are not known at compile time"


def test_a_dense_call_runs_once_before(monkeypatch):
    def layer(graph, q, k, v, *rest):
        shapes = {x: (2, x.meta["example_value"].shape[1], 40, 64) for x in (q, k, v)}
        with FakeTensorMode():
            for x, shape in shapes.items():
                x.meta["example_value"] = torch.empty(shape, device="cuda")
        how = ("bottom-right", -1, 0, None, 0.25, "flashinfer")
        for _ in range(2):
            graph.call_function(OPS.dense_attn.default, (q, k, v, None, None, None, *how))

    before, seen = plan_before(graph_of(layer)), []
    with FakeTensorMode():
        monkeypatch.setattr(OPS, "dense_attn", lambda *args: seen.append(args))
        for _ in range(3):
            before.plan(())
    (args,) = seen
    assert [tuple(x.shape) for x in args[:3]] == [(2, 4, 40, 64), (2, 2, 40, 64), (2, 2, 40, 64)]
    assert args[3:] == (None, None, None, "bottom-right", -1, 0, None, 0.25, "flashinfer")


@pytest.fixture
def compiled(monkeypatch):
    """A function compiled for CUDA graphs by a compiler that finds a given `Before`; Inductor's options."""
    seen = []

    def inductor(gm, example_inputs, options):
        seen.append(options)
        return gm.forward

    def compile_with(before):
        monkeypatch.setattr(compiler, "plan_before", lambda graph: before)
        torch._dynamo.reset()
        function = torch.compile(lambda x: x + 1, backend="turboquant", options={"triton.cudagraphs": True})
        return function, seen

    monkeypatch.setattr(torch._inductor, "compile", inductor)
    return compile_with


def test_the_compiler_plans_before_each_run(compiled):
    seen = []
    function, options = compiled(Before(plan=seen.append))
    x, y = torch.zeros(3), torch.ones(3)
    for argument in (x, y):
        assert torch.equal(function(argument), argument + 1)
    assert [args[0] is argument for args, argument in zip(seen, (x, y), strict=True)] == [True, True]
    assert options[0]["triton.cudagraphs"] is True


def test_what_cannot_be_planned_runs_without_cuda_graphs_and_says_so(compiled, caplog):
    function, options = compiled(Before(obstacle="cu_seqlens are computed in the graph"))
    with caplog.at_level(logging.WARNING):
        function(torch.zeros(3))
    assert options[0]["triton.cudagraphs"] is False
    assert "flashinfer: no CUDA graph, cu_seqlens are computed in the graph" in caplog.text
