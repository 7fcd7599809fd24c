"""Attention backend `fa4`: FlashAttention 4 of the package flash-attn-4, compiled at its first call.

On SM90 it does not split keys among processors: a few queries over many keys are better elsewhere.
"""

from __future__ import annotations

import torch

from . import packages
from .arguments import DenseArguments, VarlenArguments
from .call import AttentionCall
from .limits import Capability, HeadDims, Limits
from .machine import why_not_here

PACKAGE, MODULE, EXTRA = "flash-attn-4", "flash_attn.cute.interface", "fa4"
OLDEST = "4.0.0b36"
HEAD_DIMS = {  # major capability -> sizes of a head
    9: HeadDims(highest=256, any_pair=True),
    10: HeadDims(highest=128, pairs=((192, 128), (256, 256), (64, 512), (512, 512)), any_pair=True),
}
PAGED = (9, 10)
BLACKWELL = ((10, 0), (10, 3), (11, 0))


def limits_of(capability: Capability | None) -> Limits:
    """By capability; those not in the tables are limited to what all kernels can do."""
    major = capability[0] if capability else 0
    major = 10 if major == 11 else major
    return Limits(
        head_dims=HEAD_DIMS.get(major, HeadDims(highest=128)),
        softcap=True,
        sinks=True,
        page_multiple=1 if major in PAGED else None,
    )


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why it cannot run a call; empty if it can."""
    reasons = limits_of(call.capability).why_not(call)
    if call.device == "cuda":
        if (
            call.capability in BLACKWELL
            and call.head_dim == 256
            and (call.sinks or call.softcap is not None)
        ):
            reasons.append(f"head_dim=256 with sinks or softcap on {call.architecture}")
        reasons += packages.missing(PACKAGE, OLDEST, EXTRA)
    return reasons


def unavailable() -> list[str]:
    """Reasons why it can run nothing on this machine."""
    return [*why_not_here(limits_of(None)), *packages.missing(PACKAGE, OLDEST, EXTRA)]


def broken() -> list[str]:
    """Why the installed package cannot be used, if it cannot; imports it."""
    return packages.failure(PACKAGE, MODULE)


def attend(x: DenseArguments) -> torch.Tensor:
    """Attention `[B, Lq, H, Dv]`."""
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = x.tokens_first()
    out = flash_attn_func(
        q=q, k=k, v=v, softmax_scale=x.scale, causal=x.causal,
        window_size=(None, None) if x.causal else x.window, learnable_sink=x.sinks,
        softcap=x.softcap or 0.0, return_lse=False,
    )  # fmt: skip
    return _only(out)


def varlen(x: VarlenArguments) -> torch.Tensor:
    """Ragged attention `[Tq, H, Dv]`."""
    from flash_attn.cute.interface import flash_attn_varlen_func

    keys = {"cu_seqlens_k": x.cu_seqlens_k}
    if x.block_table is not None:  # what it does not need may be anything, to us
        table = x.block_table.clamp(0, x.k.shape[0] - 1)
        keys = {"page_table": table, "seqused_k": x.cu_seqlens_k.diff()}
    out = flash_attn_varlen_func(
        q=x.q, k=x.k, v=x.v, cu_seqlens_q=x.cu_seqlens_q, max_seqlen_q=x.max_seqlen_q,
        max_seqlen_k=x.max_seqlen_k, softmax_scale=x.scale, causal=x.causal, window_size=(None, None),
        softcap=0.0, return_lse=False, **keys,
    )  # fmt: skip
    return x.zeroed_behind(_only(out))


def pages(device: torch.device) -> bool:
    """Whether `varlen` takes k and v in pages; those of a sequence are finite behind its end, too."""
    return limits_of(torch.cuda.get_device_capability(device)).page_multiple is not None


def _only(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The attention, which comes alone or with an LSE, by the package's version and function."""
    return out[0] if isinstance(out, tuple) else out
