"""What is run of each architecture, and the table of what the compiler decided, `docs/architectures.md`.

    python tests/architecture_runs.py [--write] [NAME...]

runs all architectures, or those named, and prints the table. `--write` puts it into the documentation, and
what it is made from into `tests/architecture_decisions.json`, with which `test_architectures.py` compares;
rows of architectures that are not named stay.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, LENGTH, Architecture
from torch import fx
from torch._dynamo.utils import counters
from tq_inductor.lowering.rewrite import rewrite
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from tq_inductor import TurboQuantCache
from tq_inductor.report import CallRow

TABLE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
DECISIONS = Path(__file__).with_name("architecture_decisions.json")
NEW_TOKENS, MAX_LENGTH = 7, 32
CACHES: dict[str, Callable[[Any], Cache]] = {
    "DynamicCache": lambda config: DynamicCache(config=config),
    "StaticCache": lambda config: StaticCache(config=config, max_cache_len=MAX_LENGTH),
    "TurboQuantCache": lambda config: TurboQuantCache(config, MAX_LENGTH),
    "lossless": lambda config: TurboQuantCache(config, MAX_LENGTH, kv_format="bf16"),
}
MARKER = "<!-- made by tests/architecture_runs.py -->\n\n"
GENERATING = ("DynamicCache", "StaticCache", "TurboQuantCache")


@dataclass
class Run:
    """What a run gave, and what was compiled for it.

    Attributes:
        tensors: outputs, or the tokens generated.
        error: the exception that first went wrong, in one line.
        graphs: how many graphs there were after each call of the model.
        breaks: graph breaks.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    error: str = ""
    graphs: list[int] = field(default_factory=list)
    breaks: int = 0

    @property
    def compiled(self) -> tuple[str, int, list[int]]:
        """All but the result."""
        return self.error, self.breaks, self.graphs

    @property
    def smooth(self) -> bool:
        """Whether it came to its end without graph breaks, and without compiling after the third call."""
        return not self.error and not self.breaks and len(set(self.graphs[2:])) <= 1

    def equals(self, other: Run) -> bool:
        """Whether tokens are the same, and floats to 1e-4 of the largest where the other's are finite."""
        if len(self.tensors) != len(other.tensors):
            return False
        return all(
            torch.equal(a, b)
            if not b.is_floating_point()
            else bool((a - b)[b.isfinite()].abs().max() <= 1e-4 * b[b.isfinite()].abs().max())
            for a, b in zip(self.tensors, other.tensors, strict=True)
        )


class Recorder:
    """A Dynamo backend that runs the graph as it is, after our compiler's rewriting if `rewriting`.

    Attributes:
        rows: of the report on each graph.
        guards: guards on sizes that came with the rewriting, each a recompilation that may come.
    """

    def __init__(self, rewriting: bool = True) -> None:
        self.rewriting = rewriting
        self.rows: list[list[CallRow]] = []
        self.guards: list[Any] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        if self.rewriting:
            guards = torch._guards.TracingContext.get().fake_mode.shape_env.guards
            before = len(guards)
            self.rows.append(rewrite(gm, {"prefill": "auto", "decode": "auto"}).rows)
            self.guards += guards[before:]
        return gm.forward


def runs_of(architecture: Architecture) -> list[str]:
    """Names of the runs: "unpadded", "padded", and the caches that `generate` is given."""
    names = ["unpadded", "padded"] if architecture.paddings else ["unpadded"]
    return names + (list(GENERATING) if architecture.generates else [])


def run(
    architecture: Architecture,
    name: str,
    backend: Recorder | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Run:
    """Run a fresh model, compiled if there is a backend."""
    torch._dynamo.reset()
    counters.clear()
    result = Run()
    model = architecture.build(dtype).to(device)
    if backend:
        model.compile(backend=backend)

    def called(*_: Any) -> None:
        result.graphs.append(counters["stats"]["unique_graphs"])

    try:
        with torch.no_grad():
            if name in CACHES:
                result.tensors = [generate(model, architecture, name, called)]
            else:
                for padding in architecture.paddings if name == "padded" else ("",):
                    result.tensors += forward(model, architecture, padding)
                    called()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:  # not Dynamo's, which only says where
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        result.error = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
    result.breaks = sum(counters["graph_break"].values())
    return result


def forward(model: PreTrainedModel, architecture: Architecture, padding: str) -> list[torch.Tensor]:
    """All floating-point tensors that the model returns without a cache."""
    options = {"use_cache": False} if architecture.generates else {}
    inputs = {name: x.to(model.device) for name, x in architecture.inputs(padding).items()}
    output = model(**inputs, **options, return_dict=False)
    leaves, _ = torch.utils._pytree.tree_flatten(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def generate(
    model: PreTrainedModel, architecture: Architecture, cache_name: str, called: Callable[..., None]
) -> torch.Tensor:
    """Tokens by a greedy `generate`, of a left-padded batch where it can be."""

    def after_call(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        called()
        return scores

    batch = architecture.inputs("left" if "left" in architecture.paddings else "")
    batch.pop("decoder_input_ids", None)
    batch = {
        name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype)
        for name, x in batch.items()
    }
    cache = CACHES[cache_name](model.config)
    if architecture.encodes_first:
        if cache_name == "StaticCache":  # all slots of a cross-attention cache are filled
            cross = StaticCache(config=model.config, max_cache_len=LENGTH)
        else:
            cross = DynamicCache(config=model.config)
        cache = EncoderDecoderCache(cache, cross)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "logits_processor": [after_call]}
    return model.generate(**batch, past_key_values=cache, **options)


@dataclass
class Comparison:
    """A run with the rewriting, and what it is compared with.

    Attributes:
        rewritten: the run with the rewriting.
        uncompiled: the run that says what is right.
        plain: the run compiled without the rewriting; only if `rewritten` is not all that one wants.
        guards: see `Recorder`.
        record: what the table is made from.
    """

    rewritten: Run
    uncompiled: Run
    plain: Run | None
    guards: list[Any]
    record: dict[str, Any]


def compare(architecture: Architecture, name: str) -> Comparison:
    """Run with the rewriting and uncompiled; and, if something is amiss, see whose fault it is."""
    backend = Recorder()
    rewritten, uncompiled = run(architecture, name, backend), run(architecture, name)
    plain, fault = None, rewritten.error
    right = not rewritten.error and rewritten.equals(uncompiled)
    if not (right and rewritten.smooth):
        plain = run(architecture, name, Recorder(rewriting=False))
        if not (right or rewritten.error):
            fault = "the model gives other values when it is compiled"
        if rewritten.error != plain.error or not (rewritten.error or rewritten.equals(plain)):
            fault = f"by the rewriting only: {fault}"
    record = {
        "fault": fault,
        "graphs": rewritten.graphs,
        "breaks": rewritten.breaks,
        "calls": decisions(backend.rows, rewritten.graphs[0] if rewritten.graphs else 0),
    }
    return Comparison(rewritten, uncompiled, plain, backend.guards, record)


def decisions(graphs: list[list[CallRow]], in_first_call: int) -> list[list[Any]]:
    """[step, calls, outcome, explanation]: alike calls as one, of all graphs, so that none hides."""
    found: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
    for i, rows in enumerate(graphs):
        for row in rows:
            step = "prefill" if i < in_first_call else "decode"
            found.setdefault((step, outcome(row), explanation(row)), set()).add((row.module, row.source))
    return [[step, len(calls), what, text] for (step, what, text), calls in found.items()]


LEFT = ("sdpa", "none")  # backends of calls that are PyTorch's, or that nobody understood


def outcome(row: CallRow) -> str:
    """The backend; of SDPA whether the call is a simpler one now, or was left."""
    return row.backend if row.backend not in LEFT else "simpler sdpa" if row.rewritten else "left"


def explanation(row: CallRow) -> str:
    """A footnote: what was found, and unless the call has a backend of ours the reasons against each."""
    why = row.not_chosen if row.backend in LEFT else {}
    found = f"Mask: {row.mask}; keys and values: {row.kv_source}."
    return " ".join([found, *(f"Not {name}: {'; '.join(reasons)}." for name, reasons in why.items())])


def versions() -> dict[str, str]:
    """What the decisions depend on."""
    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


COLUMNS = (
    ("no cache", "unpadded", "prefill"),
    ("padded", "padded", "prefill"),
    *((f"{cache}, {step}", cache, step) for cache in GENERATING for step in ("prefill", "decode")),
)


def table(recorded: dict[str, Any]) -> str:
    """Markdown of `architecture_decisions.json`."""
    notes: dict[str, int] = {}

    def cell(found: dict[str, Any] | None, step: str) -> str:
        if found is None:
            return ""
        parts = [
            f"{number} {what}{note(text)}" for when, number, what, text in found["calls"] if when == step
        ]
        if found["fault"]:
            parts.append(f"fault{note(found['fault'])}")
        if found["breaks"]:
            parts.append(f"{found['breaks']} graph breaks")
        return ", ".join(parts) or "none found"

    def note(text: str) -> str:
        return f"[^{notes.setdefault(text, len(notes) + 1)}]"

    names = ["architecture", "kind", *(title for title, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, runs in recorded["architectures"].items():
        cells = [cell(runs.get(run_name), step) for _, run_name, step in COLUMNS]
        lines.append("| " + " | ".join([name, ARCHITECTURES[name].kind, *cells]) + " |")
    made_with = " and ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    lines += ["", f"Made with {made_with}, on a CPU.", ""]
    return "\n".join(lines + [f"[^{number}]: {text}" for text, number in notes.items()]) + "\n"


def with_table(page: str, recorded: dict[str, Any]) -> str:
    """`page` with what follows its marker replaced by the table."""
    return page.split(MARKER)[0] + MARKER + table(recorded)


def in_lines(recorded: dict[str, Any]) -> str:
    """JSON with a line for each run, that a change shows in a diff."""
    text = json.dumps(recorded, indent=3)
    return re.sub(r"\n {12,}|\n {9}(?=\})", " ", text) + "\n"


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # of Dynamo, on errors that the table tells
    transformers.logging.set_verbosity_error()
    found = (
        json.loads(DECISIONS.read_text())["architectures"] if arguments.names and arguments.write else {}
    )
    for name in arguments.names or ARCHITECTURES:
        print(name, file=sys.stderr)
        architecture = ARCHITECTURES[name]
        found[name] = {
            run_name: compare(architecture, run_name).record for run_name in runs_of(architecture)
        }
    in_order = {name: found[name] for name in ARCHITECTURES if name in found}
    recorded = {"versions": versions(), "architectures": in_order}
    if arguments.write:
        DECISIONS.write_text(in_lines(recorded))
        TABLE.write_text(with_table(TABLE.read_text(), recorded))
    else:
        print(table(recorded), end="")


if __name__ == "__main__":
    main()
