"""Which optional packages are here, by distribution and version, never by the name of a module.

`flash_attn` is a module of flash-attn (FlashAttention 2) and of flash-attn-4 alike: only the distribution
says what it is. A package that cannot be imported for want of something is a reason against it; any
other exception from its import is a bug, and surfaces.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata

from torch.torch_version import TorchVersion


@functools.cache
def version_of(distribution: str) -> str | None:
    """Its installed version."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def import_failure(module: str) -> str:
    """The `ImportError` that a module gives; "" if it can be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return ""


def at_least(version: str, lowest: str) -> bool:
    """Whether a version is `lowest` or later; betas come before their release."""
    return TorchVersion(version) >= TorchVersion(lowest)


def missing(distribution: str, oldest: str, extra: str) -> list[str]:
    """Why a distribution of this version or a newer one is not here, if it is not."""
    version = version_of(distribution)
    if version is None:
        return [f"{distribution} is not installed (pip install 'tq_inductor[{extra}]')"]
    return [] if at_least(version, oldest) else [f"{distribution} {version} (needs {oldest} or newer)"]


def failure(distribution: str, module: str) -> list[str]:
    """Why an installed distribution cannot be used, if it cannot; imports it."""
    error = import_failure(module)
    return [f"{distribution} {version_of(distribution)} cannot be imported: {error}"] if error else []
