"""Attention backend `triton`: our kernel over 16-bit keys and values, read only where visible (`attend`).

On a CPU the same op cuts keys and values to what is visible before it calls PyTorch.
"""

from __future__ import annotations

import torch

from .call import AttentionCall
from .own_kernels import MAX_QUERIES, limits


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why this call cannot or should not run on our kernel; empty if it can."""
    reasons = limits(call)
    # On a GPU SDPA reads a mask as bytes or numbers, in every tile: benchmarks/results/prefill.json.
    masked = call.device == "cuda" and (call.interval or call.bits)
    beyond_sdpa = call.sinks or call.softcap is not None
    # A few queries go at memory's speed, whoever reads it: who is ahead is the order's business.
    plain = call.mask == "none" and not call.is_causal
    decode = call.device == "cuda" and call.phase == "decode" and plain
    if not (call.bounded or beyond_sdpa or masked or decode):
        reasons.append(
            f"every key is visible to some query (mask: {call.visible}): nothing to leave unread"
        )
    if call.device == "cuda" and (call.q_len is None or call.q_len > MAX_QUERIES):
        q_len = "unknown" if call.q_len is None else call.q_len
        if not (call.interval or call.bits or call.mask == "none"):
            reasons.append(f"q_len={q_len} (at most {MAX_QUERIES}) with a {call.mask} mask, no interval")
        if call.dtype == torch.float32:
            reasons.append(f"q_len={q_len} (at most {MAX_QUERIES}) in float32")
    return reasons
