"""From what the passes found about a call to the `AttentionCall` on which the choice depends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..attention.call import MAX_DECODE_QUERIES, AttentionCall
from ..attention.machine import rocm_architecture
from .aligned_window import NOT_SAID, aligned_window
from .find_calls import SDPANode, static_size, value_of
from .kv_source import COMPUTED_HERE, PackedSource, origin_of
from .mask_form import MaskForm, is_plain_causal, name_of, static_end
from .ragged_padding import padding_beside
from .visibility import Visibility
from .writes import Writes


@dataclass(frozen=True)
class Found:
    """An attention call and what the passes found out about it."""

    sdpa: SDPANode
    key: fx.Node  # heads not repeated
    value: fx.Node
    source: PackedSource | None
    form: MaskForm | None  # None: not looked at, for its dimensions or what it is inside of


def operands(sdpa: SDPANode) -> list[fx.Node]:
    """Query, key, value and the mask, if there is one."""
    mask = [] if sdpa.attn_mask is None else [sdpa.attn_mask]
    return [sdpa.query, sdpa.key, sdpa.value, *mask]


def has_four_dimensions(sdpa: SDPANode) -> bool:
    """Whether q, k and v are `[B, H, n, D]` and a mask broadcasts to `[B, H, q, L]`."""
    dims = [value_of(node).dim() for node in operands(sdpa)]
    return dims[:3] == [4, 4, 4] and all(d <= 4 for d in dims)


def is_transformed(sdpa: SDPANode) -> bool:
    """Whether the call is inside `torch.func.vmap`, `grad` or `jvp`, where tensors stand for others."""
    values = [value_of(node) for node in (*operands(sdpa), sdpa.node)]
    return any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in values)


def describe(found: Found, visibility: Visibility, writes: Writes) -> AttentionCall:
    """The facts of a call."""
    sdpa, form, source = found.sdpa, found.form, found.source
    q, k, v, out = (value_of(n) for n in (sdpa.query, found.key, found.value, sdpa.node))
    mask = value_of(sdpa.attn_mask)
    kv_source = _source_name(found, writes)
    cuda = q.device.type == "cuda" and torch.version.cuda
    alignment, window = aligned_window(form, q.shape[-2], k.shape[-2]) if form else NOT_SAID
    return AttentionCall(
        batch_size=static_size(q, -4),
        q_len=static_size(q, -2),
        kv_len=static_size(k, -2),
        num_heads=static_size(q, -3),
        num_kv_heads=static_size(k, -3),
        head_dim=static_size(q, -1),
        v_head_dim=static_size(v, -1),
        dtype=out.dtype,
        device=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if cuda else None,
        rocm=rocm_architecture(q.device) if q.device.type == "cuda" else None,
        mask="none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        visible=_words(found),
        bounded=form is not None and _is_bounded(found, form) and visibility.can_build(sdpa, form),
        interval=form is not None and _is_interval(found, form) and visibility.can_build(sdpa, form),
        bits=form is not None and visibility.packs(sdpa, form),
        is_causal=sdpa.is_causal is not False,
        alignment=alignment,
        padding=padding_beside(form, q, k) if form and visibility.can_build(sdpa, form) else "",
        window=window,
        dropout=sdpa.dropout_p,
        sinks=sdpa.sinks is not None,
        softcap=sdpa.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        needs_grad=out.requires_grad,  # of q, k, v, a mask or sinks, where gradients are enabled
        kv_format=source.kv_format if source else None,
        kv_source=kv_source,
        cached=kv_source != COMPUTED_HERE,
        obstacles=tuple(_obstacles(found)),
        packed_obstacles=tuple(_packed_obstacles(found)),
    )


def _obstacles(found: Found) -> list[str]:
    """What stands against replacing the call by anything."""
    sdpa = found.sdpa
    q, k, v, out = (value_of(n) for n in (sdpa.query, found.key, found.value, sdpa.node))
    reasons = []
    if is_transformed(sdpa):
        reasons.append("inside torch.func.vmap, grad or jvp")
    elif found.form is None:
        dims = ", ".join(str(value_of(n).dim()) for n in operands(sdpa))
        reasons.append(f"q, k, v and a mask have {dims} dimensions (needs 4, of a mask at most 4)")
    elif any(not statically_known_true(a == b) for a, b in _sizes(q, k, v)):
        reasons.append(f"q, k and v broadcast: {_shape(q)}, {_shape(k)}, {_shape(v)}")
    if sdpa.restricted:
        reasons.append(f"inside torch.nn.attention.sdpa_kernel({sdpa.restricted})")
    if not isinstance(sdpa.scale, int | float | None):
        reasons.append("scale is not known at compile time")
    if not isinstance(sdpa.is_causal, bool):
        reasons.append("is_causal is not known at compile time")
    if not isinstance(sdpa.dropout_p, int | float):
        reasons.append("dropout_p is not known at compile time")
    if not q.dtype == k.dtype == v.dtype == out.dtype:
        reasons.append(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, the result {out.dtype} (autocast?)")
    return reasons


def _sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[tuple[Any, Any]]:
    """Pairs of sizes that must be equal, and of remainders that must be 0, where SDPA would broadcast."""
    pairs = [(x.shape[0], q.shape[0]) for x in (k, v)]
    return [*pairs, (q.shape[1] % k.shape[1], 0), (k.shape[1], v.shape[1])]


def _shape(x: torch.Tensor) -> str:
    return str([s if isinstance(s, int) else "?" for s in x.shape])


def _packed_obstacles(found: Found) -> list[str]:
    source = found.source
    if source is None:
        return []
    q = value_of(found.sdpa.query)
    reasons = list(source.obstacles)
    if q.dtype != source.dtype:
        reasons.append(f"q is {q.dtype}, the cache gives {source.dtype}")
    return reasons


def _words(found: Found) -> str:
    """The mask in words."""
    sdpa = found.sdpa
    q, k = value_of(sdpa.query), value_of(found.key)
    if sdpa.attn_mask is None and sdpa.is_causal is False:
        return "none"
    if found.form is None:
        return "none" if sdpa.attn_mask is None else "dense"
    words = name_of(found.form, sdpa.attn_mask, q.shape[-2], k.shape[-2])
    return "none (hides nothing)" if words == "none" else words


def _is_bounded(found: Found, form: MaskForm) -> bool:
    """Whether the mask may leave keys at either end that no query sees: known on the device only."""
    q_len, kv_len = (value_of(n).shape[-2] for n in (found.sdpa.query, found.key))
    if form.soft:
        return False
    if form.upper is not None:
        end = static_end(form.upper)
        if end is None or not statically_known_true(end[0] * (q_len - 1) + end[1] >= kv_len):
            return True
    if form.lower is not None:
        end = static_end(form.lower)
        if end is None or statically_known_true(end[1] > 0):
            return True
    if statically_known_true(q_len == kv_len) or form.bias:
        return False
    few = isinstance(q_len, int) and q_len <= MAX_DECODE_QUERIES
    scanned = bool(form.rest) and value_of(found.sdpa.attn_mask).dtype == torch.bool
    return scanned or (few and bool(form.keys is not None or form.rest))


def _is_interval(found: Found, form: MaskForm) -> bool:
    """Whether interval and keys are all of the mask, and SDPA has no flag that says it."""
    q_len, kv_len = (value_of(n).shape[-2] for n in (found.sdpa.query, found.key))
    return form.exact and form != MaskForm() and not is_plain_causal(form, q_len, kv_len)


def _source_name(found: Found, writes: Writes) -> str:
    source = found.source
    if source:
        return f"a packed cache, {source.kv_format}, max_len={value_of(source.max_len)}"
    return origin_of(found.key, found.sdpa, writes)
