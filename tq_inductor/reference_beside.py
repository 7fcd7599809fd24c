"""What a store writes beside the packed bytes, in plain torch: part of the specification in `reference`."""

from __future__ import annotations

import torch

from .beside import LEAST_MEAN_TOKENS, MEAN_TOKENS, Beside


def take_mean(k_mean: torch.Tensor, k: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Set the mean of rows that k `[B, Hkv, q, D]` starts, if it has enough tokens.

    A value that is not finite counts as 0: it must not reach the other tokens.
    """
    new = k.shape[2]
    if new < LEAST_MEAN_TOKENS:
        return
    first = k[:, :, :MEAN_TOKENS].to(torch.float32)
    mean = torch.where(first.isfinite(), first, 0.0).mean(2).to(k_mean.dtype)
    k_mean.copy_(torch.where((seq_lens == new).expand(len(k))[:, None, None], mean, k_mean))


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
