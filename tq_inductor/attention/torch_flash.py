"""Attention backend `torch_flash`: the FlashAttention 2 that PyTorch is built with, called through aten.

Unlike `scaled_dot_product_attention` this takes causal masks of fewer queries than keys, and windows.
"""

from __future__ import annotations

import torch

from .arguments import DenseArguments, VarlenArguments
from .call import AttentionCall
from .limits import Limits
from .machine import why_not_here

LIMITS = Limits(highest=(12, 1))  # alibi and softcap are compiled out


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why it cannot run a call; empty if it can."""
    return LIMITS.why_not(call)


def unavailable() -> list[str]:
    """Reasons why it can run nothing on this machine."""
    return why_not_here(LIMITS)


def attend(x: DenseArguments) -> torch.Tensor:
    """Attention `[B, Lq, H, Dv]`."""
    q, k, v = x.tokens_first()
    back, ahead = (None, None) if x.causal else x.window
    out = torch.ops.aten._flash_attention_forward(
        query=q, key=k, value=v, cum_seq_q=None, cum_seq_k=None, max_q=q.shape[1], max_k=k.shape[1],
        dropout_p=0.0, is_causal=x.causal, return_debug_mask=False, scale=x.scale,
        window_size_left=back, window_size_right=ahead,
    )  # fmt: skip
    return out[0]  # type: ignore[no-any-return]


def varlen(x: VarlenArguments) -> torch.Tensor:
    """Ragged attention `[Tq, H, Dv]`."""
    out = torch.ops.aten._flash_attention_forward(
        query=x.q, key=x.k, value=x.v, cum_seq_q=x.cu_seqlens_q, cum_seq_k=x.cu_seqlens_k,
        max_q=x.max_seqlen_q, max_k=x.max_seqlen_k, dropout_p=0.0, is_causal=x.causal,
        return_debug_mask=False, scale=x.scale,
    )[0]  # fmt: skip
    return x.zeroed_behind(out)
