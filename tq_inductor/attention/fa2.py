"""Attention backend `fa2`: FlashAttention 2 of the package flash-attn."""

from __future__ import annotations

import torch

from . import packages
from .arguments import DenseArguments, VarlenArguments
from .call import AttentionCall
from .limits import Limits
from .machine import why_not_here

PACKAGE, MODULE, EXTRA = "flash-attn", "flash_attn.flash_attn_interface", "flash-attn"
OLDEST = "2.7.0"  # the first with softcap and windows in all kernels that are called here
LIMITS = Limits(softcap=True, alibi=True, page_multiple=256)


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why it cannot run a call; empty if it can."""
    here = packages.missing(PACKAGE, OLDEST, EXTRA) if call.device == "cuda" else []
    return [*LIMITS.why_not(call), *here]


def unavailable() -> list[str]:
    """Reasons why it can run nothing on this machine."""
    return [*why_not_here(LIMITS), *packages.missing(PACKAGE, OLDEST, EXTRA)]


def broken() -> list[str]:
    """Why the installed package cannot be used, if it cannot; imports it."""
    return packages.failure(PACKAGE, MODULE)


def attend(x: DenseArguments) -> torch.Tensor:
    """Attention `[B, Lq, H, Dv]`."""
    from flash_attn.flash_attn_interface import flash_attn_func

    q, k, v = x.tokens_first()
    slopes = None if x.alibi_slopes is None else x.alibi_slopes.float()
    return flash_attn_func(  # type: ignore[no-any-return]
        q=q, k=k, v=v, dropout_p=0.0, softmax_scale=x.scale, causal=x.causal,
        window_size=(-1, -1) if x.causal else x.window_or(-1), softcap=x.softcap or 0.0,
        alibi_slopes=slopes, deterministic=False, return_attn_probs=False,
    )  # fmt: skip


def varlen(x: VarlenArguments) -> torch.Tensor:
    """Ragged attention `[Tq, H, Dv]`."""
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q=x.q, k=x.k, v=x.v, cu_seqlens_q=x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k,
        max_seqlen_q=x.max_seqlen_q, max_seqlen_k=x.max_seqlen_k, dropout_p=0.0, softmax_scale=x.scale,
        causal=x.causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False,
    )  # fmt: skip
    return x.zeroed_behind(out)
