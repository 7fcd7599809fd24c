"""Shared by the tests of other spellings of attention: rewrite a function and compare it with eager."""

import torch
from tq_inductor.lowering.rewrite import rewrite

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


def plain(q, k, v):
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def changed(before=lambda s: s, after=lambda w: w):
    return lambda q, k, v: after(before(q @ k.mT).softmax(-1)) @ v


float_mask = torch.zeros(6, 6)
