"""What a packed cache loses, on unit vectors, synthetic keys and the demo model; and what would lose less.

    python benchmarks/bench_quality.py [PART...] [--out FOLDER] [--commit NAME]

Everything runs on a CPU and writes `quality_<part>.json`; without names all parts run. `sphere` is of unit
vectors, `synthetic` of attention over synthetic keys. `formats` is the demo model with today's formats
beside fp8 and vLLM's scheme, `large_bias` that model with keys like Qwen2.5's, `recall` and
`large_bias_recall` how well they copy what they read long ago, `ideas` what could be added, `chosen` what
the ideas' figures suggest, `trellis` what trellis codes would be worth.
`python benchmarks/quality_table.py --write` puts the figures into `docs/quality.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, write_result
from quality import large_bias, lists, model, needle, sphere, synthetic
from quality.codes import CODES
from quality.schemes import FIRST_CHUNK
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PARTS = (
    *("sphere", "synthetic", "formats", "large_bias", "recall", "large_bias_recall", "ideas", "chosen"),
    "trellis",
)
LARGE_BIASES = "demo model with large biases of keys"


def tracked(items: Iterable[Any], label: str) -> Iterable[Any]:
    """`items` under a progress bar."""
    items = list(items)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        yield from progress.track(items, description=label)


def run_sphere() -> dict[str, Any]:
    """Every code on unit vectors of three dimensions."""
    return {"what": f"{sphere.VECTORS} random unit vectors", "rows": of_codes(sphere.SPHERE_CODES)}


def of_codes(codes: Iterable[str]) -> list[dict[str, Any]]:
    """Figures of these codes on unit vectors of three dimensions."""
    pairs = [(name, dim) for dim in sphere.DIMENSIONS for name in codes]
    return [
        {"code": name, "head_dim": dim, **sphere.figures(name, dim)}
        for name, dim in tracked(pairs, "sphere")
    ]


def run_synthetic() -> dict[str, Any]:
    """Every scheme on every set of synthetic keys."""
    rows: dict[str, dict[str, Any]] = {scheme.name: {} for scheme in lists.SYNTHETIC}
    for kind in synthetic.KINDS:
        data = synthetic.draw(kind)
        reference = synthetic.attention(data.q, data.k)
        values = {name: CODES[name].round_trip(data.v) for name in {s.v for s in lists.SYNTHETIC}}
        for scheme in tracked(lists.SYNTHETIC, kind.name):
            rows[scheme.name][kind.name] = synthetic.figures(scheme, data, reference, values[scheme.v])
    for scheme in lists.SYNTHETIC:
        rows[scheme.name]["bytes"] = scheme.bytes_per_token(synthetic.HEAD_DIM, 1)
    return {
        "what": f"{synthetic.HEADS} draws of {synthetic.TOKENS} keys, {synthetic.QUERIES} queries each, "
        f"D={synthetic.HEAD_DIM}",
        "schemes": rows,
    }


def run_model(
    schemes: Iterable[lists.Scheme], label: str = "demo model", large_biases: bool = False
) -> dict[str, Any]:
    """Every scheme on the demo model; with large biases of keys, on half as many texts."""
    network = large_bias.load_large_bias_model() if large_biases else model.load_model()
    ids = model.texts(1) if large_biases else model.texts()
    samples = model.calibrate(network)
    exact, reference = model.measure(network, ids, torch.empty(0), None)
    rows = {"exact": model.row(exact, exact)}
    for scheme in tracked(schemes, label):
        reader = model.Reader(scheme, network, samples)
        outcome, _ = model.measure(network, ids, reference, reader)
        size = scheme.bytes_per_token(network.config.head_dim, network.config.num_hidden_layers)
        rows[scheme.name] = {"bytes": round(size, 1), **model.row(outcome, exact)}
    return {
        "what": f"{label}, {len(ids)} held-out texts of {model.WINDOW} bytes, all but the first "
        f"{FIRST_CHUNK} read from the cache",
        "schemes": rows,
    }


def run_recall(
    schemes: Iterable[lists.Scheme], label: str = "demo model", large_biases: bool = False
) -> dict[str, Any]:
    """How well the demo model copies needles, with every scheme."""
    network = large_bias.load_large_bias_model() if large_biases else model.load_model()
    rows = needle.recall(network, tracked(schemes, label))
    return {
        "what": f"{label}, strings of {needle.STRING} bytes in texts of {model.WINDOW}",
        "schemes": rows,
    }


def run_trellis() -> dict[str, Any]:
    """Codes of 2 and 3 bits on unit vectors, and the demo model with them."""
    rows = of_codes(("3", "vector3", "trellis3", "2", "vector2", "trellis2"))
    found, copied = run_model(lists.TRELLIS), run_recall(lists.TRELLIS)
    return {"rows": rows, "schemes": found["schemes"], "recall": copied["schemes"], "what": found["what"]}


def main() -> None:
    """Run the parts and write their files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    runs = {
        "sphere": run_sphere,
        "synthetic": run_synthetic,
        "formats": lambda: run_model(lists.ON_THE_DEMO_MODEL),
        "large_bias": lambda: run_model(lists.LARGE_BIAS, LARGE_BIASES, True),
        "recall": lambda: run_recall(lists.RECALL),
        "large_bias_recall": lambda: run_recall(lists.LARGE_BIAS_RECALL, LARGE_BIASES, True),
        "ideas": lambda: run_model(lists.IDEAS),
        "chosen": lambda: run_model(lists.CHOSEN),
        "trellis": run_trellis,
    }
    for part in args.parts or PARTS:
        start = time.perf_counter()
        result = runs[part]()
        result["seconds"] = round(time.perf_counter() - start)
        result["environment"] = environment(args.commit)
        write_result(f"quality_{part}", result, args.out)


if __name__ == "__main__":
    main()
