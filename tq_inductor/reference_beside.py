"""What a store writes beside the packed bytes, in plain torch: part of the specification in `reference`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .beside import DECODE_TOKENS, LEAST_MEAN_TOKENS, MEAN_SAMPLES, SEGMENT, STRIDE, Beside


def take_means(
    k_mean: torch.Tensor,
    k: torch.Tensor,
    seq_lens: torch.Tensor,
    decoded: Callable[[int, torch.Tensor], torch.Tensor],
) -> None:
    """Set the means of the segments that k `[B, Hkv, q, D]` starts, as `beside` says.

    A value that is not finite counts as 0: it must not reach the other tokens.

    Args:
        decoded: what the stored keys of a row at positions `[n]` decode to, without their mean,
            `[Hkv, n, D]`; those without a page are left out.
    """
    batch, _, new, _ = k.shape
    for row, length in enumerate(seq_lens.expand(batch).tolist()):
        start = length - new
        for segment in range(-(-max(start, 0) // SEGMENT), min(-(-length // SEGMENT), k_mean.shape[2])):
            first = segment * SEGMENT - start
            keys = k[row, :, first : first + SEGMENT]
            mean = k_mean[row, :, segment - 1].float() if segment else torch.zeros_like(keys[:, 0]).float()
            if new > DECODE_TOKENS and keys.shape[1] >= LEAST_MEAN_TOKENS:
                mean = _mean(keys[:, :: max(keys.shape[1] // MEAN_SAMPLES, 1)][:, :MEAN_SAMPLES].float())
            elif new <= DECODE_TOKENS and segment:
                stored = torch.arange(0, SEGMENT - DECODE_TOKENS, STRIDE) + (segment - 1) * SEGMENT
                mean = mean + _mean(decoded(row, stored))
            k_mean[row, :, segment] = mean.to(k_mean.dtype)


def _mean(keys: torch.Tensor) -> torch.Tensor:
    return torch.where(keys.isfinite(), keys, 0.0).sum(1) / max(keys.shape[1], 1)


def copy_exact(
    beside: Beside,
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    new: int,
) -> None:
    """Copy those of the tokens `[n, Hkv, D]` that are now exact; `new` are appended in all."""
    assert beside.exact is not None
    assert beside.exact_from is not None
    exact_from, oldest = beside.exact_from, seq_lens - beside.recent_tokens
    exact_from.copy_(torch.maximum(torch.minimum(exact_from, seq_lens - new), oldest))
    kept = (positions < beside.sink_tokens) | (positions >= oldest.expand(len(beside.exact))[rows])
    slots = exact_slots(beside, positions[kept])
    beside.exact[rows[kept], :, slots] = torch.cat((new_k, new_v), -1)[kept].to(beside.exact.dtype)


def exact_slots(beside: Beside, positions: torch.Tensor) -> torch.Tensor:
    """The slots of these positions."""
    sinks = beside.sink_tokens
    recent = sinks + (positions - sinks) % max(beside.recent_tokens, 1)
    return torch.where(positions < sinks, positions, recent)
