"""Attention backend `flex`: PyTorch's FlexAttention, for masks and scores that only code can say.

Any bool or float mask (ALiBi too), windows in either alignment, softcap. Compiled once per shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType

import torch

from .arguments import DenseArguments
from .call import AttentionCall, Window
from .limits import SIXTEEN_BITS, HeadDims, Limits
from .machine import why_not_here

LIMITS = Limits(
    rocm=("gfx90a", "gfx942", "gfx950"),
    dtypes=(*SIXTEEN_BITS, torch.float32),
    head_dims=HeadDims(lowest=16, multiple=1, any_pair=True),
    alignment="",
    masks=("bool", "float"),
    softcap=True,
    varlen=False,
    dynamic=False,
)


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why it cannot run a call; empty if it can."""
    return LIMITS.why_not(call)


def unavailable() -> list[str]:
    """Reasons why it can run nothing on this machine."""
    return why_not_here(LIMITS)


def attend(x: DenseArguments) -> torch.Tensor:
    """Attention `[B, Lq, H, Dv]`."""
    mask = x.attn_mask
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(*mask.shape[:2], x.q.shape[2], x.k.shape[2])
    tensors = [(tuple(y.shape), y.dtype) for y in (x.q, x.k, x.v, mask) if y is not None]
    run = compiled(tuple(tensors), x.alignment, x.window, x.softcap, x.scale)
    return run(x.q, x.k, x.v, mask).transpose(1, 2)


@functools.cache
def compiled(
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...],
    alignment: str,
    window: Window,
    softcap: float | None,
    scale: float,
) -> Callable[..., torch.Tensor]:
    """FlexAttention for q, k, v and perhaps a mask of these shapes and dtypes."""
    function = flexible(tensors[3][1] if len(tensors) == 4 else None, alignment, window, softcap, scale)
    # Dynamo counts recompilations per code object; these are different functions.
    own = FunctionType(
        function.__code__.replace(), function.__globals__, closure=function.__closure__, name="flexible"
    )
    return torch.compile(own, dynamic=False, fullgraph=True)  # type: ignore[no-any-return]


def flexible(
    mask_dtype: torch.dtype | None, alignment: str, window: Window, softcap: float | None, scale: float
) -> Callable[..., torch.Tensor]:
    """A function of q, k, v and the mask, `[B or 1, H or 1, Lq, Lk]` if there is one."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masked, biased = mask_dtype == torch.bool, mask_dtype not in (None, torch.bool)
    back, ahead = window

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q_len, kv_len = q.shape[2], k.shape[2]
        shift = kv_len - q_len if alignment == "bottom-right" else 0

        def masked_at(b, h, i, j):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            return mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0, i, j]

        def score_mod(score, b, h, i, j):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score + masked_at(b, h, i, j) if biased else score

        def mask_mod(b, h, i, j):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            seen = masked_at(b, h, i, j) if masked else j >= 0
            if back is not None:
                seen = seen & (j >= i + shift - back)
            if ahead is not None:
                seen = seen & (j <= i + shift + ahead)
            return seen

        blocks = None
        if masked or window != (None, None):
            batch, heads = ((n if n > 1 else None) for n in mask.shape[:2]) if masked else (None, None)
            blocks = create_block_mask(mask_mod, batch, heads, q_len, kv_len, device=str(q.device))
        return flex_attention(  # type: ignore[return-value]
            q, k, v, score_mod=score_mod, block_mask=blocks, scale=scale, enable_gqa=True
        )

    return run
