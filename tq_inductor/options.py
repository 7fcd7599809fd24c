"""`CompilerOptions`: what `torch.compile(..., backend="turboquant", mode=, options=)` may say."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch._inductor

from .attention.select import check_backend_name
from .errors import OptionError

PHASES = ("prefill", "decode")
OWN_KEYS = ("attention", "strict")


@dataclass(frozen=True)
class CompilerOptions:
    """Validated options.

    Attributes:
        attention: requested attention backend per phase ("auto" unless named).
        strict: raise if any attention call is left unrewritten.
        inductor: patches of Inductor's config, from `mode` and `options`.
    """

    attention: dict[str, str] = field(default_factory=lambda: dict.fromkeys(PHASES, "auto"))
    strict: bool = False
    inductor: dict[str, Any] = field(default_factory=dict)


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> CompilerOptions:
    """Check `mode` and `options`, in which Inductor's own config keys may stand too.

    Raises:
        OptionError: an unknown key or value; a `ValueError`.
    """
    if not isinstance(options, Mapping | None):
        raise OptionError(
            f"options={options!r} must be a dict such as {{'attention': 'auto'}}. Allowed keys: "
            f"{', '.join(OWN_KEYS)}, and any key of torch._inductor.config."
        )
    options = {str(key).replace("-", "_"): value for key, value in (options or {}).items()}
    known = set(torch._inductor.list_options()) | set(OWN_KEYS)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.5)
            hint = f"Nearest: {', '.join(near)}. " if near else ""
            raise OptionError(
                f"unknown option {key!r} for backend 'turboquant'. {hint}Allowed: "
                f"{', '.join(OWN_KEYS)}, and any key of torch._inductor.config."
            )
    strict = options.pop("strict", False)
    if not isinstance(strict, bool):
        raise OptionError(f"option strict={strict!r} must be True or False")
    attention = _attention(options.pop("attention", "auto"))
    return CompilerOptions(attention, strict, {**_mode_patches(mode), **options})


def _mode_patches(mode: str | None) -> dict[str, Any]:
    modes = {"default": {}, **torch._inductor.list_mode_options()}
    if mode is not None and mode not in modes:
        raise OptionError(f"unknown mode {mode!r}. Allowed: {', '.join(modes)}.")
    return dict(modes[mode or "default"])


def _attention(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(PHASES, check_backend_name(value))
    for phase in value:
        if phase not in PHASES:
            raise OptionError(f"option attention has phase {phase!r}. Allowed: {', '.join(PHASES)}.")
    return {phase: check_backend_name(value.get(phase, "auto")) for phase in PHASES}
