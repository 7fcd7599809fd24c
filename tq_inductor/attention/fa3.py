"""Attention backend `fa3`: FlashAttention 3, from either of two packages.

`fa3-fwd` is a small build without windows, pages and float16; `flash-attn-3`, built from the sources of
FlashAttention's `hopper`, has all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import packages
from .arguments import DenseArguments, VarlenArguments
from .call import AttentionCall
from .limits import HeadDims, Limits
from .machine import why_not_here

EXTRA = "fa3"
HEAD_DIMS = HeadDims(pairs=((192, 128),), values_of_small_keys=512)


@dataclass(frozen=True)
class Build:
    """A package: the module that registers its op `namespace::fwd`, from which version on it can what."""

    package: str
    oldest: str
    module: str
    namespace: str
    limits: Limits


BUILDS = (
    Build(
        "flash-attn-3", "3.0.0b1", "flash_attn_3._C", "flash_attn_3",
        Limits(only=((9, 0),), head_dims=HEAD_DIMS, softcap=True, page_multiple=1),
    ),
    Build(
        "fa3-fwd", "0.0.3", "fa3_fwd._C", "fa3_fwd",
        Limits(
            only=((9, 0),), dtypes=(torch.bfloat16,), head_dims=HEAD_DIMS, softcap=True, window=False,
        ),
    ),
)  # fmt: skip


def installed() -> Build | None:
    """The first build that is here."""
    return next((build for build in BUILDS if packages.version_of(build.package) is not None), None)


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why it cannot run a call; empty if it can."""
    build = installed()
    reasons = (build or BUILDS[-1]).limits.why_not(call)
    if call.device == "cuda":
        reasons += _missing(build)
    return reasons


def unavailable() -> list[str]:
    """Reasons why it can run nothing on this machine."""
    build = installed()
    return [*why_not_here((build or BUILDS[-1]).limits), *_missing(build)]


def broken() -> list[str]:
    """Why the installed package cannot be used, if it cannot; imports it, which registers its op."""
    build = installed()
    return packages.failure(build.package, build.module) if build else []


def attend(x: DenseArguments) -> torch.Tensor:
    """Attention `[B, Lq, H, Dv]`."""
    q, k, v = x.tokens_first()
    back, ahead = (-1, -1) if x.causal else x.window_or(-1)
    out = _op()(
        q=q, k=k, v=v, softmax_scale=x.scale, is_causal=x.causal, window_size_left=back,
        window_size_right=ahead, softcap=x.softcap or 0.0, num_splits=0,
    )  # fmt: skip
    return out[0]  # type: ignore[no-any-return]


def varlen(x: VarlenArguments) -> torch.Tensor:
    """Ragged attention `[Tq, H, Dv]`."""
    out = _op()(
        q=x.q, k=x.k, v=x.v, out=x.zeros(), cu_seqlens_q=x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k,
        max_seqlen_q=x.max_seqlen_q, max_seqlen_k=x.max_seqlen_k, softmax_scale=x.scale,
        is_causal=x.causal, window_size_left=-1, window_size_right=-1, softcap=0.0, num_splits=0,
    )  # fmt: skip
    return out[0]  # type: ignore[no-any-return]


def _op() -> Callable[..., tuple[torch.Tensor, ...]]:
    """The op of the build that is here, by keyword only."""
    build = installed()
    assert build is not None, "why_not() was not asked"
    if reasons := broken():
        raise ImportError(*reasons)
    return getattr(torch.ops, build.namespace).fwd  # type: ignore[no-any-return]


def _missing(build: Build | None) -> list[str]:
    build = build or BUILDS[-1]
    return packages.missing(build.package, build.oldest, EXTRA)
