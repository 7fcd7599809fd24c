"""Attention backend `turboquant`: reads a packed cache directly (`tq_append_attend`, `tq_decode`).

For any number of queries: dequantizing would take memory in proportion to the context.
"""

from __future__ import annotations

from .call import AttentionCall
from .own_kernels import limits


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why this call cannot read the packed bytes; empty if it can."""
    if call.kv_format is None:
        return [f"keys and values are not read from a packed cache (they are {call.kv_source})"]
    reasons = [*call.packed_obstacles, *limits(call)]
    if call.mask == "none":
        flag = "is_causal=True is aligned top-left" if call.is_causal else "no attn_mask"
        reasons.append(f"{flag}: over all kv_len={call.kv_len} slots, empty ones would be visible")
    return reasons
