"""Attention backend `turboquant`: reads a packed cache directly (`tq_append_attend`, `tq_decode`).

More than `MAX_QUERIES` queries read the whole cache once per 16 to 64 of them: dequantizing it once and
calling the best 16-bit kernel is cheaper then.
"""

from __future__ import annotations

from .call import AttentionCall
from .own_kernels import MAX_QUERIES, limits


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why this call cannot read the packed bytes; empty if it can."""
    if call.kv_format is None:
        return [f"keys and values are not read from a packed cache (they are {call.kv_source})"]
    reasons = [*call.packed_obstacles, *limits(call)]
    if call.q_len is None:
        reasons.append("q_len is not known at compile time")
    elif call.q_len > MAX_QUERIES:
        reasons.append(f"q_len={call.q_len} (at most {MAX_QUERIES}): dequantize and 16-bit attention")
    if call.mask == "none":
        flag = "is_causal=True is aligned top-left" if call.is_causal else "no attn_mask"
        reasons.append(f"{flag}: over all kv_len={call.kv_len} slots, empty ones would be visible")
    return reasons
