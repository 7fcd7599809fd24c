"""The compiler that `torch.compile(..., backend="turboquant")` calls, and `explain`.

Options are checked, attention calls rewritten on Dynamo's torch-level graph, where
`scaled_dot_product_attention` is still one node, and the rest is Inductor's. What was chosen stands in
the graph as constant arguments and op names, and so in the key of every compile cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import fx, nn

from . import ops  # noqa: F401  (defines torch.ops.tq_inductor)
from .errors import NoAttentionBackendError
from .lowering.growing_inputs import Split, split_growing_inputs
from .lowering.kept_state import keep_in_place, keeps_keys, returns_keys
from .lowering.length_checks import check_lengths
from .lowering.plans_before import Before, plan_before
from .lowering.rewrite import rewrite
from .options import PHASES, parse_options
from .report import Report

log = logging.getLogger(__name__)


def turboquant(
    gm: fx.GraphModule,
    example_inputs: list[torch.Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: rewrite its attention calls, then Inductor.

    Args:
        mode: as for Inductor ("default", "reduce-overhead", "max-autotune", ...).
        options: `attention` ("auto", a backend's name, or a dict of these per phase), `strict` (raise
            if any attention call is left unrewritten), and any key of `torch._inductor.config`.

    Raises:
        OptionError: unknown mode, option or value.
        NoAttentionBackendError: a named backend cannot run a call, or `strict` and a call was left.
    """
    parsed = parse_options(mode, options)
    report = rewrite(gm, parsed.attention)
    report.publish()
    if parsed.strict and report.left:
        raise NoAttentionBackendError(f"strict: attention calls were left unrewritten\n{report}")
    keep_in_place(gm)
    patches = dict(parsed.inductor)
    if returns_keys(gm) or (any(row.phase == "prefill" for row in report.rows) and keeps_keys(gm)):
        # Prefill runs once per prompt: a CUDA graph gains nothing, and a cache made inside the graph
        # would live, and die, in the CUDA graph's memory pool.
        patches["triton.cudagraphs"] = False
    if any("tq_" in str(node.target) for node in gm.graph.nodes):
        # This pass sinks reads of a cache below the next write, and Inductor then copies the cache.
        patches.setdefault("reorder_for_locality", False)
    check = check_lengths(gm.graph)
    split, before = None, Before()
    if patches.get("triton.cudagraphs", inductor_config.triton.cudagraphs):
        before = plan_before(gm.graph)
        if before.obstacle:
            log.warning("flashinfer: no CUDA graph, %s", before.obstacle)
            patches["triton.cudagraphs"] = False
        else:
            split = split_growing_inputs(gm, example_inputs)
    if split is None:
        compiled = torch._inductor.compile(gm, example_inputs, options=patches)  # type: ignore[arg-type]
    else:
        inner = torch._inductor.compile(split.gm, split.example_inputs, options=patches)
        compiled = _on_fixed_shapes(inner, split)  # type: ignore[arg-type]
    if before.plan is not None:
        compiled = _planned(compiled, before.plan)
    return compiled if check is None else _checked(compiled, check)


def _on_fixed_shapes(compiled: Callable[..., Any], split: Split) -> Callable[..., Any]:
    """`compiled`, on the inputs of the whole graph."""
    return lambda *args: compiled(*split.inputs_from(args))


def _planned(compiled: Callable[..., Any], plan: Callable[[tuple[Any, ...]], None]) -> Callable[..., Any]:
    """`compiled`, after what its kernels need from the host."""

    def run(*args: Any) -> Any:
        plan(args)
        return compiled(*args)

    return run


def _checked(
    compiled: Callable[..., Any], check: Callable[[tuple[Any, ...]], Callable[[], None]]
) -> Callable[..., Any]:
    """`compiled`, refusing to start when a cache is full: its own code cannot ask the host."""

    def run(*args: Any) -> Any:
        note = check(args)
        result = compiled(*args)
        note()
        return result

    return run


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What the compiler would do with each attention call of `model(*args, **kwargs)`.

    The model runs once, rewritten but without Inductor; a cache among the arguments is written to.
    Print the report, or read its `rows`; as when compiling, it goes to the log, the trace and the counters.
    """
    report = Report()

    def collect(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        found = rewrite(gm, dict.fromkeys(PHASES, "auto"))
        found.publish()
        report.rows += found.rows
        return gm.forward

    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)  # not through an earlier compilation
        model = model._call_impl  # type: ignore[union-attr]
    model = getattr(model, "_torchdynamo_orig_callable", model)

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo keeps what it compiles with the code, only so many times: with this copy it goes.
    run.__code__ = run.__code__.replace()
    torch.compile(run, backend=collect)(*args, **kwargs)
    return report
