"""`PackedStorage`: the buffers of one layer's packed KV cache and their length; `PackedKVCache`.

The length lives on the device, so that a CUDA graph can advance it. The host keeps a mirror of it,
checked against the tensor's version counter: a full cache is an error before anything is written,
without a synchronisation per step. Where the host is not asked (a graph that another compiler made),
tokens that do not fit are dropped and the cache then reads as NaN.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import SupportsIndex

import torch
from torch import nn

from . import ops  # noqa: F401  (defines torch.ops.tq_inductor)
from .beside import DECODE_TOKENS, SEGMENT, Beside, Chunk
from .errors import CacheFullError, CacheMismatchError
from .format import KVFormat, round_up
from .rotation import rotation_matrix

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of keys and values


def whole_number(name: str, given: SupportsIndex, least: int) -> int:
    """An argument as an int, or ValueError."""
    try:
        number = operator.index(given)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name}={given!r} must be a whole number, at least {least}")
    return number


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless keys and values can have this dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be that of keys and values: give one of {DTYPES}")


def known_length(seq_length: torch.Tensor) -> int | None:
    """The value of a 0-d length tensor without a host sync where possible.

    Reads the device only after something other than this package changed the tensor. None while a
    CUDA graph is being captured, when a length cannot be read.
    """
    if not seq_length.is_cuda:
        return int(seq_length)
    if seq_length.is_inference():  # made in a graph that was compiled in inference mode: no versions
        return int(seq_length)
    version, length = getattr(seq_length, "_tq_known_length", (None, 0))
    if version != seq_length._version:
        if torch.cuda.is_current_stream_capturing():
            return None
        length = int(seq_length)
        note_length(seq_length, length)
    return length


def note_length(seq_length: torch.Tensor, length: int) -> None:
    """Record that the device now holds `length`, after a change that this package made."""
    if seq_length.is_cuda and not seq_length.is_inference():
        seq_length._tq_known_length = (seq_length._version, length)  # type: ignore[attr-defined]


def forget_length(seq_length: torch.Tensor) -> None:
    """Read the device next time: something unknown changed the length."""
    seq_length.__dict__.pop("_tq_known_length", None)


def check_room(seq_length: torch.Tensor, new_tokens: int, max_len: int) -> int | None:
    """The length after appending `new_tokens`; raises `CacheFullError` if they do not fit."""
    length = known_length(seq_length)
    if length is None:
        return None
    if length + new_tokens > max_len:
        raise CacheFullError(_full(length, new_tokens, max_len))
    return length + new_tokens


def _full(length: int, new_tokens: int, max_len: int) -> str:
    return (
        f"the KV cache is full: it holds {length} of at most {max_len} tokens and cannot take "
        f"{new_tokens} more. Nothing was written. Make a cache with a larger max_len (max_cache_len "
        f"for TurboQuantCache; at least {length + new_tokens} here), or call reset() or crop() first."
    )


class _NoBackward(torch.autograd.Function):
    """Identity on what a cache returns; an error instead of a silently missing gradient."""

    @staticmethod
    def forward(ctx, k, v, new_k, new_v):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        ctx.new_tokens = new_k.shape[2]
        return k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN205
        # An op, so that Dynamo can trace this and the error comes only if a backward really runs.
        refused = [torch.ops.tq_inductor.tq_refuse_backward(grad) for grad in grads]
        return None, None, *(grad[:, :, : ctx.new_tokens] for grad in refused)


class PackedStorage:
    """One layer's keys and values in packed form: allocate, append, read.

    Attributes:
        packed: uint8 `[batch_size, num_kv_heads, page_bytes]`, laid out as `format` says.
        seq_length: int64 `[]`, the tokens held, on the device.
        k_mean, exact, exact_from, sink_tokens: see `beside`; None and 0 for what is not kept.
    """

    packed: torch.Tensor
    seq_length: torch.Tensor
    k_rotation: torch.Tensor
    v_rotation: torch.Tensor
    k_mean: torch.Tensor | None
    exact: torch.Tensor | None
    exact_from: torch.Tensor | None
    sink_tokens: int
    format: KVFormat
    max_len: int
    dtype: torch.dtype

    def allocate(
        self, fmt: KVFormat, batch_size: int, num_kv_heads: int, max_len: int,
        dtype: torch.dtype, device: torch.device | str, sink_tokens: int = 0, recent_tokens: int = 0,
    ) -> None:  # fmt: skip
        """Make the buffers, empty. `dtype` is that of the keys and values taken and returned."""
        self.format, self.max_len, self.dtype = fmt, max_len, dtype
        self.k_mean = self.exact = self.exact_from = None
        self.sink_tokens = min(sink_tokens, max_len)
        exact_tokens = self.sink_tokens + min(recent_tokens, max_len - self.sink_tokens)
        page_bytes = round_up(max_len) * fmt.slot_bytes
        # Outside inference mode, since tensors made inside it have no version counter.
        with torch.inference_mode(False):
            self.packed = torch.zeros(
                (batch_size, num_kv_heads, page_bytes), dtype=torch.uint8, device=device
            )
            self.seq_length = torch.zeros((), dtype=torch.int64, device=device)
            self.k_rotation = rotation_matrix(fmt.head_dim, device)
            same = fmt.v_head_dim == fmt.head_dim
            self.v_rotation = self.k_rotation if same else rotation_matrix(fmt.v_head_dim, device)
            rows = (batch_size, num_kv_heads)
            if not fmt.is_lossless:
                means = (*rows, -(-max_len // SEGMENT), fmt.head_dim)
                self.k_mean = torch.zeros(means, dtype=dtype, device=device)
            if exact_tokens:
                shape = (*rows, exact_tokens, fmt.head_dim + fmt.v_head_dim)
                self.exact = torch.zeros(shape, dtype=dtype, device=device)
                self.exact_from = torch.zeros((), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling():  # CUDA graphs take them where they are
            buffers = (self.packed, self.seq_length, self.k_rotation, self.v_rotation, *self._beside[:3])
            for buffer in buffers:
                if buffer is not None:
                    torch._dynamo.mark_static_address(buffer)

    @property
    def _beside(self) -> Beside:
        return Beside(self.k_mean, self.exact, self.exact_from, self.sink_tokens)

    def check_fits(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raise `CacheMismatchError` unless k and v are `[B, Hkv, q, D]` as this storage takes them."""
        batch_size, num_kv_heads, _ = self.packed.shape
        for name, x, dim in (("k", k, self.format.head_dim), ("v", v, self.format.v_head_dim)):
            if x.dim() != 4 or list(x.shape) != [batch_size, num_kv_heads, k.shape[2], dim]:
                raise CacheMismatchError(
                    f"{name} has shape {list(x.shape)}, but this cache takes [batch_size={batch_size}, "
                    f"num_kv_heads={num_kv_heads}, new tokens (as many in k as in v), head_dim={dim}]. "
                    "Nothing was written. Make a new cache for another batch size or model."
                )
            if x.dtype != self.dtype:
                raise CacheMismatchError(
                    f"{name} is {x.dtype}, but this cache was made for {self.dtype}. Nothing was "
                    f"written. Cast {name}, or make the cache with dtype={x.dtype}."
                )
            if x.device != self.packed.device:
                raise CacheMismatchError(
                    f"{name} is on {x.device}, but this cache is on {self.packed.device}. Nothing was "
                    f"written. Move {name}, or make the cache with device='{x.device}'."
                )

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append `[B, Hkv, q, D]`; raises before anything is written if they do not fit."""
        self.check_fits(k, v)
        if torch.compiler.is_compiling():  # the compiler checks before each run of the graph
            length = None
            if k.shape[2] > self.max_len:
                raise CacheFullError(_full(0, k.shape[2], self.max_len))
        else:
            length = check_room(self.seq_length, k.shape[2], self.max_len)
        self.seq_length.add_(k.shape[2])
        if length is not None:
            note_length(self.seq_length, length)
        torch.ops.tq_inductor.tq_store(
            self.packed, k, v, self.seq_length, self.k_rotation, self.v_rotation, self.format.name,
            *self._beside,
        )  # fmt: skip

    def read(self, kv_length: int, own: Chunk | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `kv_length` keys and values, `[B, Hkv, kv_length, D]`; zero past those held.

        `own`: the last tokens as they came, to be returned instead of what their codes decode to.
        """
        given = {} if own is None else {"own_k": own[0], "own_v": own[1]}
        k, v = torch.ops.tq_inductor.tq_dequantize(
            self.packed, self.seq_length, self.k_rotation, self.v_rotation,
            self.format.name, kv_length, self.dtype, *self._beside, **given,
        )  # fmt: skip
        return k, v

    def append_and_read(
        self, k: torch.Tensor, v: torch.Tensor, kv_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`append`, then `read`; a backward through what it returns is an error.

        Of more than `DECODE_TOKENS` new tokens it returns k and v themselves, of others what is stored.
        """
        self.append(k, v)
        stays_raw = k.shape[2] > DECODE_TOKENS and not self.format.is_lossless
        needs_grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        own = (k.detach(), v.detach()) if needs_grad else (k, v)
        keys, values = self.read(kv_length, own if stays_raw else None)
        if needs_grad:
            keys, values = _NoBackward.apply(keys, values, k, v)
        return keys, values

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        for buffer in (self.seq_length, self.exact_from):
            if buffer is not None:
                buffer.zero_()
        if not torch.compiler.is_compiling():
            note_length(self.seq_length, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage that holds keys, values, scales, and what is kept beside them."""
        held = (self.packed, self.k_mean, self.exact)
        return sum(buffer.untyped_storage().nbytes() for buffer in held if buffer is not None)


class PackedKVCache(PackedStorage, nn.Module):
    """The packed KV cache of one attention layer, for hand-written models.

    In the model, `keys, values = cache.update(k, v)` and then ordinary
    `scaled_dot_product_attention(q, keys, values, attn_mask)`, with a mask over slots such as
    `torch.arange(max_len) < cache.seq_length`. Right by itself; under
    `torch.compile(backend="turboquant")` the packed bytes are read directly.

    Args:
        batch_size, num_kv_heads, head_dim: as in k `[batch_size, num_kv_heads, q, head_dim]`.
        max_len: tokens that fit.
        kv_format: see `KVFormat`.
        dtype: of the keys and values taken and returned.
        v_head_dim: head dimension of values; that of keys unless given.

    The module moves between devices with the model that it is part of; its dtypes stay, whatever the model
    is cast to.

    Raises:
        FormatError: a format or head dimension that cannot be stored.
        ValueError: sizes that are no whole numbers of at least 1, or a dtype that keys cannot have.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        max_len: int,
        *,
        kv_format: str = "k4v4",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        v_head_dim: int | None = None,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size, least=1)
        num_kv_heads = whole_number("num_kv_heads", num_kv_heads, least=1)
        head_dim = whole_number("head_dim", head_dim, least=1)
        max_len = whole_number("max_len", max_len, least=1)
        if v_head_dim is not None:
            v_head_dim = whole_number("v_head_dim", v_head_dim, least=1)
        fmt = KVFormat(kv_format, head_dim, v_head_dim or head_dim)
        check_dtype(dtype)
        super().__init__()
        for name in ("packed", "seq_length", "k_rotation", "v_rotation", "k_mean", "exact", "exact_from"):
            self.register_buffer(name, None, persistent=False)
        self.allocate(fmt, batch_size, num_kv_heads, max_len, dtype, device)

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k and v `[B, Hkv, q, D]`; all keys and values, `[B, Hkv, max_len, D]`.

        Slots past the length are zero; `seq_length` counts the new tokens already.

        Raises:
            CacheFullError: no room for q more tokens; nothing was written.
            CacheMismatchError: shapes, dtype or device do not fit; nothing was written.
        """
        return self.append_and_read(k, v, self.max_len)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedKVCache:
        # What `.half()` or `.to(dtype)` of a model rounds are its weights, not a rotation or the format.
        def moved(buffer: torch.Tensor) -> torch.Tensor:
            other = fn(buffer)
            return other if other.dtype == buffer.dtype else buffer.to(other.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{self.format.describe()}, max_len={self.max_len}, {self.nbytes} bytes"
