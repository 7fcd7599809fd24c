"""Attention backend `turboquant`: reads a packed cache directly (`tq_append_attend`, `tq_decode`)."""

from __future__ import annotations

import torch

from .call import AttentionCall

# More queries read the whole cache once per 16 to 64 of them; past this, dequantizing it once and
# calling the best 16-bit kernel is cheaper.
MAX_QUERIES = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why this call cannot read the packed bytes; empty if it can."""
    if call.kv_format is None:
        return [f"keys and values are not read from a packed cache (they are {call.kv_source})"]
    reasons = [*call.obstacles, *call.packed_obstacles]
    if call.q_len is None:
        reasons.append("q_len is not known at compile time")
    elif call.q_len > MAX_QUERIES:
        reasons.append(f"q_len={call.q_len} (at most {MAX_QUERIES}): dequantize and 16-bit attention")
    if call.mask == "none":
        flag = "is_causal=True is aligned top-left" if call.is_causal else "no attn_mask"
        reasons.append(f"{flag}: over all kv_len={call.kv_len} slots, empty ones would be visible")
    elif call.is_causal:
        reasons.append("attn_mask together with is_causal=True")
    if call.softcap is not None:
        reasons.append(f"softcap={call.softcap}: this kernel has none")
    if call.dropout:
        reasons.append(f"dropout_p={call.dropout} (needs 0)")
    if call.needs_grad:
        reasons.append("a gradient is needed and a packed cache has none (use torch.no_grad())")
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} (supported: {', '.join(map(str, DTYPES))})")
    if call.device not in ("cpu", "cuda"):
        reasons.append(f"device {call.device} (supported: cpu, cuda)")
    if call.capability is not None and call.capability < (8, 0):
        reasons.append(f"compute capability {call.capability} (needs at least (8, 0))")
    return reasons


def unavailable() -> list[str]:
    """Reasons why no call can use this backend on this machine; empty if some can."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return [f"compute capability {torch.cuda.get_device_capability()} (needs at least (8, 0))"]
    return []
