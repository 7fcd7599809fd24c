"""Attention backend `flex`: PyTorch's FlexAttention, for masks and scores that only code can say.

Any bool or float mask, ALiBi by slopes, windows in either alignment, softcap. Compiled once per shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .arguments import DenseArguments
from .call import AttentionCall, Window
from .limits import SIXTEEN_BITS, HeadDims, Limits
from .machine import why_not_here

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries, and keys, of which FlexAttention knows whether any is seen
LIMITS = Limits(
    rocm=("gfx90a", "gfx942", "gfx950"),
    dtypes=(*SIXTEEN_BITS, torch.float32),
    head_dims=HeadDims(lowest=16, multiple=1, any_pair=True),
    alignment="",
    masks=("bool", "float"),
    softcap=True,
    alibi=True,
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
    sloping = x.alibi_slopes is not None
    run = compiled(tuple(tensors), sloping, x.alignment, x.window, x.softcap, x.scale)
    return run(x.q, x.k, x.v, mask, x.alibi_slopes).transpose(1, 2)


@functools.cache
def compiled(
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...],
    sloping: bool,
    alignment: str,
    window: Window,
    softcap: float | None,
    scale: float,
) -> Callable[..., torch.Tensor]:
    """FlexAttention for q, k, v and perhaps a mask of these shapes and dtypes, and ALiBi slopes."""
    mask_dtype = tensors[3][1] if len(tensors) == 4 else None
    function = flexible(mask_dtype, sloping, alignment, window, softcap, scale)
    # Dynamo counts recompilations per code object; these are different functions.
    own = FunctionType(
        function.__code__.replace(), function.__globals__, closure=function.__closure__, name="flexible"
    )
    return torch.compile(own, dynamic=False, fullgraph=True)  # type: ignore[no-any-return]


def flexible(
    mask_dtype: torch.dtype | None,
    sloping: bool,
    alignment: str,
    window: Window,
    softcap: float | None,
    scale: float,
) -> Callable[..., torch.Tensor]:
    """A function of q, k, v, a mask `[B or 1, H or 1, Lq, Lk]` or None, and slopes `[H]` or None."""
    from torch.nn.attention.flex_attention import flex_attention

    masked, biased = mask_dtype == torch.bool, mask_dtype not in (None, torch.bool)
    back, ahead = window

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, slopes: torch.Tensor
    ) -> torch.Tensor:
        q_len, kv_len = q.shape[2], k.shape[2]
        shift = kv_len - q_len if alignment == "bottom-right" else 0

        def masked_at(b, h, i, j):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            return mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0, i, j]

        def score_mod(score, b, h, i, j):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if sloping:
                score = score + slopes[h] * (j - i - shift)
            return score + masked_at(b, h, i, j) if biased else score

        def mask_mod(b, h, i, j):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            seen = masked_at(b, h, i, j) if masked else j >= 0
            if back is not None:
                seen = seen & (j >= i + shift - back)
            if ahead is not None:
                seen = seen & (j <= i + shift + ahead)
            return seen

        batch, heads = mask.shape[:2] if masked else (1, 1)
        blocks = block_mask(mask_mod, (batch, heads, q_len, kv_len), q.device)
        # Its kernel for fewer than BLOCK queries holds all queries of a KV head in one block.
        joint = q_len * (q.shape[1] // k.shape[1])
        options = {"FORCE_USE_FLEX_ATTENTION": True} if joint > BLOCK else None
        return flex_attention(  # type: ignore[return-value]
            q, k, v, score_mod=score_mod, block_mask=blocks, scale=scale, enable_gqa=True,
            kernel_options=options,  # type: ignore[arg-type]
        )  # fmt: skip

    return run


def block_mask(
    mask_mod: Callable[..., torch.Tensor], shape: tuple[int, int, int, int], device: torch.device
) -> BlockMask:
    """What `create_block_mask` gives for `[B or 1, H or 1, Lq, Lk]`, without its vmap.

    Vmap fails where a `TorchDispatchMode` is active, as it is when AOTAutograd runs a graph with custom ops
    for the first time: that is when this is traced.
    """
    from torch.nn.attention.flex_attention import BlockMask

    grids = [torch.arange(n, device=device).view(-1, *[1] * (3 - axis)) for axis, n in enumerate(shape)]
    visible = mask_mod(*grids).expand(shape)
    q_len, kv_len = shape[2:]
    visible = F.pad(visible, (0, -kv_len % BLOCK, 0, -q_len % BLOCK))
    count = visible.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum((3, 5))
    full = count == BLOCK * BLOCK
    some_counts, some = _listed((count > 0) & ~full)
    full_counts, whole = _listed(full)
    return BlockMask.from_kv_blocks(
        some_counts, some, full_counts, whole, BLOCK_SIZE=BLOCK, mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len), compute_q_blocks=False,
    )  # fmt: skip


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of `[..., n]` are true, int32 `[...]`, and their indices, first of int32 `[..., n]`."""
    blocks = blocks.to(torch.int32)
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), order.to(torch.int32).contiguous()
