"""`Limits`: what one kernel can do, a column of the capability matrix, and the reasons that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .call import AttentionCall

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
Capability = tuple[int, int]


@dataclass(frozen=True)
class HeadDims:
    """Sizes of a head: of queries and keys, and of values.

    Attributes:
        lowest, highest: the smallest and the largest size.
        multiple: of what a size has to be a multiple.
        only: the sizes that there are, if not all up to `highest`.
        pairs: sizes of (keys, values) that may differ.
        values_of_small_keys: the largest size of values beside keys of at most 64; 0: their own.
        any_pair: whether all sizes may be paired.
    """

    lowest: int = 8
    highest: int = 256
    multiple: int = 8
    only: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    values_of_small_keys: int = 0
    any_pair: bool = False

    def why_not(self, keys: int | None, values: int | None) -> list[str]:
        """Reasons against a pair of sizes."""
        if keys is None or values is None:
            return ["head_dim is not known at compile time"]
        small = keys <= 64 and keys % self.multiple == 0 and values % self.multiple == 0
        if (keys, values) in self.pairs or (small and keys < values <= self.values_of_small_keys):
            return []
        reasons = []
        if keys != values and not self.any_pair:
            also = "".join(f", or {pair}" for pair in self.pairs)
            reasons.append(f"head_dim={keys}, of values {values} (needs equal ones{also})")
        for size in dict.fromkeys((keys, values)):
            if self.only and size not in self.only:
                reasons.append(f"head_dim={size} (needs one of {', '.join(map(str, self.only))})")
            elif not self.only and (not self.lowest <= size <= self.highest or size % self.multiple):
                needs = f"a multiple of {self.multiple}, {self.lowest} to {self.highest}"
                reasons.append(f"head_dim={size} (needs {needs})")
        return reasons


@dataclass(frozen=True)
class Limits:
    """What a kernel takes beyond plain attention on a GPU without a mask, which all of them do.

    Attributes:
        lowest, highest: compute capabilities, both included; `only` lists them instead.
        rocm: the ROCm architectures.
        dtypes: of q, k, v and the result.
        head_dims: sizes of a head.
        alignment: how it aligns a causal mask or window of fewer queries than keys; "" if either way.
        window: whether it takes a number of keys back.
        window_ahead: whether it also takes a number of keys ahead other than none (causal).
        masks: the kinds of `attn_mask` that it takes.
        softcap, alibi, sinks, varlen: whether it takes these.
        page_multiple: of what pages of k and v have to be a multiple; None: it takes no pages.
        kv_bytes: formats of k and v other than `dtype`.
        dynamic: whether lengths may be unknown at compile time.
        single_key: whether there may be one key only.
        deterministic: whether it runs where deterministic algorithms are asked for.
    """

    lowest: Capability = (8, 0)
    highest: Capability = (12, 9)
    only: tuple[Capability, ...] = ()
    rocm: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = SIXTEEN_BITS
    head_dims: HeadDims = HeadDims()
    alignment: str = "bottom-right"
    window: bool = True
    window_ahead: bool = True
    masks: tuple[str, ...] = ()
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    varlen: bool = True
    page_multiple: int | None = None
    kv_bytes: tuple[str, ...] = ()
    dynamic: bool = True
    single_key: bool = True
    deterministic: bool = True

    def why_not(self, call: AttentionCall) -> list[str]:
        """Reasons, with values, why this kernel cannot run a call; empty if it can."""
        if call.device != "cuda":
            return [f"device {call.device} (needs cuda)"]
        reasons = [*call.obstacles, *self.why_not_on(call.capability, call.rocm)]
        if call.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            reasons.append(f"dtype {str(call.dtype).removeprefix('torch.')} (needs {names})")
        reasons += self.head_dims.why_not(call.head_dim, call.v_head_dim)
        reasons += [*self._against_sizes(call), *self._against_mask(call), *self._against_storage(call)]
        if call.dropout:
            reasons.append(f"dropout_p={call.dropout} (needs 0)")
        if call.needs_grad:
            reasons.append("a gradient is needed and this op has none (use torch.no_grad())")
        if call.deterministic and not self.deterministic:
            reasons.append("deterministic algorithms are asked for")
        if call.softcap is not None and not self.softcap:
            reasons.append(f"softcap={call.softcap}: it has none")
        if call.sinks and not self.sinks:
            reasons.append("attention sinks: it has none")
        return reasons

    def why_not_on(self, capability: Capability | None, rocm: str | None) -> list[str]:
        """Reasons against a GPU."""
        if rocm is not None:
            return [] if rocm in self.rocm else [f"architecture {rocm} (needs {self.architectures()})"]
        if capability is None:
            return ["the GPU's architecture is not known"]
        fits = capability in self.only if self.only else self.lowest <= capability <= self.highest
        name = "sm{}{}".format(*capability)
        return [] if fits else [f"architecture {name} (needs {self.architectures()})"]

    def architectures(self) -> str:
        """The GPUs in words."""
        if self.only:
            names = " or ".join("sm{}{}".format(*capability) for capability in self.only)
        else:
            names = "sm{}{} to sm{}{}".format(*self.lowest, *self.highest)
        return ", ".join([names, *self.rocm])

    def _against_sizes(self, call: AttentionCall) -> list[str]:
        reasons = []
        if 0 in (call.batch_size, call.q_len, call.kv_len):
            reasons.append("nothing to attend: a size is 0")
        if None in (call.batch_size, call.q_len, call.kv_len) and not self.dynamic:
            reasons.append("batch or lengths are not known at compile time")
        if call.kv_len == 1 and not self.single_key:
            reasons.append("kv_len=1 (needs at least 2)")
        return reasons

    def _against_mask(self, call: AttentionCall) -> list[str]:
        if call.mask != "none" and call.is_causal:
            return ["attn_mask together with is_causal=True"]
        if call.alibi and not self.alibi:
            return [] if call.mask in self.masks else ["ALiBi: it has none"]
        if not call.plain and not call.alibi:
            if call.mask == "none":
                return [f"is_causal=True with q_len={call.q_len}, kv_len={call.kv_len}, aligned top-left"]
            if call.padding and self.varlen and call.mask not in self.masks:
                return _against_ragged_rows(call)
            if call.mask not in self.masks:
                return [f"mask ({call.mask}: {call.visible}) is more than alignment and window"]
            return []
        reasons = []
        back, ahead = call.window
        if call.alignment not in ("", "equal", self.alignment) and self.alignment:
            reasons.append(
                f"mask aligned {call.alignment} with q_len={call.q_len}, kv_len={call.kv_len} "
                f"(aligns {self.alignment})"
            )
        if back is not None and not self.window:
            reasons.append(f"window of {back} keys back: it has none")
        if ahead and not (self.window and self.window_ahead):
            reasons.append(f"window of {ahead} keys ahead: it has none")
        if call.alignment == "bottom-right" and (call.q_len or 0) > (call.kv_len or 0) > 0:
            reasons.append(f"q_len={call.q_len} > kv_len={call.kv_len}: queries without a key")
        return reasons

    def _against_storage(self, call: AttentionCall) -> list[str]:
        reasons = []
        if call.kv_bytes and call.kv_bytes not in self.kv_bytes:
            takes = " or ".join(self.kv_bytes) or f"tensors of {str(call.dtype).removeprefix('torch.')}"
            reasons.append(f"keys and values are {call.kv_bytes} bytes (takes {takes})")
        if call.varlen and not self.varlen:
            reasons.append("ragged sequences (cu_seqlens): it takes none")
        if call.page_size is not None and self.page_multiple is None:
            reasons.append(f"pages of {call.page_size} tokens: it takes none")
        elif call.page_size is not None and call.page_size % (self.page_multiple or 1):
            reasons.append(f"pages of {call.page_size} tokens (needs multiples of {self.page_multiple})")
        return reasons


def _against_ragged_rows(call: AttentionCall) -> list[str]:
    """Reasons against a padded call as a ragged one, `varlen_attn`."""
    asked = {f"softcap={call.softcap}": call.softcap is not None, "attention sinks": call.sinks}
    return [
        f"{what} with padding: ragged sequences have none" for what, asked_for in asked.items() if asked_for
    ]
