"""What our own kernels, of both `turboquant` and `triton`, can run."""

from __future__ import annotations

import torch

from .call import AttentionCall

MAX_QUERIES = 128  # more of them read a mask that is no interval too often
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOWEST_CAPABILITY = (8, 0)


def limits(call: AttentionCall) -> list[str]:
    """Reasons, with values, why none of our kernels can run this call; empty if one may."""
    reasons = list(call.obstacles)
    if call.mask != "none" and call.is_causal:
        reasons.append("attn_mask together with is_causal=True")
    if call.dropout:
        reasons.append(f"dropout_p={call.dropout} (needs 0)")
    if call.needs_grad:
        reasons.append("a gradient is needed and our kernels have none (use torch.no_grad())")
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} (supported: {', '.join(map(str, DTYPES))})")
    if call.device not in ("cpu", "cuda"):
        reasons.append(f"device {call.device} (supported: cpu, cuda)")
    if call.page_size is not None:
        reasons.append(f"pages of {call.page_size} tokens: our kernels take none")
    if call.kv_bytes:
        reasons.append(f"keys and values are {call.kv_bytes} bytes (our kernels take a packed cache's)")
    if call.capability is not None and call.capability < LOWEST_CAPABILITY:
        reasons.append(f"compute capability {call.capability} (needs at least {LOWEST_CAPABILITY})")
    return reasons


def unavailable() -> list[str]:
    """Reasons why our kernels cannot run on this machine; empty if they can."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < LOWEST_CAPABILITY:
        capability = torch.cuda.get_device_capability()
        return [f"compute capability {capability} (needs at least {LOWEST_CAPABILITY})"]
    return []
