"""`TurboQuantCache`: the KV cache of a whole transformers model. The only file that imports transformers.

Full-attention layers are packed, sliding-window layers keep their window in 16 bits, linear-attention
layers are transformers' own. A cache is right by itself, compiled or not: a packed layer's first chunk
attends to the raw keys and values, later ones to what the packed bytes decode to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .errors import UnsupportedModelError
from .format import KVFormat, round_up
from .storage import PackedStorage, check_room, known_length, note_length

log = logging.getLogger("tq_inductor.cache")

SIXTEEN_BIT = {torch.float16: "fp16"}  # other dtypes keep skipped layers in bf16


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

    def __init__(self, max_cache_len: int, kv_format: str, announced: AnnouncedLength) -> None:
        # Not CacheLayerMixin.__init__, which sets `keys` and `values`: here these are decoded on demand.
        self.max_len = round_up(max_cache_len)
        self.kv_format = kv_format
        self.announced = announced
        self.is_initialized = False
        self.fresh = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers for `[B, Hkv, any, D]` like these, on their device."""
        fmt = KVFormat(self.kv_format, key_states.shape[-1], value_states.shape[-1])
        batch_size, num_kv_heads = key_states.shape[:2]
        self.allocate(fmt, batch_size, num_kv_heads, self.max_len, key_states.dtype, key_states.device)
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
        if self.is_initialized:
            self.packed.copy_(self.packed.index_select(0, beam_idx.to(self.packed.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times; in new memory."""
        if self.is_initialized:
            self.packed = self.packed.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only rows `indices` of the batch; in new memory."""
        if self.is_initialized:
            self.packed = self.packed[indices.to(self.packed.device)]

    def offload(self) -> None:
        """Not supported: the packed cache is small and its addresses are fixed."""
        raise NotImplementedError("a TurboQuantCache cannot be offloaded; it stays on its device")

    prefetch = offload

    def __repr__(self) -> str:
        return f"TurboQuantLayer({self.kv_format}, max_len={self.max_len})"


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

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative count, or (transformers < 5.18) the length to keep."""
        length = self.cumulative_length_int
        removed = -tokens_to_remove if tokens_to_remove <= 0 else length - tokens_to_remove
        if removed <= 0:
            return
        if length > self.max_cache_len:
            raise RuntimeError(
                f"cannot crop {removed} tokens: of {length} tokens this layer kept the last "
                f"{self.max_cache_len} only. Call activate_past_recording() before they are appended."
            )
        self.cumulative_length_int = max(length - removed, 0)
        self.cumulative_length.fill_(self.cumulative_length_int)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of the batch become rows `beam_idx`, in place."""
        if self.is_initialized:
            for state in (self.keys, self.values):
                state.copy_(state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times; in new memory."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, 0)
            self.values = self.values.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only rows `indices` of the batch; in new memory."""
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


class TurboQuantCache(Cache):
    """A transformers cache that keeps keys and values in TurboQuant form.

    Args:
        config: the model's config (for a multimodal model that of the whole; its decoder is used).
        max_cache_len: tokens that fit, rounded up to a multiple of 16.
        kv_format: see `KVFormat`; `"bf16"` and `"fp16"` keep values as they are.
        skip_layers: indices of layers to keep in 16 bits (negative ones count from the end).
        max_batch_size: if given, buffers are allocated now and not at the first forward; best for
            CUDA graphs.
        device, dtype: of these buffers; default: CUDA if there is one, and the config's dtype.

    Raises:
        FormatError: a format or head dimension that cannot be stored.
        UnsupportedModelError: a config that is no decoder's.
        ValueError: bad lengths or layer indices.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        max_cache_len: int,
        *,
        kv_format: str = "k4v4",
        skip_layers: Iterable[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len={max_cache_len} must be at least 1")
        decoder = config.get_text_config(decoder=True)
        if not hasattr(decoder, "num_hidden_layers"):
            raise UnsupportedModelError(
                f"{type(config).__name__} has no num_hidden_layers: pass the config of a decoder model"
            )
        head_dim = getattr(decoder, "head_dim", None)
        if not head_dim and getattr(decoder, "num_attention_heads", None):
            head_dim = decoder.hidden_size // decoder.num_attention_heads
        kv_format = KVFormat(kv_format, head_dim or 128).name  # refuses here what cannot be stored
        layers = StaticCache(config=config, max_cache_len=max_cache_len).layers
        skipped = self._skipped(skip_layers, len(layers))
        sixteen_bit = SIXTEEN_BIT.get(dtype or getattr(decoder, "dtype", None) or torch.bfloat16, "bf16")
        # Multi-head latent attention caches latents, from which keys are made only after the cache.
        latent = getattr(decoder, "kv_lora_rank", None) is not None
        announced = AnnouncedLength()
        for i, layer in enumerate(layers):
            if type(layer) is StaticLayer:
                kept = latent or i in skipped
                name = sixteen_bit if kept else kv_format
                layers[i] = TurboQuantLayer(max_cache_len, name, announced)
            elif type(layer) is StaticSlidingWindowLayer:
                layers[i] = SlidingLayer(max_cache_len, layer.max_cache_len)
        super().__init__(layers=layers)
        self._packed = [layer for layer in layers if isinstance(layer, TurboQuantLayer)]
        if latent:
            reason = "multi-head latent attention caches latents"
            log.warning("all layers are kept in %s, not %s: %s", sixteen_bit, kv_format, reason)
        elif len(self._packed) < len(layers):
            kinds = {type(layer).__name__ for layer in layers if layer not in self._packed}
            counts = (len(self._packed), len(layers))
            log.info("%d of %d layers are packed; kept as transformers keeps them: %s", *counts, kinds)
        if max_batch_size is not None and not latent:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = dtype or getattr(decoder, "dtype", None) or torch.get_default_dtype()
            num_kv_heads = getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
            shape = (max_batch_size, num_kv_heads, 0, head_dim or 0)
            empty = torch.empty(shape, dtype=dtype, device=device)
            for layer in (x for x in layers if isinstance(x, TurboQuantLayer | SlidingLayer)):
                layer.lazy_initialization(empty, empty)

    @staticmethod
    def _skipped(skip_layers: Iterable[int], num_layers: int) -> set[int]:
        skipped = set()
        for i in skip_layers:
            if not -num_layers <= i < num_layers:
                raise ValueError(f"skip_layers has {i}, but the model has {num_layers} layers")
            skipped.add(i % num_layers)
        return skipped

    @property
    def is_compileable(self) -> bool:
        """False, whatever the layers: see `TurboQuantLayer.is_compileable`."""
        return False

    def activate_past_recording(self) -> None:
        """Make it possible to take tokens back (assisted and prompt-lookup decoding)."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, SlidingLayer):
                self.layers[i] = layer.rollback_layer()
        super().activate_past_recording()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to one layer; see `TurboQuantLayer.update`.

        Raises:
            CacheFullError: before any layer has taken any of the new tokens.
        """
        if layer_idx == 0 and self._packed and not torch.compiler.is_compiling():
            first = self._packed[0]
            if first is not self.layers[0] and first.is_initialized:  # layer 0 would be written first
                check_room(first.seq_length, key_states.shape[-2], first.max_len)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes that hold keys and values, measured from the tensors' storage."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, TurboQuantLayer):
                total += layer.nbytes if layer.is_initialized else 0
            else:
                states = [getattr(layer, "keys", None), getattr(layer, "values", None)]
                for name in ("conv_states", "recurrent_states"):
                    held = getattr(layer, name, None)
                    states += held.values() if isinstance(held, dict) else [held]
                total += sum(x.untyped_storage().nbytes() for x in states if x is not None)
        return total
