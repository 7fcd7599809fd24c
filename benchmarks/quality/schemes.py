"""A scheme: codes for keys and values, and what is done around them.

Everything around a code is a change of frame that attention can undo exactly: a vector x is coded as
(x - shift) A and read back as (decoded) A^-1 + shift. With an exact code nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tq_inductor import PackedKVCache
from tq_inductor.beside import DECODE_TOKENS, SEGMENT
from tq_inductor.layer_formats import exact_tokens

from .codes import CODES, Code

FIRST_CHUNK = 128  # tokens that means are taken from and that prefill sees unquantised
RIDGE = 1e-3  # of the mean variance, added to second moments before they are inverted


@dataclass(frozen=True)
class Scheme:
    """How a cache keeps its keys and values.

    Attributes:
        name: for tables.
        k, v: names of codes (`quality.codes.CODES`).
        k_shift: what is subtracted from keys: "" nothing; "mean" the first chunk's mean after RoPE;
            "bias" k_proj's bias, turned by RoPE to each position; "bias+mean" both; "pre" the first
            chunk's mean before RoPE, turned to each position.
        v_mean: subtract the first chunk's mean from values.
        k_balance, v_balance: "" none; "channels" a factor per channel; "pairs" one per RoPE pair, which
            commutes with RoPE, so that it can be multiplied into q_proj and k_proj; "weights" the same
            from the weights alone; "powers" the nearest powers of two, as `balance_keys` takes them; "full"
            a matrix per KV head. For values every kind, for keys all but "channels" and "full", can be
            folded into the model's weights and costs nothing at run time.
        sinks, recent: tokens at the beginning and at the end that every query sees in 16 bits.
        ends: first and last layers that keep keys and values in 8 bits.
        cache: the format of a real cache of the package, which then takes the place of codes and shift.
        policy: such a format for each layer instead, with as many exact tokens as it has by default.
    """

    name: str
    k: str
    v: str
    k_shift: str = ""
    v_mean: bool = False
    k_balance: str = ""
    v_balance: str = ""
    sinks: int = 0
    recent: int = 0
    ends: int = 0
    cache: str = ""
    policy: tuple[str, ...] = ()

    def in_layer(self, layer: int, layers: int) -> Scheme:
        """The scheme of one of `layers` layers."""
        if self.policy:
            name = self.policy[layer]
            sinks, recent = exact_tokens(name, None, None)
            return replace(self, k=name[1], v=name[3], sinks=sinks, recent=recent, cache=name, policy=())
        end = min(layer, layers - 1 - layer) < self.ends
        return replace(self, k="8", v="8") if end else self

    def bytes_per_token(self, head_dim: int, layers: int) -> float:
        """Bytes per token and KV head, mean over layers; sinks, window and frames do not grow with it."""
        used = [self.in_layer(i, layers) for i in range(layers)]
        means = 2 * head_dim / SEGMENT if used[0].cache else 0
        codes = sum(CODES[s.k].bytes_of(head_dim) + CODES[s.v].bytes_of(head_dim) for s in used)
        return codes / layers + means


def in_frame(
    x: torch.Tensor, code: Code, shift: torch.Tensor, balance: torch.Tensor | None
) -> torch.Tensor:
    """What is read back of x `[..., H, L, D]`: coded less `shift`, in the frame `balance` `[H, D, D]`."""
    y = x - shift
    if balance is not None:
        y = y @ balance
    y = code.round_trip(y)
    if balance is not None:
        y = y @ torch.linalg.inv(balance)
    return y + shift


def through_cache(
    name: str, k: torch.Tensor, v: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the package's cache of format `name` gives back of k and v `[B, H, L, D]` from its packed bytes.

    It takes `chunk` tokens first, as a prompt, and the others as decoding brings them. Everything is read
    from the packed bytes: what `update` returns may hold a chunk's own tokens as they came.
    """
    batch, heads, length, dim = k.shape
    cache = PackedKVCache(batch, heads, dim, length, kv_format=name, dtype=torch.float32, device="cpu")
    cache.append(k[:, :, :chunk], v[:, :, :chunk])
    for start in range(chunk, length, DECODE_TOKENS):  # of so many codes are those of one after the other
        part = slice(start, start + DECODE_TOKENS)
        cache.append(k[:, :, part], v[:, :, part])
    return cache.read(length)


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of x `[..., L, D]` at `positions` `[L]`; undone by negative positions."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.cat([positions.double()[:, None] * frequencies] * 2, -1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def key_shift(kind: str, k: torch.Tensor, bias: torch.Tensor | None, theta: float) -> torch.Tensor:
    """The shift of keys k `[..., H, L, D]` at positions 0..L-1; see `Scheme.k_shift`.

    Args:
        bias: k_proj's bias `[H, D]`, if the model has one.
    """
    positions = torch.arange(k.shape[-2])
    shift = torch.zeros_like(k)
    if "bias" in kind and bias is not None:
        shift = rope(bias[:, None].expand_as(k), positions, theta)
    if kind == "pre":
        mean = rope(k, -positions, theta)[..., :FIRST_CHUNK, :].mean(-2, keepdim=True)
        shift = rope(mean.expand_as(k), positions, theta)
    if "mean" in kind:
        shift = shift + (k - shift)[..., :FIRST_CHUNK, :].mean(-2, keepdim=True)
    return shift


def value_shift(v: torch.Tensor) -> torch.Tensor:
    """The first chunk's mean of values `[..., H, L, D]`."""
    return v[..., :FIRST_CHUNK, :].mean(-2, keepdim=True)


def balance_matrix(kind: str, readers: torch.Tensor, stored: torch.Tensor) -> torch.Tensor | None:
    """The frame A `[H, D, D]` in which a code's error costs least.

    With error variance e in every coordinate of a coded vector, proportional to its length, the cost is
    tr(Q A^-T A^-1) tr(A^T K A). It is least where A A^T is the geometric mean of Q and K^-1; with A
    diagonal, where A^2 is the ratio of the roots of their diagonals (SmoothAttention of QServe, MLSys
    2025, measured on queries; the full form is close to OSCAR, arXiv 2605.17757).

    Args:
        kind: "", "channels", "pairs", "powers" or "full".
        readers: Q `[H, D, D]`, second moment of what multiplies the vectors (queries, or W_o's rows).
        stored: K `[H, D, D]`, second moment of the vectors after their shift.
    """
    if not kind:
        return None
    readers, stored = (_regular(m.double()) for m in (readers, stored))
    if kind != "full":
        diagonals = [m.diagonal(dim1=-2, dim2=-1) for m in (readers, stored)]
        if kind != "channels":
            diagonals = [m.unflatten(-1, (2, -1)).mean(-2).repeat(1, 2) for m in diagonals]
        exponents = (diagonals[0] / diagonals[1]).log2() / 4
        return torch.diag_embed((exponents.round() if kind == "powers" else exponents).exp2()).float()
    root = _power(stored, 0.5)
    inverse_root = _power(stored, -0.5)
    mean = inverse_root @ _power(root @ readers @ root, 0.5) @ inverse_root
    return _power(mean, 0.5).float()


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, L, D]` -> mean of x^T x over batch and tokens, `[H, D, D]`."""
    return torch.einsum("bhld,bhle->hde", x, x) / (x.shape[0] * x.shape[2])


def _regular(m: torch.Tensor) -> torch.Tensor:
    ridge = RIDGE * m.diagonal(dim1=-2, dim2=-1).mean(-1)
    return m + ridge[..., None, None] * torch.eye(m.shape[-1], dtype=m.dtype)


def _power(m: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((m + m.mT) / 2)
    return vectors * values.clamp(min=1e-30).pow(exponent)[..., None, :] @ vectors.mT
