"""Attention backend `flashinfer`: FlashInfer's fa2 and fa3 kernels, the kernel named in every call.

FlashInfer compiles a module per dtype, head size, window and softcap, in minutes, when it is first called:
`auto` takes it only where that is done and nothing else can run a call; `options={"attention":
"flashinfer"}` compiles. What runs where is planned on the host: for `dense_attn` once per shape, for
`varlen_attn` whenever lengths change, and for CUDA graphs of it by `plan()`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from . import packages
from .arguments import DenseArguments, VarlenArguments, aligned
from .call import MAX_DECODE_QUERIES, AttentionCall
from .flashinfer_modules import Module, announce, built, folders
from .flashinfer_plans import NOT_PLANNED, Kind, Plan, plan_of, planned_rows, plans_for_graphs, sizes_of
from .limits import Capability, HeadDims, Limits
from .machine import why_not_here

PACKAGE, MODULE, EXTRA = "flashinfer-python", "flashinfer", "flashinfer"
OLDEST, WIDE_HEADS = "0.6.11", "0.6.18"  # with head_dim 512 from the latter on
HOPPER = (9, 0)
PAIRS = ((192, 128),)
STORED = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "nvfp4": torch.uint8}
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
        if call.kv_bytes and not _takes_bytes(call.capability, call.head_dim):
            reasons.append(f"head_dim=512 of {call.kv_bytes} bytes on {call.architecture} (needs sm100)")
        if call.kv_bytes == "nvfp4" and call.head_dim == 64:
            reasons.append("head_dim=64 of nvfp4 bytes")
        if call.window[0] is not None and call.window[1] != 0:
            reasons.append(f"window {call.window} that is not causal")
        if call.padding:
            reasons.append(
                "padding is counted on the device, in the graph: plan() needs lengths on the host"
            )
        reasons += packages.missing(PACKAGE, OLDEST, EXTRA)
    return reasons


def unavailable() -> list[str]:
    """Reasons why it can run nothing on this machine."""
    return [*why_not_here(fa2_limits(OLDEST)), *packages.missing(PACKAGE, OLDEST, EXTRA)]


def broken() -> list[str]:
    """Why the installed package cannot be used, if it cannot; imports it."""
    return packages.failure(PACKAGE, MODULE)


def unbuilt(call: AttentionCall) -> list[str]:
    """What has to be compiled before it can run a call; empty if nothing."""
    sizes = (call.head_dim or 0, call.v_head_dim or 0)
    dtypes = (call.dtype, STORED.get(call.kv_bytes, call.dtype))
    kernel = _kernel_of(call.capability, call.q_len, dtypes, *sizes, call.page_size)
    module = Module(
        kernel, *dtypes, *sizes, call.window[0] is not None, bool(call.softcap),
        batch=call.varlen or call.page_size is not None or call.batch_size != 1,
    )  # fmt: skip
    if module.is_built():
        return []
    return [f"{module.name} is not built ({module.cost()}): ask for it by name"]


def note() -> str:
    """How many of its modules are built on this machine."""
    return f"{len(built())} modules are built, in {' and '.join(map(str, folders()))}; more when asked for"


def attend(x: DenseArguments) -> torch.Tensor:
    """Attention `[B, Lq, H, Dv]`."""
    import flashinfer

    q, k, v = x.tokens_first()
    batch, q_len, heads, dim = q.shape
    kv_len, kv_heads, v_dim = k.shape[1], k.shape[2], v.shape[-1]
    dtypes = (q.dtype, k.dtype)
    kernel = _kernel_of(torch.cuda.get_device_capability(q.device), q_len, dtypes, dim, v_dim)
    few, causal = q_len <= MAX_DECODE_QUERIES, x.window[1] == 0
    kind = Kind(
        kernel, heads, kv_heads, dim, v_dim, *dtypes, q.device, x.scale, causal, x.window[0], x.softcap,
        page_size=kv_len if few else None,
    )  # fmt: skip
    if batch == 1:
        announce(replace(kind.module, batch=False))
        return flashinfer.single_prefill_with_kv_cache(  # type: ignore[no-any-return]
            q=q[0], k=k[0], v=v[0], kv_layout="NHD", backend=kernel, causal=causal, sm_scale=x.scale,
            window_left=x.window_or(-1)[0], logits_soft_cap=x.softcap or 0.0, pos_encoding_mode="NONE",
        )[None]  # fmt: skip
    run = planned_rows(kind, batch, q_len, kv_len)
    if few:
        out = run(q=q.flatten(0, 1), paged_kv_cache=(k, v))
    else:
        out = run(q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1))
    return out.view(batch, q_len, heads, v_dim)  # type: ignore[no-any-return]


def varlen(x: VarlenArguments) -> torch.Tensor:
    """Ragged attention `[Tq, H, Dv]`, also over pages; waits for the device if lengths have changed."""
    if 0 in (x.q.shape[0], x.k.shape[0], len(x.cu_seqlens_q) - 1):
        return x.zeros()
    kind, sizes = _kind_of(x), sizes_of(x)
    found = plans_for_graphs(kind).get(sizes)
    if torch.cuda.is_current_stream_capturing():
        if found is None or not found.ready:
            raise RuntimeError(NOT_PLANNED)
    else:  # the run before a capture takes the same plan: what it made would lie in the graph's memory
        found = found or plan_of(kind)
        found.update(x)
    return found.run(replace(x, q=aligned(x.q), k=aligned(x.k), v=aligned(x.v)))


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    *,
    kv_format: str | None = None,
    k_scale: float = 1.0,
    block_table: torch.Tensor | None = None,
    read: bool = True,
) -> None:
    """Plan for calls of `varlen_attn` by "flashinfer" in CUDA graphs that you capture yourself.

    Nothing else needs it: outside of CUDA graphs `varlen_attn` plans, and our compiler does so before a
    graph that has the lengths as inputs. Call it with what `varlen_attn` is called with, before a CUDA
    graph is captured, and again before a replay whenever lengths may have changed: it waits for the device,
    and plans if they have. One call is enough for all layers of the same sizes, which have to have the same
    lengths. Of q, k, v and block_table only shapes and dtypes count: they may be "meta" tensors.

    Args:
        read: False: not if the tensors of lengths are those of the last call, and PyTorch counted no write.

    Raises:
        RuntimeError: called while a CUDA graph is captured.
        ValueError: lengths that tensors of these sizes cannot have.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("plan() reads lengths on the host: call it before the capture")
    if kv_format is not None and kv_format in formats(cu_seqlens_q.device, q.shape[-1]):
        k, v = k.view(STORED[kv_format]), v.view(STORED[kv_format])
    elif kv_format is not None:  # they are made plain tokens
        k, v = (y.to("meta", q.dtype).flatten(0, y.dim() - 3) for y in (k, v))
        block_table = None
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    x = VarlenArguments(q, k, v, *lengths, is_causal, scale * k_scale, block_table)
    kind, sizes = _kind_of(x), sizes_of(x)
    planned = plans_for_graphs(kind).get(sizes) or Plan(kind, for_graph=True)
    planned.update(x, read=read)
    plans_for_graphs(kind)[sizes] = planned


def pages(device: torch.device) -> bool:
    """Whether `varlen` takes k and v in pages; those of a sequence are finite behind its end, too."""
    return True


def formats(device: torch.device, head_dim: int) -> tuple[str, ...]:
    """Of the bytes of k and v that `varlen` takes as they are, by the fa2 kernel."""
    return ("e4m3", "e5m2") if _takes_bytes(torch.cuda.get_device_capability(device), head_dim) else ()


def _kind_of(x: VarlenArguments) -> Kind:
    device = x.cu_seqlens_q.device
    sizes = (x.q.shape[1], x.v.shape[-2], x.q.shape[2], x.v.shape[-1])
    page_size = None if x.block_table is None else x.k.shape[1]
    capability, dtypes = torch.cuda.get_device_capability(device), (x.q.dtype, x.k.dtype)
    kernel = _kernel_of(capability, x.max_seqlen_q, dtypes, *sizes[2:], page_size)
    return Kind(kernel, *sizes, *dtypes, device, x.scale, x.causal, page_size=page_size)


def _kernel_of(
    capability: Capability | None,
    q_len: int | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    dim: int,
    v_dim: int,
    page_size: int | None = None,
) -> str:
    """The fa3 kernel steps through pages of keys and of values alike, so these are of one size."""
    few = q_len is not None and q_len <= MAX_DECODE_QUERIES
    fits = not FA3.head_dims.why_not(dim, v_dim) and (page_size is None or dim == v_dim)
    fits = fits and dtypes[0] == dtypes[1]
    return "fa3" if capability == HOPPER and not few and fits else "fa2"


def _takes_bytes(capability: Capability | None, head_dim: int | None) -> bool:
    return head_dim != 512 or (capability or HOPPER) >= (10, 0)
