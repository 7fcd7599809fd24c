"""What the flags of attention kernels can say of a mask: alignment, and a window around each query."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..attention.call import Window
from .mask_form import MaskForm, static_end

NOT_SAID: tuple[str, Window] = ("", (None, None))
UNKNOWN = -1


def aligned_window(form: MaskForm, q_len: Any, kv_len: Any) -> tuple[str, Window]:
    """`AttentionCall.alignment` and `.window` of a mask that they say exactly; else `NOT_SAID`."""
    if form == MaskForm():
        return "equal", (None, None)
    if not form.exact or form.keys is not None:
        return NOT_SAID
    lower, upper = (None if end is None else static_end(end) for end in (form.lower, form.upper))
    if any(
        end is not None and (found is None or found[0] != 1)
        for end, found in ((form.lower, lower), (form.upper, upper))
    ):
        return NOT_SAID
    equal = statically_known_true(q_len == kv_len)
    for alignment, place in (("equal" if equal else "bottom-right", kv_len - q_len), ("top-left", 0)):
        back = None if lower is None else _count(place - lower[1])
        ahead = None if upper is None else _count(upper[1] - 1 - place)
        if UNKNOWN not in (back, ahead):
            return alignment, (back, ahead)
    return NOT_SAID


def _count(keys: int | torch.SymInt) -> int:
    """A number of keys, if it is known at compile time and not negative; adds no guard."""
    if isinstance(keys, int):
        return max(keys, UNKNOWN)
    return 0 if statically_known_true(keys == 0) else UNKNOWN
