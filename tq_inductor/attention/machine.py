"""The GPU of this machine."""

from __future__ import annotations

import torch

from .limits import Limits


def rocm_architecture(device: torch.device | int | None = None) -> str | None:
    """E.g. "gfx942"; None on a device that is not ROCm's."""
    if not torch.version.hip:
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


def why_not_here(limits: Limits) -> list[str]:
    """Reasons why a kernel cannot run on the current GPU."""
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    rocm = rocm_architecture()
    return limits.why_not_on(None if rocm else torch.cuda.get_device_capability(), rocm)
