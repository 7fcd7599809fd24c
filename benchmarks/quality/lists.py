"""The schemes that are measured, and where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tq_inductor.layer_formats import exact_tokens

from .schemes import Scheme

EXACT = Scheme("exact", "exact", "exact")


def packed(name: str) -> Scheme:
    """The plain scheme of a format such as "k4v2"."""
    return Scheme(name, name[1], name[3])


def cached(name: str, sinks: int | None = None, recent: int | None = None) -> Scheme:
    """A `TurboQuantCache` of a format, read token by token; None: its own number of exact tokens."""
    given = {"sink_tokens": sinks, "recent_tokens": recent}
    changes = [f"{key}={n}" for key, n in given.items() if n is not None]
    label = ", ".join([f"TurboQuantCache {name}", *changes])
    sinks, recent = exact_tokens(name, sinks, recent)
    return Scheme(label, name[1], name[3], sinks=sinks, recent=recent, cache=name)


def cached_without(name: str) -> Scheme:
    """The same without exact tokens."""
    return cached(name, sinks=0, recent=0)


def balanced(name: str) -> Scheme:
    """The same with weights that `balance_keys` has changed."""
    return replace(cached(name), name=f"TurboQuantCache {name}, balanced keys", k_balance="powers")


def calibrated(budget: str) -> Scheme:
    """A `TurboQuantCache` with the policy of `calibrate` with this budget (`calibrate.json`)."""
    names = tuple(CALIBRATED[budget]["kv_format"])
    label = budget if budget.startswith("k") else f"{budget} bits a value"
    return Scheme(f"TurboQuantCache, calibrated at {label}", names[0][1], names[0][3], policy=names)


NAMES = ("k8v4", "k4v4", "k3v3", "k2v2")
CALIBRATED = json.loads((Path(__file__).parents[1] / "results/calibrate.json").read_text())["budgets"]
POLICIES = tuple(map(calibrated, ("k3v3", "2.6")))
CACHES = (
    *map(cached, NAMES),
    cached("k4v4", recent=124),
    cached("k3v3", recent=124),
    *map(cached_without, NAMES),
)
VLLM = (
    Scheme("vLLM k8v4", "fp8", "minmax4"),
    Scheme("vLLM 4bit_nc", "vllm4", "minmax4"),
    Scheme("vLLM k3v4_nc", "vllm3", "minmax4"),
    Scheme("vLLM 3bit_nc", "vllm3", "minmax3"),
)
FORMATS = (
    Scheme("bf16", "bf16", "bf16"),
    Scheme("fp8", "fp8", "fp8"),
    *map(packed, ("k8v4", "k4v4", "k3v3", "k2v2")),
    *CACHES,
    *VLLM,
)
ON_THE_DEMO_MODEL = (*FORMATS, cached("k4v2"), cached("k4v2", recent=124), cached("k3v2"), *POLICIES)
# Plain codes beside what the package does.
LARGE_BIAS = (
    FORMATS[1],
    *map(packed, ("k4v4", "k3v3")),
    *map(cached, NAMES),
    *POLICIES,
    *map(cached_without, ("k4v4", "k3v3")),
    VLLM[1],
    VLLM[3],
)
RECALL = (
    *map(cached, ("k8v4", "k4v4", "k4v2", "k3v3", "k3v2", "k2v2")),
    *POLICIES,
    *map(cached_without, NAMES[1:]),
    VLLM[1],
)
LARGE_BIAS_RECALL = (packed("k4v4"), *map(cached, NAMES), *POLICIES, VLLM[1])


def changed(base: str, label: str, **changes: object) -> Scheme:
    """A plain scheme with something added."""
    return replace(packed(base), name=f"{base} {label}", **changes)


def _vectors(base: str) -> dict[str, object]:
    return {"k": f"vector{base[1]}", "v": f"vector{base[3]}"}


def _scales(base: str) -> dict[str, object]:
    return {"k": f"scales{base[1]}", "v": f"scales{base[3]}"}


def alone(base: str) -> tuple[Scheme, ...]:
    """Each idea by itself, for the demo model."""
    return (
        packed(base),
        changed(base, "+ key mean", k_shift="mean"),
        changed(base, "+ k_proj bias", k_shift="bias"),
        changed(base, "+ key mean before RoPE", k_shift="pre"),
        changed(base, "+ value mean", v_mean=True),
        changed(base, "+ unbiased key scale", k=f"unbiased{base[1]}"),
        changed(base, "+ channel balance", k_balance="channels"),
        changed(base, "+ key matrix", k_balance="full"),
        changed(base, "+ value matrix", v_balance="full"),
        changed(base, "+ vector codes", **_vectors(base)),
        changed(base, "+ 4 sinks", sinks=4),
        changed(base, "+ 16 sinks", sinks=16),
        changed(base, "+ window 32", recent=32),
        changed(base, "+ window 128", recent=128),
        changed(base, "+ ends k8v8", ends=1),
    )


def together(base: str) -> tuple[Scheme, ...]:
    """Ideas added one after the other, the cheapest first, for the demo model."""
    pre = {"k_shift": "pre"}
    policy = {"sinks": 4, "recent": 128}
    matrices = {"k_balance": "full", "v_balance": "full"}
    return (
        changed(base, "+ key mean, sinks 4, window 128", k_shift="mean", **policy),
        changed(base, "+ key mean before RoPE, sinks 4, window 32", **pre, sinks=4, recent=32),
        changed(base, "+ key mean before RoPE, sinks 4, window 128", **pre, **policy),
        changed(base, "+ these, matrices", **pre, **policy, **matrices),
        changed(base, "+ these, vector codes", **pre, **policy, **matrices, **_vectors(base)),
        changed(base, "+ these, ends k8v8", **pre, **policy, **matrices, **_vectors(base), ends=1),
    )


IDEAS = (
    *alone("k4v4"),
    changed("k4v4", "+ key mean before RoPE, matrices", k_shift="pre", k_balance="full", v_balance="full"),
    *together("k4v4")[:3],
    packed("k3v3"),
    changed("k3v3", "+ key mean before RoPE", k_shift="pre"),
    *together("k3v3"),
    packed("k2v2"),
    changed("k2v2", "+ key mean before RoPE", k_shift="pre"),
    changed("k2v2", "+ vector codes", **_vectors("k2v2")),
    changed("k2v2", "+ window 128", recent=128),
    *together("k2v2")[2:],
)


def by_codes(base: str) -> tuple[Scheme, ...]:
    """A mean of keys and a format's own exact tokens, with each kind of codes."""
    sinks, recent = exact_tokens(base, None, None)
    around = {"k_shift": "mean", "sinks": sinks, "recent": recent}
    label = f"+ key mean, sinks {sinks}, window {recent}"
    along = {"k": f"trellis{base[1]}", "v": f"trellis{base[3]}"}
    return (
        changed(base, label, **around),
        changed(base, f"{label}, vector codes", **around, **_vectors(base)),
        changed(base, f"{label}, trellis codes", **around, **along),
    )


TRELLIS = (*by_codes("k3v3"), *by_codes("k2v2"))

_PRE = {"k_shift": "pre", "k_balance": "pairs"}

# After the figures of IDEAS: how small a window does, what it does alone, and what folds into weights.
CHOSEN = (
    changed("k4v4", "+ best of 3 scales", **_scales("k4v4")),
    changed("k3v3", "+ best of 3 scales", **_scales("k3v3")),
    changed("k4v4", "+ pair balance from weights", k_balance="weights"),
    changed("k4v4", "+ pair balance", k_balance="pairs"),
    changed("k4v4", "+ key mean before RoPE, pair balance", **_PRE),
    changed("k4v4", "+ window 16", recent=16),
    changed("k4v4", "+ key mean, window 32", k_shift="mean", recent=32),
    changed("k3v3", "+ window 32", recent=32),
    changed("k3v3", "+ window 128", recent=128),
    changed("k3v3", "+ key mean, window 32", k_shift="mean", recent=32),
    changed("k3v3", "+ key mean before RoPE, pair balance, window 128", **_PRE, recent=128),
    changed("k2v2", "+ key mean, window 128", k_shift="mean", recent=128),
    changed(
        "k2v2",
        "+ key mean before RoPE, pair balance, window 128, vector codes",
        **_PRE,
        recent=128,
        **_vectors("k2v2"),
    ),
)


def on_synthetic_keys(base: str) -> tuple[Scheme, ...]:
    """Each idea that can matter where keys are independent draws (no sinks, no recency, one layer)."""
    return (
        packed(base),
        changed(base, "+ unbiased key scale", k=f"unbiased{base[1]}"),
        changed(base, "+ best of 3 scales", **_scales(base)),
        changed(base, "+ vector codes", **_vectors(base)),
        changed(base, "+ channel balance", k_balance="channels"),
        changed(base, "+ pair balance", k_balance="pairs"),
        changed(base, "+ key matrix", k_balance="full"),
        changed(base, "+ key mean", k_shift="mean"),
        changed(base, "+ key mean, pair balance", k_shift="mean", k_balance="pairs"),
        changed(base, "+ key mean before RoPE", k_shift="pre"),
        changed(base, "+ k_proj bias", k_shift="bias"),
        changed(base, "+ k_proj bias, channel balance", k_shift="bias", k_balance="channels"),
        changed(base, "+ k_proj bias, pair balance", k_shift="bias", k_balance="pairs"),
        changed(base, "+ k_proj bias, key matrix", k_shift="bias", k_balance="full"),
        changed(
            base,
            "+ k_proj bias, channel balance, vector codes",
            k_shift="bias",
            k_balance="channels",
            **_vectors(base),
        ),
    )


SYNTHETIC = (
    *FORMATS,
    *map(balanced, NAMES),
    *(s for base in ("k4v4", "k3v3", "k2v2") for s in on_synthetic_keys(base)[1:]),
)
