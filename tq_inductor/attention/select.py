"""The attention backends, and the choice among them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import NoAttentionBackendError, OptionError
from . import cudnn, fa2, fa3, fa4, flashinfer, flex, own_kernels, sdpa, torch_flash, triton, turboquant
from .arguments import DenseArguments, VarlenArguments
from .call import AttentionCall
from .order import order_for


@dataclass(frozen=True)
class AttentionBackend:
    """A way to compute an attention call.

    Attributes:
        name: as in `options={"attention": name}`.
        why_not: reasons, with values, why it cannot run a call; empty if it can.
        unavailable: reasons why it can run nothing on this machine.
        broken: reasons why what is installed cannot be used; it imports a package, so it is asked only of
            the one that is about to be chosen.
        unbuilt: what it had to compile for minutes to run a call; it is then taken only if named.
        note: what else is worth knowing of it on this machine; asked where it is available.
        attend: computes what the op `dense_attn` is called with; None if the call becomes another op.
        varlen: computes what the op `varlen_attn` is called with; None if it cannot, or by another way.
        pages: whether `varlen` takes keys and values in pages on a device; they are copied for the others.
        formats: of bytes that `varlen` takes, as tensors of that dtype, on a device and of a head size; for
            the others they are made `dtype`.
    """

    name: str
    why_not: Callable[[AttentionCall], list[str]]
    unavailable: Callable[[], list[str]]
    broken: Callable[[], list[str]] = list
    unbuilt: Callable[[AttentionCall], list[str]] = lambda call: []
    note: Callable[[], str] = str
    attend: Callable[[DenseArguments], torch.Tensor] | None = None
    varlen: Callable[[VarlenArguments], torch.Tensor] | None = None
    pages: Callable[[torch.device], bool] = lambda device: False
    formats: Callable[[torch.device, int], tuple[str, ...]] = lambda device, head_dim: ()


BACKENDS = (
    AttentionBackend("turboquant", turboquant.why_not, own_kernels.unavailable),
    AttentionBackend("triton", triton.why_not, own_kernels.unavailable),
    AttentionBackend(
        "fa3", fa3.why_not, fa3.unavailable, fa3.broken, attend=fa3.attend, varlen=fa3.varlen
    ),
    AttentionBackend(
        "fa4", fa4.why_not, fa4.unavailable, fa4.broken, attend=fa4.attend, varlen=fa4.varlen,
        pages=fa4.pages,
    ),
    AttentionBackend(
        "fa2", fa2.why_not, fa2.unavailable, fa2.broken, attend=fa2.attend, varlen=fa2.varlen
    ),
    AttentionBackend(
        "flashinfer", flashinfer.why_not, flashinfer.unavailable, flashinfer.broken, flashinfer.unbuilt,
        flashinfer.note, flashinfer.attend, flashinfer.varlen, flashinfer.pages, flashinfer.formats,
    ),
    AttentionBackend("cudnn", cudnn.why_not, cudnn.unavailable, attend=cudnn.attend),
    AttentionBackend(
        "torch_flash", torch_flash.why_not, torch_flash.unavailable, attend=torch_flash.attend,
        varlen=torch_flash.varlen,
    ),
    AttentionBackend("sdpa", sdpa.why_not, sdpa.unavailable),
    AttentionBackend("flex", flex.why_not, flex.unavailable, attend=flex.attend),
)  # fmt: skip
BY_NAME = {backend.name: backend for backend in BACKENDS}


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine, and if not, why; if so, what else is worth knowing."""

    available: bool
    reasons: tuple[str, ...] = ()
    note: str = ""

    def __bool__(self) -> bool:
        return self.available


@dataclass(frozen=True)
class Choice:
    """The backend chosen for a call ("none": it stays), and for each other one why it was not."""

    backend: str
    not_chosen: dict[str, list[str]]


def attention_backends() -> dict[str, Availability]:
    """Name -> availability with reasons, for this machine."""
    found = {b: tuple(b.unavailable() or b.broken()) for b in BACKENDS}
    return {
        b.name: Availability(not reasons, reasons, "" if reasons else b.note())
        for b, reasons in found.items()
    }


def check_backend_name(name: object) -> str:
    """`name` if it is "auto" or a backend's; otherwise an `OptionError` naming the nearest."""
    names = ["auto", *(b.name for b in BACKENDS)]
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=2, cutoff=0.4)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise OptionError(
            f"unknown attention backend {name!r}.{hint} Allowed: {', '.join(names)}, or a dict "
            'of these such as {"prefill": "auto", "decode": "turboquant"}.'
        )
    return str(name)


def cannot_run(name: str, phase: str, shapes: str, reasons: Sequence[str]) -> NoAttentionBackendError:
    """The error for a call that the backend that was asked for cannot run."""
    why = "\n".join(f"  - {reason}" for reason in reasons)
    return NoAttentionBackendError(
        f"attention backend {name!r} was asked for but cannot run this {phase} call\n  {shapes}\n{why}\n"
        f'Use options={{"attention": "auto"}} to let such calls use another backend.'
    )


def select(call: AttentionCall, requested: str = "auto") -> Choice:
    """The first backend of the call's order that can run it, or the requested one; "none" if none can.

    Raises:
        NoAttentionBackendError: the requested backend cannot run it; lists its reasons.
    """
    reasons = {b.name: b.why_not(call) for b in BACKENDS}
    broken = {b.name: b.broken for b in BACKENDS}
    if requested != "auto":
        reasons[requested] = reasons[requested] or broken[requested]()
        if reasons[requested]:
            raise cannot_run(requested, call.phase, call.describe(), reasons[requested])
        chosen = requested
    else:
        chosen = "none"
        for name in order_for(call):
            reasons[name] = reasons[name] or broken[name]() or BY_NAME[name].unbuilt(call)
            if not reasons[name]:
                chosen = name
                break
    not_chosen = {
        name: why or [_passed_over(name, chosen, requested, call)]
        for name, why in reasons.items()
        if name != chosen
    }
    return Choice(chosen, not_chosen)


def _passed_over(name: str, chosen: str, requested: str, call: AttentionCall) -> str:
    """Why a backend that could run the call does not."""
    if requested != "auto":
        return f"{chosen} was asked for"
    listed = name in order_for(call)
    return f"{chosen} is preferred" if listed else "only if asked for by name (see attention/order.py)"
