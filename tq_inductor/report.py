"""What was decided for each attention call, and why: the log, the trace, the counters, `explain()`."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx

from .attention.call import AttentionCall
from .attention.select import Choice

log = logging.getLogger("tq_inductor.compiler")


@dataclass(frozen=True)
class CallRow:
    """One attention call.

    Attributes:
        module: path of the module that makes it, e.g. `model.layers.0.self_attn`.
        source: file, line and function of the user's code.
        shapes: q, kv, dtype and device in words.
        phase: "prefill" or "decode".
        mask: what the mask says: "none", "causal", "causal, offset on the device + padding", ..., or
            "bool" or "float" where it is not understood.
        kv_source: where keys and values come from.
        backend: the attention backend chosen; "none" for attention that is not, and could not be
            written as, `scaled_dot_product_attention`.
        rewritten: whether the call was replaced: by another backend, or by a simpler call of SDPA.
        not_chosen: for every other backend the reasons, with values.
    """

    module: str
    source: str
    shapes: str
    phase: str
    mask: str
    kv_source: str
    backend: str
    not_chosen: dict[str, list[str]]
    rewritten: bool

    def with_rewritten(self, rewritten: bool) -> CallRow:
        """This row, of a call that was or was not replaced."""
        return replace(self, rewritten=rewritten)


def row_of(node: fx.Node, call: AttentionCall, choice: Choice) -> CallRow:
    """The report's row for an attention node."""
    return CallRow(
        module=_module_path(node.meta.get("nn_module_stack")),
        source=_source_line(node.meta.get("stack_trace")),
        shapes=call.describe(),
        phase=call.phase,
        mask=call.visible,
        kv_source=call.kv_source,
        backend=choice.backend,
        not_chosen=choice.not_chosen,
        rewritten=choice.backend not in ("sdpa", "none"),
    )


def _module_path(stack: dict[str, tuple[str, Any]] | None) -> str:
    if not stack:
        return "(no module)"
    path = list(stack.values())[-1][0]
    path = re.sub(r"^L\['\w+'\](\.__self__)?\.?", "", path)
    return (
        re.sub(r"_modules\['(\w+)'\]|\['?(\w+)'?\]", r".\1\2", path).replace("..", ".").strip(".")
        or "(root)"
    )


def _source_line(trace: str | None) -> str:
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace or "")
    if not places:
        return "(unknown)"
    file, line, function = places[-1]
    return f"{'/'.join(file.split('/')[-2:])}:{line} in {function}"


@dataclass
class Report:
    """The attention calls of one compilation (of all graphs of a model, from `explain`)."""

    rows: list[CallRow] = field(default_factory=list)

    @property
    def rewritten(self) -> list[CallRow]:
        """Calls that were replaced."""
        return [row for row in self.rows if row.rewritten]

    @property
    def left(self) -> list[CallRow]:
        """Calls that stayed as they were."""
        return [row for row in self.rows if not row.rewritten]

    def __str__(self) -> str:
        if not self.rows:
            return "no attention call found"
        header = ("module", "phase", "backend", "shapes", "mask", "keys and values")
        table = [header]
        for row in self.rows:
            table.append((row.module, row.phase, row.backend, row.shapes, row.mask, row.kv_source))
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(t, widths, strict=True)).rstrip() for t in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(f"{len(self.rewritten)} of {len(self.rows)} attention calls rewritten")
        for place, backend, why in self._reasons():
            lines.append(f"  {place}: not {backend}: {why}")
        return "\n".join(lines)

    def _reasons(self) -> list[tuple[str, str, str]]:
        """Reasons against other backends than the chosen one; alike calls, and alike reasons, told once."""
        told: dict[tuple[str, str], list[CallRow]] = {}
        for row in self.left:
            for backend, reasons in row.not_chosen.items():
                told.setdefault((backend, "; ".join(reasons)), []).append(row)
        alike: dict[tuple[str, str], list[str]] = {}
        for (backend, why), rows in told.items():
            place = f"{rows[0].module} ({rows[0].source})"
            if len(rows) > 1:
                place += f" and {len(rows) - 1} more"
            alike.setdefault((place, why), []).append(backend)
        return [(place, ", ".join(backends), why) for (place, why), backends in alike.items()]

    def to_json(self) -> str:
        """All rows as a JSON list."""
        return json.dumps([asdict(row) for row in self.rows], indent=1)

    def publish(self) -> None:
        """Tell the log `tq_inductor.compiler`, the structured trace and Dynamo's counters."""
        counters = torch._dynamo.utils.counters["turboquant"]
        for row in self.rows:
            counters["calls"] += 1
            counters[f"{'rewritten' if row.rewritten else 'left'}.{row.backend}"] += 1
        if self.rows:
            log.info("attention calls\n%s", self)
            torch._logging.trace_structured(  # type: ignore[attr-defined]
                "artifact",
                metadata_fn=lambda: {"name": "turboquant_report", "encoding": "json"},
                payload_fn=self.to_json,
            )
