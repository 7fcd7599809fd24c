"""Attention backend `sdpa`: PyTorch's own `scaled_dot_product_attention`; the call stays as it is."""

from __future__ import annotations

from .call import AttentionCall


def why_not(call: AttentionCall) -> list[str]:
    """What `scaled_dot_product_attention` has no argument for; empty if nothing."""
    asked = {
        "attention sinks": call.sinks,
        f"softcap={call.softcap}": call.softcap is not None,
        "ragged sequences (cu_seqlens)": call.varlen,
        f"pages of {call.page_size} tokens": call.page_size is not None,
        f"keys and values of {call.kv_bytes} bytes": bool(call.kv_bytes),
    }
    return [
        f"{what}: scaled_dot_product_attention has none" for what, asked_for in asked.items() if asked_for
    ]


def unavailable() -> list[str]:
    """Always available."""
    return []
