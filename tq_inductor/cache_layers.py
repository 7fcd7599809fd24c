"""The layers of a `TurboQuantCache`: packed ones for full attention, 16-bit ones for sliding windows.

A layer is right by itself, compiled or not: a packed layer's first chunk attends to the raw keys and
values, later ones to what the packed bytes decode to, and if they are long to their own as they came.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticSlidingWindowLayer,
)

from .format import KVFormat, round_up
from .storage import PackedStorage, known_length, note_length


@dataclass
class AnnouncedLength:
    """How many keys the mask of this forward pass was made for; shared by the layers of a cache."""

    kv_length: int = 0


class TurboQuantLayer(PackedStorage, CacheLayerMixin):
    """The packed keys and values of one full-attention layer.

    `fresh` is True until the first append: that chunk is its own whole context, so attention takes its
    raw keys and values (exact and plain prefill), and the length is the Python int 0.

    After that, attention gets all slots in a compiled graph, whose shapes must not change from step to
    step, and just the tokens held otherwise: uncompiled, transformers leaves a mask of one query out,
    and empty slots would be seen. Mask and keys may be made on different sides of a graph break, so
    `update` returns as many keys as `get_mask_sizes` announced.
    """

    # Not "compileable" in transformers' sense: that would make `generate` compile the model with
    # Inductor by itself, over the compiler that the user chose.
    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = True

    def __init__(
        self,
        max_cache_len: int,
        kv_format: str,
        announced: AnnouncedLength,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
    ) -> None:
        # Not CacheLayerMixin.__init__, which sets `keys` and `values`: here these are decoded on demand.
        self.max_len = round_up(max_cache_len)
        self.kv_format = kv_format
        self.exact_tokens = (sink_tokens, recent_tokens)
        self.announced = announced
        self.is_initialized = False
        self.fresh = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers for `[B, Hkv, any, D]` like these, on their device."""
        fmt = KVFormat(self.kv_format, key_states.shape[-1], value_states.shape[-1])
        batch_size, num_kv_heads = key_states.shape[:2]
        dtype, device = key_states.dtype, key_states.device
        self.allocate(fmt, batch_size, num_kv_heads, self.max_len, dtype, device, *self.exact_tokens)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, Hkv, q, D]`; what attention must see: the first chunk itself, later the cache.

        Raises:
            CacheFullError, CacheMismatchError: before anything is written.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.fresh:
            kv_length, announced = self._kv_length(key_states.shape[-2]), self.announced.kv_length
            if announced and (torch.compiler.is_compiling() or announced == self.max_len):
                kv_length = announced  # by the other side of a graph break, perhaps
            return self.append_and_read(key_states, value_states, kv_length)
        self.append(key_states, value_states)
        self.fresh = False
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the next `update` returns, position of the first)."""
        if self.fresh:
            self.announced.kv_length = 0
            return query_length, 0
        self.announced.kv_length = self._kv_length(query_length)
        return self.announced.kv_length, 0

    def _kv_length(self, new_tokens: int) -> int:
        """Keys that attention sees after appending: all slots if shapes must not change."""
        length = None if torch.compiler.is_compiling() else known_length(self.seq_length)
        return self.max_len if length is None else min(length + new_tokens, self.max_len)

    def get_seq_length(self) -> int:
        """Tokens held: 0, then a 0-d tensor (a Python int would recompile at every step)."""
        return 0 if self.fresh else self.seq_length  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.max_len

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the buffers exist."""
        return self.packed.shape[0] if self.is_initialized else -1

    @property
    def keys(self) -> torch.Tensor | None:
        """Decoded keys of the tokens held, `[B, Hkv, length, D]` (for models that read them directly)."""
        return self.read(int(self.seq_length))[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """Decoded values of the tokens held, `[B, Hkv, length, D]`."""
        return self.read(int(self.seq_length))[1] if self.is_initialized else None

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        if self.is_initialized:
            self.clear()
        self.fresh = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative count, or (transformers < 5.18) the length to keep."""
        length = 0 if self.fresh else known_length(self.seq_length) or 0
        removed = -tokens_to_remove if tokens_to_remove <= 0 else length - tokens_to_remove
        if removed <= 0:
            return
        if removed >= length:
            self.reset()
            return
        self.seq_length.sub_(removed)
        note_length(self.seq_length, length - removed)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of the batch become rows `beam_idx`, in place."""
        for _, buffer in self._rows_of_batch():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The batch becomes its rows `indices`, as many as they are; in new memory."""
        for name, buffer in self._rows_of_batch():
            setattr(self, name, buffer[indices.to(buffer.device)])

    def _rows_of_batch(self) -> list[tuple[str, torch.Tensor]]:
        """The buffers that exist and have a row for each row of the batch, by attribute."""
        names = ("packed", "k_mean", "exact") if self.is_initialized else ()
        return [(name, buffer) for name in names if (buffer := getattr(self, name)) is not None]

    def offload(self) -> None:
        """Not supported: the packed cache is small and its addresses are fixed."""
        raise NotImplementedError("a TurboQuantCache cannot be offloaded; it stays on its device")

    prefetch = offload

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kv_format}, max_len={self.max_len})"


class UncompiledLayer(TurboQuantLayer):
    """For models that add a bias as long as the tokens held: attention gets just these, compiled or not.

    Dynamo leaves its graph to call the cache, and the rest of the model stays compiled.
    """

    _REASON = "this model's bias is as long as the tokens held: a TurboQuantCache runs uncompiled in it"
    update = torch.compiler.disable(TurboQuantLayer.update, reason=_REASON)
    get_mask_sizes = torch.compiler.disable(TurboQuantLayer.get_mask_sizes, reason=_REASON)


class HybridLayer(LinearAttentionLayer, TurboQuantLayer):
    """Packed keys and values beside a linear state, which is transformers' own (Falcon-H1, Zamba2)."""

    is_compileable = False  # as TurboQuantLayer

    def __init__(
        self,
        max_cache_len: int,
        kv_format: str,
        announced: AnnouncedLength,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        *,
        number_of_states: int = 1,
    ) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        TurboQuantLayer.__init__(self, max_cache_len, kv_format, announced, sink_tokens, recent_tokens)

    def lazy_initialization(self, *keys_and_values: torch.Tensor, **states: torch.Tensor) -> None:
        """Make the buffers of keys and values (both positional), or of a linear state (by name)."""
        if keys_and_values:
            TurboQuantLayer.lazy_initialization(self, *keys_and_values)
        else:
            LinearAttentionLayer.lazy_initialization(self, **states)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        LinearAttentionLayer.reset(self)
        TurboQuantLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, which a linear state can if its past was recorded."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        TurboQuantLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of the batch become rows `beam_idx`."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        TurboQuantLayer.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The batch becomes its rows `indices`, as many as they are; in new memory."""
        LinearAttentionLayer.reorder_cache(self, indices)  # it takes any number of rows
        TurboQuantLayer.batch_select_indices(self, indices)

    offload = prefetch = TurboQuantLayer.offload
    __repr__ = TurboQuantLayer.__repr__


class SlidingLayer(StaticSlidingWindowLayer):
    """transformers' static sliding-window layer, with the batch operations of its dynamic one.

    Its shapes do not change from step to step. What left the window is gone, so it can be cropped
    only while the window is not full; for generation methods that take tokens back,
    `TurboQuantCache.activate_past_recording` puts a `rollback_layer` in its place.
    """

    is_compileable = False  # as TurboQuantLayer
    is_croppable = False
    keys: torch.Tensor
    values: torch.Tensor
    cumulative_length_int: int

    def rollback_layer(self) -> DynamicSlidingWindowLayer:
        """transformers' dynamic layer with the same contents, which can take tokens back."""
        layer = DynamicSlidingWindowLayer(sliding_window=self.max_cache_len)
        layer.record_past = True
        if self.is_initialized:
            held = min(self.cumulative_length_int, self.max_cache_len)
            first = 1 if held == self.max_cache_len else 0  # it holds one token less than the window
            layer.lazy_initialization(self.keys, self.values)
            layer.keys = self.keys[:, :, first:held].clone()
            layer.values = self.values[:, :, first:held].clone()
            layer.cumulative_length = self.cumulative_length_int
        return layer

    def tokens_to_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` would forget; RuntimeError if it cannot, since some left the window."""
        length = self.cumulative_length_int
        removed = -tokens_to_remove if tokens_to_remove <= 0 else length - tokens_to_remove
        if removed > 0 and length > self.max_cache_len:
            raise RuntimeError(
                f"cannot crop {removed} tokens: of {length} tokens this layer kept the last "
                f"{self.max_cache_len} only. Call activate_past_recording() before they are appended."
            )
        return min(max(removed, 0), length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative count, or (transformers < 5.18) the length to keep."""
        removed = self.tokens_to_crop(tokens_to_remove)
        if removed:
            self.cumulative_length_int -= removed
            self.cumulative_length.fill_(self.cumulative_length_int)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of the batch become rows `beam_idx`, in place."""
        if self.is_initialized:
            for state in (self.keys, self.values):
                state.copy_(state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The batch becomes its rows `indices`, as many as they are; in new memory."""
        if self.is_initialized:
            indices = indices.to(self.keys.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.batch_size = len(indices)
