"""Attention backend `flashinfer`: FlashInfer's fa2 and fa3 kernels, the kernel named in every call.

FlashInfer compiles a kernel per dtype, head size, window and softcap, in minutes, when it is first called:
`auto` never takes it, `options={"attention": "flashinfer"}` does. `plan()` copies lengths to the host, so
it runs once per shape, before a CUDA graph is captured; lengths have to be known at compile time.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import torch

from . import packages
from .arguments import DenseArguments
from .call import MAX_DECODE_QUERIES, AttentionCall, Window
from .limits import HeadDims, Limits
from .machine import why_not_here

log = logging.getLogger("tq_inductor.attention")

PACKAGE, MODULE, EXTRA = "flashinfer-python", "flashinfer", "flashinfer"
OLDEST, WIDE_HEADS = "0.6.11", "0.6.18"  # with head_dim 512 from the latter on
HOPPER = (9, 0)
WORKSPACE_BYTES = 128 << 20
PAIRS = ((192, 128),)
FA3 = Limits(
    only=(HOPPER,),
    head_dims=HeadDims(only=(64, 128, 256), pairs=PAIRS),
    window_ahead=False,
    softcap=True,
    page_multiple=1,
    dynamic=False,
)


def fa2_limits(version: str) -> Limits:
    """Of the fa2 kernel."""
    sizes = (64, 128, 256, 512) if packages.at_least(version, WIDE_HEADS) else (64, 128, 256)
    return replace(
        FA3, only=(), head_dims=HeadDims(only=sizes, pairs=PAIRS), kv_bytes=("e4m3", "e5m2", "nvfp4")
    )


def why_not(call: AttentionCall) -> list[str]:
    """Reasons, with values, why it cannot run a call; empty if it can."""
    version = packages.version_of(PACKAGE)
    reasons = fa2_limits(version or OLDEST).why_not(call)
    if call.device == "cuda":
        if call.kv_bytes and call.head_dim == 512 and (call.capability or HOPPER) < (10, 0):
            reasons.append(f"head_dim=512 of {call.kv_bytes} bytes on {call.architecture} (needs sm100)")
        if call.kv_bytes == "nvfp4" and call.head_dim == 64:
            reasons.append("head_dim=64 of nvfp4 bytes")
        if call.window[0] is not None and call.window[1] != 0:
            reasons.append(f"window {call.window} that is not causal")
        if call.varlen or call.padding:
            reasons.append("ragged lengths lie on the device, plan() needs them on the host")
        reasons += packages.missing(PACKAGE, OLDEST, EXTRA)
    return reasons


def unavailable() -> list[str]:
    """Reasons why it can run nothing on this machine."""
    return [*why_not_here(fa2_limits(OLDEST)), *packages.missing(PACKAGE, OLDEST, EXTRA)]


def broken() -> list[str]:
    """Why the installed package cannot be used, if it cannot; imports it."""
    return packages.failure(PACKAGE, MODULE)


def attend(x: DenseArguments) -> torch.Tensor:
    """Attention `[B, Lq, H, Dv]`."""
    import flashinfer

    q, k, v = x.tokens_first()
    batch, q_len, heads, dim = q.shape
    kernel = _kernel_of(x)
    flags = {
        "causal": x.window[1] == 0, "window_left": x.window_or(-1)[0],
        "logits_soft_cap": x.softcap or 0.0, "sm_scale": x.scale, "pos_encoding_mode": "NONE",
    }  # fmt: skip
    if batch == 1:
        return flashinfer.single_prefill_with_kv_cache(  # type: ignore[no-any-return]
            q=q[0], k=k[0], v=v[0], kv_layout="NHD", backend=kernel, **flags
        )[None]
    shape = (batch, q_len, k.shape[1], heads, k.shape[2], dim, v.shape[-1])
    run = planned(shape, x.window, x.softcap, x.scale, q.dtype, q.device, kernel)
    if q_len <= MAX_DECODE_QUERIES:  # each row is a page as long as the row
        return run(q=q.flatten(0, 1), paged_kv_cache=(k, v)).view(batch, q_len, heads, -1)
    flat = {"q": q, "k": k, "v": v}
    return run(**{name: y.flatten(0, 1) for name, y in flat.items()}).view(batch, q_len, heads, -1)


def _kernel_of(x: DenseArguments) -> str:
    sizes = (x.q.shape[-1], x.v.shape[-1])
    few = x.q.shape[2] <= MAX_DECODE_QUERIES
    hopper = torch.cuda.get_device_capability(x.q.device) == HOPPER
    return "fa3" if hopper and not few and not FA3.head_dims.why_not(*sizes) else "fa2"


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """Where partial results lie; shared by all calls, which follow one another."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@functools.cache
def planned(
    shape: tuple[int, ...],
    window: Window,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str,
) -> Any:
    """FlashInfer's `run` for a shape (B, Lq, Lk, H, Hkv, D, Dv), planned once and never again."""
    import flashinfer

    batch, q_len, kv_len, heads, kv_heads, dim, v_dim = shape
    log.warning("flashinfer: planning %s for %s (its first call may compile for minutes)", kernel, shape)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    flags = {
        "num_qo_heads": heads, "num_kv_heads": kv_heads, "head_dim_qk": dim, "head_dim_vo": v_dim,
        "causal": window[1] == 0, "window_left": -1 if window[0] is None else window[0],
        "logits_soft_cap": softcap or 0.0, "sm_scale": scale, "pos_encoding_mode": "NONE",
        "q_data_type": dtype, "kv_data_type": dtype,
    }  # fmt: skip
    if q_len <= MAX_DECODE_QUERIES:
        paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            float_workspace_buffer=workspace(device), kv_layout="NHD", backend=kernel
        )
        paged.plan(
            qo_indptr=starts * q_len, paged_kv_indptr=starts, paged_kv_indices=starts[:-1].to(device),
            paged_kv_last_page_len=torch.full((batch,), kv_len, dtype=torch.int32), page_size=kv_len,
            **flags,
        )  # fmt: skip
        return paged.run
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        float_workspace_buffer=workspace(device), kv_layout="NHD", backend=kernel
    )
    ragged.plan(qo_indptr=starts * q_len, kv_indptr=starts * kv_len, **flags)
    return ragged.run
