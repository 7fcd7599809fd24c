"""The tables of docs/attention-backends.md, made of what the backends say and of what was measured.

python tests/backends_page.py --write
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tq_inductor.attention import packages
from tq_inductor.attention.call import AttentionCall
from tq_inductor.attention.order import ORDERS
from tq_inductor.attention.select import BACKENDS, BY_NAME

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/attention-backends.md"
EVIDENCE = ROOT / "benchmarks/results/backends.json"
MARK = "<!-- made by tests/backends_page.py -->"
NEWEST = {
    "flash-attn": "2.8.3.post2",
    "fa3-fwd": "0.0.3",
    "flash-attn-4": "4.0.0b36",
    "flashinfer-python": "0.6.18.post1",
}
DENSE = [b.name for b in BACKENDS if b.attend]
PLAIN = AttentionCall(2, 512, 512, 32, 8, 128, 128, torch.bfloat16, "cuda", (9, 0), cached=False)
CAUSAL = {"is_causal": True, "alignment": "equal", "window": (None, 0)}
FEWER = {"q_len": 128, "window": (None, 0)}


def head_sizes(keys: int, values: int | None = None) -> dict[str, Any]:
    """Facts of a call with these sizes of a head."""
    return {"head_dim": keys, "v_head_dim": values or keys}


FEATURES: dict[str, dict[str, Any]] = {
    "full attention": {},
    "causal": CAUSAL,
    "causal, fewer queries than keys, bottom-right": {**FEWER, "mask": "bool", "alignment": "bottom-right"},
    "causal, fewer queries than keys, top-left": {**FEWER, "is_causal": True, "alignment": "top-left"},
    "sliding window": {"alignment": "equal", "window": (255, 0), "mask": "bool"},
    "window to both sides": {"alignment": "equal", "window": (64, 64), "mask": "bool"},
    "padding (a mask over keys), full or causal": {"mask": "bool", "padding": "causal"},
    "any bool mask": {"mask": "bool"},
    "any float mask": {"mask": "float"},
    "ALiBi": {"mask": "float", "alibi": True, "alignment": "equal", "window": (None, 0)},
    "softcap": {**CAUSAL, "softcap": 30.0},
    "attention sinks": {**CAUSAL, "sinks": True},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "head_dim 64": head_sizes(64),
    "head_dim 96": head_sizes(96),
    "head_dim 256": head_sizes(256),
    "head_dim 512": head_sizes(512),
    "head_dim 192, of values 128": head_sizes(192, 128),
    "head_dim 64, of values 512": head_sizes(64, 512),
    "ragged (`varlen_attn`)": {**CAUSAL, "varlen": True},
    "lengths unknown at compile time": {"q_len": None, "kv_len": None},
    "deterministic algorithms": {"deterministic": True},
    "gradients": {"needs_grad": True},
}
GPUS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))


def answers(**facts: Any) -> dict[str, bool]:
    """Which backends can run a call where the newest packages are installed."""
    call = dataclasses.replace(PLAIN, **facts)
    with (
        mock.patch.multiple(packages, version_of=NEWEST.get, import_failure=lambda module: ""),
        mock.patch.object(torch.backends.cudnn, "version", return_value=91900),
    ):
        return {name: not BY_NAME[name].why_not(call) for name in DENSE}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def marks(found: dict[str, bool]) -> list[str]:
    """One cell per backend."""
    return ["yes" if found[name] else "-" for name in DENSE]


def capability_tables() -> str:
    """GPUs, and features on an SM90 GPU."""
    rows = [["sm{}{}".format(*gpu), *marks(answers(capability=gpu))] for gpu in GPUS]
    rows.append(["gfx942", *marks(answers(capability=None, rocm="gfx942"))])
    on_gpus = table(["bf16, head_dim 128, on", *DENSE], rows)
    features = [[name, *marks(answers(**facts))] for name, facts in FEATURES.items()]
    return f"{on_gpus}\n\n{table(['on SM90', *DENSE], features)}"


def order_table() -> str:
    """`ORDERS`."""
    rows = []
    for order in ORDERS:
        head_dim = f"at most {order.widest_head}" if order.widest_head else ""
        queries = f"at least {order.fewest_queries}" if order.fewest_queries else ""
        keys = f"at most {order.most_keys}" if order.most_keys else ""
        window = f"at most {order.widest_window}" if order.widest_window else ""
        gpus = ", ".join(f"SM{major}x" for major in order.majors)
        cells = (gpus, order.phase, ", ".join(order.masks), head_dim, queries, keys, window)
        rows.append([*(cell or "any" for cell in cells), ", ".join(order.names)])
    limits = ["GPU", "phase", "mask", "head_dim", "queries", "keys of the batch", "window"]
    return table([*limits, "order"], rows)


def measured_table() -> str:
    """Microseconds, from the committed evidence."""
    evidence = json.loads(EVIDENCE.read_text())
    names = ["default", "triton", *(n for n in DENSE if any(n in case for case in evidence["cases"]))]
    rows = []
    for case in evidence["cases"]:
        heads = f"{case['heads']}/{case['kv_heads']} heads, D={case['head_dim']}"
        size = f"B{case['batch']} {case['q_len']} x {case['kv_len']}, {heads}"
        times = {name: case[name]["median_us"] for name in names if name in case}
        best = min(times.values())
        cells = [
            f"**{times[n]:.0f}**" if times.get(n) == best else f"{times[n]:.0f}" if n in times else "-"
            for n in names
        ]
        rows.append([case["name"], size, *cells])
    about = evidence["environment"]
    software = [name for name in ("torch", "triton", *NEWEST) if about.get(name)]
    versions = ", ".join(f"{name} {about[name]}" for name in software)
    header = f"{about['gpu']}, driver {about['driver']}, cuDNN {about['cudnn']}, {versions}; microseconds:"
    return f"{header}\n\n{table(['call', 'sizes', *names], rows)}"


def page_with_tables(page: str) -> str:
    """The page, its tables made anew."""
    parts = (capability_tables(), f"## Order\n\n{order_table()}", f"## Measured\n\n{measured_table()}")
    return page.split(MARK)[0] + MARK + "\n\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    made = page_with_tables(PAGE.read_text())
    if "--write" in sys.argv:
        PAGE.write_text(made)
    else:
        print(made)
