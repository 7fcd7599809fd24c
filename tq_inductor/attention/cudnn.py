"""Attention backend `cudnn`: cuDNN's kernel as PyTorch calls it, asked for in this one call only.

It plans anew for every new shape, so lengths have to be known at compile time.
"""

from __future__ import annotations

import torch

from .arguments import DenseArguments
from .call import AttentionCall
from .limits import HeadDims, Limits
from .machine import why_not_here

WIDE_HEADS = {(9, 0): ((91900, 512), (91000, 256))}  # capability -> (first cuDNN, highest head_dim)


def limits_of(capability: tuple[int, int] | None, cudnn: int) -> Limits:
    """By capability and cuDNN's version, e.g. 91900."""
    wide = WIDE_HEADS.get(capability, ()) if capability else ()
    highest = next((size for first, size in wide if cudnn >= first), 128)
    return Limits(
        highest=(12, 1),
        head_dims=HeadDims(highest=highest, any_pair=True),
        alignment="top-left",
        window=False,
        varlen=False,
        dynamic=False,
        single_key=False,
        deterministic=False,
    )


def version() -> int:
    """Of the cuDNN that PyTorch uses; 0 if there is none."""
    return torch.backends.cudnn.version() or 0


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why it cannot run a call; empty if it can."""
    reasons = limits_of(call.capability, version()).why_not(call)
    return reasons or _missing()


def unavailable() -> list[str]:
    """Reasons why it can run nothing on this machine."""
    return why_not_here(limits_of(None, version())) or _missing()


def attend(x: DenseArguments) -> torch.Tensor:
    """Attention `[B, Lq, H, Dv]`."""
    q, k, v = (y.transpose(1, 2) for y in x.tokens_first())
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query=q, key=k, value=v, attn_bias=None, compute_log_sumexp=False, dropout_p=0.0,
        is_causal=x.causal, return_debug_mask=False, scale=x.scale,
    )  # fmt: skip
    return out[0].transpose(1, 2)  # type: ignore[no-any-return]


def _missing() -> list[str]:
    return [] if version() >= 90000 else [f"cuDNN {version()} (needs 90000 or newer)"]
