"""The one table of preference: which attention backends `auto` tries, in which order.

For the first row that fits a call's phase and GPU. `turboquant` stands first everywhere: it refuses what
is not read from a packed cache, as all others refuse packed bytes. What is not in a row is used when it is
asked for by name only.
"""

from __future__ import annotations

from dataclasses import dataclass

from .call import AttentionCall


@dataclass(frozen=True)
class Order:
    """One row.

    Attributes:
        phase: "prefill", "decode", or "" for both.
        majors: major compute capabilities; () for all devices.
        names: backends, best first.
        evidence: where this order comes from.
    """

    phase: str
    majors: tuple[int, ...]
    names: tuple[str, ...]
    evidence: str


ORDERS = (
    Order(
        "prefill", (9,), ("turboquant", "triton", "fa3", "cudnn", "sdpa", "flex"),
        "an H200: benchmarks/results/backends.json",
    ),
    Order(
        "decode", (9,), ("turboquant", "triton", "fa3", "cudnn", "sdpa", "flex"),
        "an H200: benchmarks/results/backends.json",
    ),
    Order(
        "", (), ("turboquant", "triton", "sdpa", "flex"),
        "none measured: PyTorch's own choice, and ours where it would need a dense mask",
    ),
)  # fmt: skip


def order_for(call: AttentionCall) -> Order:
    """The first row that fits."""
    major = call.capability[0] if call.capability and call.device == "cuda" else None
    return next(
        order
        for order in ORDERS
        if order.phase in ("", call.phase) and (not order.majors or major in order.majors)
    )
