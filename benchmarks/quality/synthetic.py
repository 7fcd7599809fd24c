"""Attention over synthetic keys: one query, 4096 keys, a few channels with a large mean, RoPE.

The reference (quality-and-peers, section 4) gives figures and names of its key sets but not every
number behind them. The ones here were chosen to give those figures: channels of queries and keys have
log-normal scales (sigma 0.5), RoPE's base is 1e6, and the means sit before RoPE in 4 of the slowest
pairs, which hardly turn. Two are ours: "half a turn", the same means in pairs that turn by about half
within the text, where the mean of the first keys is wrong further on; and "turning", in channels of any
speed, where a mean taken after RoPE is of little use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tq_inductor.beside import MEAN_SAMPLES, SEGMENT

from .codes import CODES
from .metrics import kl_divergence
from .schemes import Scheme, balance_matrix, in_frame, key_shift, rope, second_moment, through_cache

HEAD_DIM = 128
TOKENS = 4096
QUERIES = 64
CALIBRATION_QUERIES = 1024  # of the second draw: fewer than a few times D make a poor matrix
HEADS = 8  # independent draws of scales, channels, queries and keys
CHANNEL_SIGMA = 0.5
MEAN_CHANNELS = 4
THETA = 1e6


@dataclass(frozen=True)
class Kind:
    """A set of synthetic keys: the mean of `MEAN_CHANNELS` channels, from `first` on; None: any."""

    name: str
    mean: float
    first: int | None = HEAD_DIM // 2 - MEAN_CHANNELS  # the slowest RoPE pairs


KINDS = (
    Kind("mild", 0.0),
    Kind("mean 8", 8.0),
    Kind("Qwen-like", 40.0),
    Kind("half a turn", 40.0, first=31),  # of pairs 31 to 34: by 1.6 to 0.8 pi
    Kind("turning", 40.0, first=None),
)


@dataclass(frozen=True)
class Draw:
    """Queries `[1, H, QUERIES, D]` at the last position; keys and values `[1, H, L, D]`; the bias `[H, D]`.

    `other_q` `[1, H, CALIBRATION_QUERIES, D]` and `other_k` are a second draw with the same scales and
    bias, to calibrate on.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor
    other_q: torch.Tensor
    other_k: torch.Tensor


def draw(kind: Kind, seed: int = 0) -> Draw:
    """Random queries, keys and values of `kind`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q_scale, k_scale = ((CHANNEL_SIGMA * normal(1, HEADS, 1, HEAD_DIM)).exp() for _ in range(2))
    bias = torch.zeros(HEADS, HEAD_DIM)
    for head in range(HEADS):
        channels = torch.randperm(HEAD_DIM, generator=generator)[:MEAN_CHANNELS]
        if kind.first is not None:
            channels = torch.arange(kind.first, kind.first + MEAN_CHANNELS)
        bias[head, channels] = kind.mean
    last, positions = torch.tensor([TOKENS - 1]), torch.arange(TOKENS)
    counts = (QUERIES, CALIBRATION_QUERIES)
    q, other_q = (rope(normal(1, HEADS, count, HEAD_DIM) * q_scale, last, THETA) for count in counts)
    k, other_k = (
        rope(normal(1, HEADS, TOKENS, HEAD_DIM) * k_scale + bias[:, None], positions, THETA)
        for _ in range(2)
    )
    return Draw(q, k, normal(1, HEADS, TOKENS, HEAD_DIM), bias, other_q, other_k)


def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[1, H, QUERIES, L]`, in float64: KL is a small difference."""
    return (q.double() @ k.double().mT / HEAD_DIM**0.5).log_softmax(-1)


def less_segment_means(k: torch.Tensor) -> torch.Tensor:
    """Keys `[..., L, D]` less the mean of their segment, as a cache codes them."""
    segments = k.unflatten(-2, (-1, SEGMENT))
    return (segments - segments[..., :MEAN_SAMPLES, :].mean(-2, keepdim=True)).flatten(-3, -2)


def figures(scheme: Scheme, data: Draw, reference: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """KL of the attention in nats and relative error of its output, means over heads and queries.

    Args:
        reference: `attention(data.q, data.k)`.
        v: `data.v` as read back by the scheme's code.
    """
    seen = data.other_k - key_shift(scheme.k_shift, data.other_k, data.bias, THETA)
    if scheme.cache:
        seen = less_segment_means(data.other_k)
    moments = second_moment(data.other_q), second_moment(seen)
    balance = balance_matrix(scheme.k_balance, *moments)
    if scheme.cache:
        frame = torch.eye(HEAD_DIM) if balance is None else balance
        k, v = through_cache(scheme.cache, data.k @ frame, data.v, TOKENS)
        k = k @ torch.linalg.inv(frame)
        for span in (slice(scheme.sinks), slice(TOKENS - scheme.recent, None)):
            k[:, :, span], v[:, :, span] = data.k[:, :, span], data.v[:, :, span]
    else:
        shift = key_shift(scheme.k_shift, data.k, data.bias, THETA)
        k = in_frame(data.k, CODES[scheme.k], shift, balance)
    found = attention(data.q, k)
    exact_out = reference.exp() @ data.v.double()
    error = (found.exp() @ v.double() - exact_out).square().sum() / exact_out.square().sum()
    return {
        "kl_nats": float(f"{kl_divergence(reference, found).mean().item():.3g}"),
        "output_error": float(f"{error.sqrt().item():.3g}"),
    }
