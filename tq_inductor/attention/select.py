"""The attention backends in order of preference, and the choice among them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import NoAttentionBackendError, OptionError
from . import own_kernels, sdpa, triton, turboquant
from .call import AttentionCall


@dataclass(frozen=True)
class AttentionBackend:
    """A way to compute an attention call.

    Attributes:
        name: as in `options={"attention": name}`.
        why_not: reasons, with values, why it cannot run a call; empty if it can.
        unavailable: reasons why it can run nothing on this machine.
    """

    name: str
    why_not: Callable[[AttentionCall], list[str]]
    unavailable: Callable[[], list[str]]


BACKENDS = (
    AttentionBackend("turboquant", turboquant.why_not, own_kernels.unavailable),
    AttentionBackend("triton", triton.why_not, own_kernels.unavailable),
    AttentionBackend("sdpa", sdpa.why_not, sdpa.unavailable),
)


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine, and if not, why."""

    available: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.available


@dataclass(frozen=True)
class Choice:
    """The backend chosen for a call ("none": it stays), and for each other one why it was not."""

    backend: str
    not_chosen: dict[str, list[str]]


def attention_backends() -> dict[str, Availability]:
    """Name -> availability with reasons, for this machine, in order of preference."""
    found = {b.name: tuple(b.unavailable()) for b in BACKENDS}
    return {name: Availability(not reasons, reasons) for name, reasons in found.items()}


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


def select(call: AttentionCall, requested: str = "auto") -> Choice:
    """The first backend that can run `call`, or the requested one; "none" if none can.

    Raises:
        NoAttentionBackendError: the requested backend cannot run it; lists its reasons.
    """
    reasons = {b.name: b.why_not(call) for b in BACKENDS}
    if requested != "auto":
        if reasons[requested]:
            why = "\n".join(f"  - {reason}" for reason in reasons[requested])
            raise NoAttentionBackendError(
                f"attention backend {requested!r} was asked for but cannot run this {call.phase} "
                f"call\n  {call.describe()}\n{why}\n"
                f'Use options={{"attention": "auto"}} to let such calls use another backend.'
            )
        chosen = requested
    else:
        chosen = next((name for name, why in reasons.items() if not why), "none")
    not_chosen = {
        name: why or [f"{chosen} was asked for" if requested != "auto" else f"{chosen} is preferred"]
        for name, why in reasons.items()
        if name != chosen
    }
    return Choice(chosen, not_chosen)
