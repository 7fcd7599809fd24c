"""The demo model reads held-out text through a simulated cache.

One forward pass per batch, but every query attends to what a cache read token by token would give it:
a key's code depends on nothing after it, so all codes can be made at once. Only the first chunk sees
raw keys and values, as prefill does; after it a query reads every key from the cache, its own too, as
decoding does. A test holds this against a `TurboQuantCache` read token by token and 16 at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from tq_inductor.corpus import held_out_text, training_files
from tq_inductor.demo import load_demo_model

from .codes import CODES
from .metrics import bootstrap_interval, kl_divergence
from .schemes import (
    FIRST_CHUNK,
    Scheme,
    balance_matrix,
    in_frame,
    key_shift,
    second_moment,
    through_cache,
    value_shift,
)

WINDOW = 1536  # bytes of one text; also tokens
WINDOWS_PER_MODULE = 2
BATCH = 6
CALIBRATION_FILES = ("ast.py", "gzip.py", "pathlib.py", "queue.py")  # of the training text


@dataclass(frozen=True)
class Sample:
    """Queries `[B, H, L, D]`, keys and values `[B, Hkv, L, D]` of one layer, seen in a calibration text."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Reader:
    """Attention of every layer through a cache of `scheme`; passed to the model's forward.

    `samples`, one per layer, are what a balance is computed from; other schemes need none.
    """

    def __init__(self, scheme: Scheme, model: PreTrainedModel, samples: list[Sample]) -> None:
        self.scheme = scheme
        self.theta = model.config.rope_parameters["rope_theta"]
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.norms = [layer.input_layernorm.weight.detach() for layer in model.model.layers]
        self.balances = [(None, None)] * len(self.layers)
        if scheme.k_balance or scheme.v_balance:
            self.balances = [self._balance(*pair) for pair in zip(self.layers, samples, strict=True)]

    def _bias(self, attention: torch.nn.Module) -> torch.Tensor | None:
        bias = attention.k_proj.bias
        return None if bias is None else bias.detach().unflatten(0, (-1, attention.head_dim))

    def _balance(
        self, attention: torch.nn.Module, seen: Sample
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        scheme, heads = self.scheme, seen.k.shape[1]
        k = seen.k - key_shift(scheme.k_shift, seen.k, self._bias(attention), self.theta)
        v = seen.v - value_shift(seen.v) if scheme.v_mean else seen.v
        if scheme.k_balance == "weights":
            moments = self._moments_from_weights(attention)
            return balance_matrix("pairs", *moments), None
        q = second_moment(seen.q).unflatten(0, (heads, -1)).mean(1)
        # o_proj's columns read the heads' outputs: known without any data
        out = attention.o_proj.weight.detach().unflatten(1, (heads, -1, attention.head_dim))
        o = torch.einsum("ohgd,ohge->hde", out, out)
        return (
            balance_matrix(scheme.k_balance, q, second_moment(k)),
            balance_matrix(scheme.v_balance, o, second_moment(v)),
        )

    def _moments_from_weights(self, attention: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Diagonal second moments of queries and keys `[Hkv, D, D]` if the layer's input were white."""
        norm, heads = self.norms[attention.layer_idx], attention.config.num_key_value_heads
        bias_is_stored = not self.scheme.k_shift
        moments = []
        for projection, has_bias in ((attention.q_proj, True), (attention.k_proj, bias_is_stored)):
            energy = (projection.weight * norm).square().sum(-1)
            if has_bias and projection.bias is not None:
                energy = energy + projection.bias.square()
            energy = energy.detach().unflatten(0, (heads, -1, attention.head_dim)).mean(1)
            moments.append(torch.diag_embed(energy))
        return moments[0], moments[1]

    def in_layer(self, attention: torch.nn.Module) -> Scheme:
        """The scheme of this layer."""
        return self.scheme.in_layer(attention.layer_idx, len(self.layers))

    def read_back(
        self, attention: torch.nn.Module, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer's cache gives for keys and values `[B, Hkv, L, D]`."""
        scheme = self.in_layer(attention)
        if scheme.cache:
            return through_cache(scheme.cache, k, v, FIRST_CHUNK)
        k_balance, v_balance = self.balances[attention.layer_idx]
        shift = key_shift(scheme.k_shift, k, self._bias(attention), self.theta)
        k_read = in_frame(k, CODES[scheme.k], shift, k_balance)
        shift = value_shift(v) if scheme.v_mean else torch.zeros_like(v)
        return k_read, in_frame(v, CODES[scheme.v], shift, v_balance)

    def attend(
        self, attention: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention of q `[B, H, L, D]` -> `[B, L, H, D]`, a chunk of queries at a time."""
        raw, scheme = (k, v), self.in_layer(attention)
        read = self.read_back(attention, k, v)
        chunks = []
        for start in range(0, q.shape[2], FIRST_CHUNK):
            queries = q[:, :, start : start + FIRST_CHUNK]
            chunks.append(self._attend_chunk(scheme, queries, start, raw, read))
        return torch.cat(chunks, 2).transpose(1, 2)

    @staticmethod
    def _attend_chunk(
        scheme: Scheme,
        q: torch.Tensor,
        start: int,
        raw: tuple[torch.Tensor, torch.Tensor],
        read: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        end = start + q.shape[2]
        groups = q.shape[1] // raw[0].shape[1]
        queries, keys = torch.arange(start, end)[:, None], torch.arange(end)
        hidden = keys > queries
        source = raw if start == 0 else read
        k, v = (x[:, :, :end].repeat_interleave(groups, 1) for x in source)
        kept = (keys < scheme.sinks) | (keys > queries - scheme.recent)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if start == 0 or not kept[~hidden].any():
            return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        # Sixteen-bit tokens lie in two ranges of keys: the sinks, and from the first query's window on.
        ranges = (slice(0, scheme.sinks), slice(max(start + 1 - scheme.recent, 0), end))
        raw_k, raw_v = (x[:, :, :end].bfloat16().float().repeat_interleave(groups, 1) for x in raw)
        for span in ranges:
            exact = q @ raw_k[:, :, span].mT / q.shape[-1] ** 0.5
            scores[..., span] = torch.where(kept[:, span], exact, scores[..., span])
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = p.masked_fill(kept, 0) @ v
        spans = torch.zeros(end, dtype=torch.bool)
        for span in ranges:
            spans[span] = True
        return out + p.masked_fill(~kept, 0)[..., spans] @ raw_v[:, :, spans]


def _attention(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    quality_reader: Reader | None = None,
    quality_record: list[Sample] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if quality_record is not None:
        quality_record.append(Sample(q, k, v))
    if quality_reader is not None:
        return quality_reader.attend(module, q, k, v), None
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2), None


def load_model() -> PreTrainedModel:
    """The demo model, its attention replaced by the harness's."""
    AttentionInterface.register("quality", _attention)
    model = load_demo_model("cpu")
    model.config._attn_implementation = "quality"
    return model


def texts(per_module: int = WINDOWS_PER_MODULE) -> torch.Tensor:
    """Held-out text `[modules * per_module, WINDOW + 1]`: beginnings and later parts of modules."""
    rows = []
    for text in held_out_text().values():
        for start in range(0, per_module * 2 * WINDOW, 2 * WINDOW):
            if start + WINDOW < len(text):
                rows.append(list(text[start : start + WINDOW + 1]))
    return torch.tensor(rows)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Log-probabilities `[B, L, 256]` of the bytes after each of `ids` `[B, L]`."""
    return model(
        ids, attention_mask={"full_attention": None}, use_cache=False, **kwargs
    ).logits.log_softmax(-1)


@torch.no_grad()
def calibrate(model: PreTrainedModel) -> list[Sample]:
    """Queries, keys and values of every layer on a few files of the training text."""
    texts = [path.read_bytes() for path in training_files() if path.name in CALIBRATION_FILES]
    ids = torch.tensor([list(text[:WINDOW]) for text in texts if len(text) >= WINDOW])
    record: list[Sample] = []
    log_probabilities(model, ids, quality_record=record)
    return record


@dataclass(frozen=True)
class Outcome:
    """Per text `[n]`: bits per byte, KL to the exact cache in nats, share of equal top bytes."""

    bits: torch.Tensor
    kl: torch.Tensor
    top1: torch.Tensor


def measure(
    model: PreTrainedModel, ids: torch.Tensor, reference: torch.Tensor, reader: Reader | None
) -> tuple[Outcome, torch.Tensor]:
    """Read `ids` `[n, L + 1]`; the first chunk, which reads no cache, is not counted.

    Args:
        reference: log-probabilities `[n, L - FIRST_CHUNK, 256]` with exact attention; empty: these here.
        reader: None for exact attention.

    Returns:
        the outcome and the log-probabilities.
    """
    pieces = []
    for batch in ids[:, :-1].split(BATCH):
        pieces.append(log_probabilities(model, batch, quality_reader=reader)[:, FIRST_CHUNK:].clone())
    found = torch.cat(pieces)
    reference = reference if len(reference) else found
    targets = ids[:, FIRST_CHUNK + 1 :, None]
    bits = -found.gather(-1, targets)[..., 0].double().mean(-1) / math.log(2)
    kl = kl_divergence(reference, found).double().mean(-1)
    top1 = (found.argmax(-1) == reference.argmax(-1)).double().mean(-1)
    return Outcome(bits, kl, top1), found


def row(outcome: Outcome, exact: Outcome) -> dict[str, Any]:
    """Figures of one scheme: difference to the exact cache in per cent of its bits per byte."""
    base = exact.bits.mean().item()
    percent = 100 * (outcome.bits - exact.bits) / base
    low, high = bootstrap_interval(percent)
    return {
        "bits_per_byte": round(outcome.bits.mean().item(), 5),
        "delta_percent": round(percent.mean().item(), 3),
        "interval_percent": [round(low, 3), round(high, 3)],
        "kl_nats": round(outcome.kl.mean().item(), 6),
        "top1_percent": round(100 * outcome.top1.mean().item(), 2),
    }
