"""Attention backend `sdpa`: PyTorch's own `scaled_dot_product_attention`; the call stays as it is."""

from __future__ import annotations

from .call import AttentionCall


def why_not(call: AttentionCall) -> list[str]:
    """Always possible."""
    return []


def unavailable() -> list[str]:
    """Always available."""
    return []
