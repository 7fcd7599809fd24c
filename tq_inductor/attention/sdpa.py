"""Attention backend `sdpa`: PyTorch's own `scaled_dot_product_attention`; the call stays as it is."""

from __future__ import annotations

from .call import AttentionCall


def why_not(call: AttentionCall) -> list[str]:
    """What `scaled_dot_product_attention` has no argument for; empty if nothing."""
    reasons = []
    if call.sinks:
        reasons.append("attention sinks: scaled_dot_product_attention has none")
    if call.softcap is not None:
        reasons.append(f"softcap={call.softcap}: scaled_dot_product_attention has none")
    return reasons


def unavailable() -> list[str]:
    """Always available."""
    return []
