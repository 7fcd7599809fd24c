"""When the tokens of a `generate` call came, and what its cache takes."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import Cache
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """A streamer for `generate` that notes when each step's tokens reach the host.

    Args:
        inner: a streamer to pass everything on to.

    Attributes:
        times: seconds; the prompt's first, then one per step.
    """

    def __init__(self, inner: BaseStreamer | None = None) -> None:
        self.inner = inner
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt `[B, n]`, then each step's tokens `[B]`."""
        self.times.append(time.perf_counter())
        if self.inner:
            self.inner.put(value)

    def end(self) -> None:
        """The last token has come."""
        if self.inner:
            self.inner.end()

    @property
    def first_token_s(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def steps_s(self) -> list[float]:
        """Seconds that each token after the first took."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]

    @property
    def median_step_s(self) -> float | None:
        """Median of `steps_s`, which a step with a compilation in it does not move; None without steps."""
        return statistics.median(self.steps_s) if self.steps_s else None


def cache_bytes(cache: Cache) -> int:
    """Bytes of the tensors that hold keys and values, of any of transformers' caches or ours."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(_bytes(getattr(layer, name, None)) for layer in cache.layers for name in names)


def _bytes(state: object) -> int:
    """Bytes of a tensor, or of the tensors that quanto or hqq made of one."""
    if isinstance(state, dict):
        return sum(map(_bytes, state.values()))
    if isinstance(state, tuple):
        return sum(map(_bytes, state))
    if hasattr(state, "__tensor_flatten__"):
        return sum(_bytes(getattr(state, name)) for name in state.__tensor_flatten__()[0])
    return state.untyped_storage().nbytes() if isinstance(state, torch.Tensor) else 0
