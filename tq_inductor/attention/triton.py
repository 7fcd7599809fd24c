"""Attention backend `triton`: our kernel over 16-bit keys and values, read only where visible (`attend`).

On a CPU the same op cuts keys and values to what is visible before it calls PyTorch.
"""

from __future__ import annotations

import torch

from .call import AttentionCall

MAX_QUERIES = 128  # on a GPU, with a mask that is no interval: it would be read for every block of queries
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why this call cannot or should not run on our kernel; empty if it can."""
    reasons = list(call.obstacles)
    # On a GPU SDPA has to be given an interval as a dense mask: benchmarks/results/prefill.json.
    masked = call.device == "cuda" and call.interval
    if not (call.bounded or call.sinks or masked):
        reasons.append(
            f"every key is visible to some query (mask: {call.visible}): nothing to leave unread"
        )
    if call.mask != "none" and call.is_causal:
        reasons.append("attn_mask together with is_causal=True")
    if call.softcap is not None:
        reasons.append(f"softcap={call.softcap}: this kernel has none")
    if call.dropout:
        reasons.append(f"dropout_p={call.dropout} (needs 0)")
    if call.needs_grad:
        reasons.append("a gradient is needed and this kernel has none")
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} (supported: {', '.join(map(str, DTYPES))})")
    if call.device not in ("cpu", "cuda"):
        reasons.append(f"device {call.device} (supported: cpu, cuda)")
    if call.device == "cuda" and (call.q_len is None or call.q_len > MAX_QUERIES):
        q_len = "unknown" if call.q_len is None else call.q_len
        if not (call.interval or call.mask == "none"):
            reasons.append(f"q_len={q_len} (at most {MAX_QUERIES}) with a mask that is no interval")
        if call.dtype == torch.float32:
            reasons.append(f"q_len={q_len} (at most {MAX_QUERIES}) in float32")
    if call.capability is not None and call.capability < (8, 0):
        reasons.append(f"compute capability {call.capability} (needs at least (8, 0))")
    return reasons


def unavailable() -> list[str]:
    """Reasons why no call can use this backend on this machine; empty if some can."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return [f"compute capability {torch.cuda.get_device_capability()} (needs at least (8, 0))"]
    return []
