"""`TurboQuantCache`: the KV cache of a whole transformers model.

Full-attention layers are packed, sliding-window layers keep their window in 16 bits, linear-attention
layers are transformers' own. This file and `cache_layers` are the only ones that import transformers.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Sequence

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicSlidingWindowLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .cache_layers import AnnouncedLength, HybridLayer, SlidingLayer, TurboQuantLayer, UncompiledLayer
from .errors import UnsupportedModelError
from .format import KVFormat
from .layer_formats import exact_tokens, layer_formats
from .storage import check_dtype, check_room, whole_number

log = logging.getLogger("tq_inductor.cache")

# Their ALiBi is as long as the 2-D mask, which says nothing of empty slots.
BIASED_BY_TOKENS_HELD = ("bloom",)
SIXTEEN_BIT = {torch.float16: "fp16"}  # other dtypes keep skipped layers in bf16


def _head_dim(layer: PretrainedConfig) -> int | None:
    """Values per key of a layer, by its config (Gemma 4's layers differ); None if it has no attention."""
    if getattr(layer, "head_dim", None):
        return layer.head_dim
    heads = getattr(layer, "num_attention_heads", None)
    return layer.hidden_size // heads if heads else None


def _check_exact_tokens(formats: list[str], **given: int | None) -> None:
    lossless = all(KVFormat(name).is_lossless for name in formats)
    for name, count in given.items():
        if count is not None and whole_number(name, count, least=0) and lossless:
            raise ValueError(
                f"{name}={count}: a {formats[0]} cache keeps all tokens as they are. Leave it out."
            )


def _check_linear_crop(i: int, layer: LinearAttentionCacheLayerMixin, tokens_to_remove: int) -> None:
    if layer.record_past and tokens_to_remove <= 0:
        if not tokens_to_remove or not any(layer.is_recurrent_states_initialized.values()):
            return
        reason = "a recurrent state, which cannot go back"
    else:
        reason = "a state that goes back only by a negative number and after activate_past_recording()"
    raise RuntimeError(
        f"cannot crop {tokens_to_remove} tokens: layer {i} holds {reason}. Nothing was cropped."
    )


class TurboQuantCache(Cache):
    """A transformers cache that keeps keys and values in TurboQuant form.

    Args:
        config: the model's config (for a multimodal model that of the whole; its decoder is used).
        max_cache_len: tokens that fit, rounded up to a multiple of 16.
        kv_format: see `KVFormat`; `"bf16"` and `"fp16"` keep values as they are. A name for all layers, or
            a list with one for each (`tq-inductor calibrate` finds one), or `"auto"`: k4v4 where that is
            known to lose little, else k8v4; `layer_formats.safe_format` says when, the log why.
        skip_layers: indices of layers to keep in 16 bits (negative ones count from the end).
        sink_tokens, recent_tokens: how many of the first and of the last tokens packed layers keep as they
            came besides, which removes most of what packing costs in quality (docs/quality.md). By
            default a layer's format decides: 4 and 12 where keys or values have 4 bits, 4 and 28 at 3,
            4 and 60 where values have 2, 4 and 124 where keys do, none at 8 bits; 0 for none. A cache of
            fewer tokens keeps all of them.
        max_batch_size: rows of the batch, exactly so many. If given, buffers are allocated now and not at
            the first forward; best for CUDA graphs.
        device, dtype: of these buffers; default: CUDA if there is one, and the config's dtype.

    Raises:
        FormatError: a format or head dimension that cannot be stored.
        UnsupportedModelError: a config that is no decoder's.
        ValueError: bad lengths, layer indices or numbers of tokens or formats.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        max_cache_len: int,
        *,
        kv_format: str | Sequence[str] = "k4v4",
        skip_layers: Iterable[int] = (),
        sink_tokens: int | None = None,
        recent_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise UnsupportedModelError(f"{type(config).__name__} is no config: pass model.config")
        max_cache_len = whole_number("max_cache_len", max_cache_len, least=1)
        if max_batch_size is not None:
            max_batch_size = whole_number("max_batch_size", max_batch_size, least=1)
        if dtype is not None:
            check_dtype(dtype)
        decoder = config.get_text_config(decoder=True)
        if not hasattr(decoder, "num_hidden_layers"):
            raise UnsupportedModelError(
                f"{type(config).__name__} has no num_hidden_layers: pass the config of a decoder model"
            )
        try:
            layers = StaticCache(config=config, max_cache_len=max_cache_len).layers
        except KeyError as error:
            raise UnsupportedModelError(
                f"{decoder.model_type} has layers of a type for which transformers has no static cache: "
                f"{error}"
            ) from error
        head_dims = [_head_dim(layer) for layer in decoder.per_layer_config][: len(layers)]
        formats = layer_formats(kv_format, decoder, head_dims)
        _check_exact_tokens(formats, sink_tokens=sink_tokens, recent_tokens=recent_tokens)
        skipped = self._skipped(skip_layers, len(layers))
        sixteen_bit = SIXTEEN_BIT.get(dtype or getattr(decoder, "dtype", None) or torch.bfloat16, "bf16")
        # Multi-head latent attention caches latents, from which keys are made only after the cache.
        latent = getattr(decoder, "kv_lora_rank", None) is not None
        announced = AnnouncedLength()
        biased = decoder.model_type in BIASED_BY_TOKENS_HELD
        make_layer = UncompiledLayer if biased else TurboQuantLayer
        for i, layer in enumerate(layers):
            if type(layer) in (StaticLayer, LinearAttentionAndStaticFullAttentionLayer):
                name = sixteen_bit if latent or i in skipped else formats[i]
                of_layer = (max_cache_len, name, announced, *exact_tokens(name, sink_tokens, recent_tokens))
                if type(layer) is StaticLayer:
                    layers[i] = make_layer(*of_layer)
                else:
                    layers[i] = HybridLayer(*of_layer, number_of_states=layer.number_of_states)
            elif type(layer) is StaticSlidingWindowLayer:
                layers[i] = SlidingLayer(max_cache_len, layer.max_cache_len)
        super().__init__(layers=layers)
        self._packed = [layer for layer in layers if isinstance(layer, TurboQuantLayer)]
        if latent:
            reason = "multi-head latent attention caches latents"
            log.warning("all layers are kept in %s, not packed: %s", sixteen_bit, reason)
        elif len(self._packed) < len(layers):
            kinds = {type(layer).__name__ for layer in layers if layer not in self._packed}
            found = (len(self._packed), len(layers), kinds)
            level = logging.INFO if self._packed else logging.WARNING
            log.log(level, "%d of %d layers are packed; kept as transformers keeps them: %s", *found)
        if biased:
            reason = "its ALiBi is as long as the tokens held, so shapes change at every step"
            log.warning("%s runs this cache outside of compiled graphs: %s", decoder.model_type, reason)
        if max_batch_size is not None and not latent:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = dtype or getattr(decoder, "dtype", None) or torch.get_default_dtype()
            # Configs of multi-query models do not say by one name how many heads they cache.
            known = not getattr(decoder, "multi_query", False)
            for layer, sizes, head_dim in zip(layers, decoder.per_layer_config, head_dims, strict=False):
                if known and isinstance(layer, TurboQuantLayer | SlidingLayer):
                    heads = getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads
                    shape = (max_batch_size, heads, 0, head_dim or 0)
                    empty = torch.empty(shape, dtype=dtype, device=device)
                    layer.lazy_initialization(empty, empty)

    @staticmethod
    def _skipped(skip_layers: Iterable[int], num_layers: int) -> set[int]:
        skipped = set()
        for i in map(operator.index, skip_layers):
            if not -num_layers <= i < num_layers:
                raise ValueError(f"skip_layers has {i}, but the model has {num_layers} layers")
            skipped.add(i % num_layers)
        return skipped

    @property
    def is_compileable(self) -> bool:
        """False, see `TurboQuantLayer.is_compileable`, unless there are static layers that are not ours.

        These (of sparse attention with an indexer, and of a window beside a linear state) always return all
        slots. Where this is False, transformers leaves out the mask of a single query, which would then see
        empty ones.
        """
        return any(
            isinstance(layer, StaticLayer) and not isinstance(layer, SlidingLayer) for layer in self.layers
        )

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
        """Append to one layer; see `TurboQuantLayer.update`. Values are taken in the dtype of keys.

        Raises:
            CacheFullError: before any layer has taken any of the new tokens.
        """
        if value_states.dtype != key_states.dtype:  # under autocast, RoPE leaves keys in float32
            value_states = value_states.to(key_states.dtype)
        if layer_idx == 0:  # it may be another layer than a packed one, and would be written first
            self._check_room(key_states.shape[-2])
        returned = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._packed and self.layers[layer_idx] is self._packed[-1]:
            self._packed[-1].announced.kv_length = 0  # it was for this forward pass
        return returned

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As a layer's; before any layer runs, so it refuses tokens that packed layers have no room for."""
        self._check_room(query_length)
        return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[no-any-return]

    def _check_room(self, new_tokens: int) -> None:
        """Raise `CacheFullError` before any layer, of whichever kind, takes one of these tokens."""
        if self._packed and self._packed[0].is_initialized and not torch.compiler.is_compiling():
            check_room(self._packed[0].seq_length, new_tokens, self._packed[0].max_len)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative count, or (transformers < 5.18) the length to keep.

        Raises:
            RuntimeError: a layer cannot give them back; no layer has forgotten any.
        """
        for i, layer in enumerate(self.layers):
            if isinstance(layer, SlidingLayer):
                layer.tokens_to_crop(tokens_to_remove)
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                _check_linear_crop(i, layer, tokens_to_remove)
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times; in new memory."""
        rows = torch.arange(max(self.batch_size, 0))
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The batch becomes its rows `indices`, `[rows]` int64; in new memory."""
        indices = torch.as_tensor(indices)
        for layer in self.layers:
            # A linear state has no such method, but takes any number of rows in this one.
            getattr(layer, "batch_select_indices", layer.reorder_cache)(indices)

    def reset(self) -> None:
        """Forget all tokens; the memory of packed layers stays."""
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicSlidingWindowLayer:  # see activate_past_recording
                self.layers[i] = SlidingLayer(layer.sliding_window, layer.sliding_window)
        super().reset()

    @property
    def nbytes(self) -> int:
        """Bytes that hold keys and values, measured from the tensors' storage."""
        total = 0
        for layer in self.layers:
            states = []
            if not isinstance(layer, TurboQuantLayer):
                states = [getattr(layer, "keys", None), getattr(layer, "values", None)]
            elif layer.is_initialized:
                total += layer.nbytes
            for name in ("conv_states", "recurrent_states"):
                held = getattr(layer, name, None)
                states += held.values() if isinstance(held, dict) else [held]
            total += sum(x.untyped_storage().nbytes() for x in states if x is not None)
        return total
