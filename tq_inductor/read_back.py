"""A cache whose attention reads everything from packed bytes, a prompt's own tokens too.

A prompt read in one pass attends to raw keys and values, and shows nothing of what packing costs. With this
cache one pass shows what reading token by token would; the mean of keys is that of a prompt as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, PretrainedConfig

from .cache import TurboQuantCache
from .cache_layers import AnnouncedLength, TurboQuantLayer
from .format import KVFormat


class ReadBackLayer(TurboQuantLayer):
    """A packed layer for one pass; see above."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, Hkv, q, D]` to an empty layer; what its bytes decode to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.append(key_states, value_states)
        return self.read(key_states.shape[-2])


def packed_layers(config: PretrainedConfig, kv_format: str | Sequence[str]) -> dict[int, str]:
    """The layers that a `TurboQuantCache` would pack, and their formats."""
    layers = TurboQuantCache(config, 16, kv_format=kv_format).layers
    formats = {i: x.kv_format for i, x in enumerate(layers) if isinstance(x, TurboQuantLayer)}
    return {i: name for i, name in formats.items() if not KVFormat(name).is_lossless}


def cache_to_read_back(config: PretrainedConfig, max_len: int, formats: dict[int, str]) -> Cache:
    """A cache for one pass over `max_len` tokens: layers in `formats` are packed, the others exact."""
    cache = TurboQuantCache(config, max_len, kv_format="bf16")
    for i, name in formats.items():
        cache.layers[i] = ReadBackLayer(max_len, name, AnnouncedLength())
    return cache
