"""`balance_keys`: scale pairs of channels of keys and queries against each other, so that codes lose less.

A code's error is spread evenly over a key's channels, whatever their size. Where keys are large and queries
small, keys can shrink and queries grow by the same factor: scores stay, keys get shorter, and so do their
errors in all channels. These cost least with the fourth root of the ratio of energies, queries' over keys'
(SmoothAttention of QServe, MLSys 2025, takes keys alone). A factor for both channels of a RoPE pair goes
through RoPE, so it is multiplied into the weights once and costs nothing afterwards, whatever reads them.

Factors are powers of two: floating point is exact in them, and the model computes what it did bit for bit.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from .beside import MEAN_SAMPLES, SEGMENT
from .errors import UnsupportedModelError

MOST = 4  # of the exponents: no factor beyond 16
TINY = 1e-30  # energy of a channel that is always zero
LAYOUTS = ("halves", "neighbours")  # where the two channels of a RoPE pair lie, among those that it turns


@torch.no_grad()
def balance_keys(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Scale keys against queries in the weights of `model`, by how large they are on a text.

    It changes `q_proj` and `k_proj` (or `q_norm` and `k_norm`, where heads are normalised), and what the
    model computes stays the same to the bit. Worth it where keys have large biases in channels that RoPE
    turns fast: docs/quality.md.

    Args:
        model: one with a `q_proj` and a `k_proj` in each attention layer. It can be saved afterwards.
        input_ids: `[B, n]`, a text of the kind that the model will read; some hundred tokens are enough.

    Returns:
        for each layer the exponents of two by which its keys were multiplied, int64 `[num_kv_heads,
        head_dim]`; one row for all heads where these are normalised.

    Raises:
        UnsupportedModelError: other layers, or the model did not stay the same. Nothing is changed.
    """
    layers = {m.layer_idx: _Layer(m) for m in model.modules() if _is_attention(m)}
    if not layers:
        raise UnsupportedModelError(
            f"{model.config.model_type} has no attention layer with a q_proj and a k_proj of its own: "
            "balance_keys can change no other. Nothing was changed."
        )
    training = model.training
    model.eval()
    try:
        return _balance(model, layers, input_ids)
    finally:
        model.train(training)


def _balance(
    model: PreTrainedModel, layers: dict[int, _Layer], input_ids: torch.Tensor
) -> dict[int, torch.Tensor]:
    cache = DynamicCache(config=model.config)
    with ExitStack() as hooks:
        for layer in layers.values():
            hooks.callback(layer.listen().remove)
        before = model(input_ids, past_key_values=cache).logits
    for index, layer in layers.items():
        layer.look_at(cache.layers[index].keys)
    for layout in LAYOUTS:
        exponents = {index: layer.exponents(layout) for index, layer in layers.items()}
        for index, layer in layers.items():
            layer.scale(exponents[index])
        same = False
        try:
            after = model(input_ids, past_key_values=DynamicCache(config=model.config)).logits
            same = torch.equal(before, after)
        finally:
            if not same:
                for index, layer in layers.items():
                    layer.scale(-exponents[index])
        if same:
            return exponents
    raise UnsupportedModelError(
        f"{model.config.model_type} is not the same with balanced keys: RoPE's pairs lie neither in halves "
        "nor side by side, or something else reads queries or keys. Its weights are as they were."
    )


def _is_attention(module: nn.Module) -> bool:
    projections = (getattr(module, name, None) for name in ("q_proj", "k_proj"))
    return hasattr(module, "layer_idx") and all(isinstance(p, nn.Linear) for p in projections)


class _Layer:
    """One attention layer: what makes its queries and keys, and their energies in each channel."""

    def __init__(self, module: Any) -> None:
        self.head_dim: int = module.head_dim
        normalised = hasattr(module, "q_norm") and hasattr(module, "k_norm")
        names = ("q_norm", "k_norm") if normalised else ("q_proj", "k_proj")
        self.q, self.k = (getattr(module, name) for name in names)
        self.heads = 1 if normalised else module.k_proj.out_features // self.head_dim
        rope = getattr(module.config, "rope_parameters", None) or {}
        part = rope.get("partial_rotary_factor") or 1.0
        self.turned = int(self.head_dim * part)  # channels; those behind them are not turned
        self.queries = self.keys = torch.empty(0)

    def listen(self) -> RemovableHandle:
        """Take the energies of queries when the model runs: RoPE does not change a pair's."""

        def hear(module: nn.Module, args: object, out: torch.Tensor) -> None:
            heads = max(out.shape[-1], self.head_dim) // self.head_dim  # normalised ones come one by one
            energies = out.double().square().reshape(-1, heads, self.head_dim).mean(0)
            self.queries = energies.unflatten(0, (self.heads, -1)).mean(1)

        return self.q.register_forward_hook(hear)  # type: ignore[no-any-return]

    def look_at(self, keys: torch.Tensor) -> None:
        """Take the energies of keys `[B, Hkv, n, D]` less the mean of their segment, as a cache has it."""
        left = [part - part[:, :, :MEAN_SAMPLES].mean(2, True) for part in keys.double().split(SEGMENT, 2)]
        energy = torch.cat(left, 2).square().mean((0, 2))
        self.keys = energy if self.heads > 1 else energy.mean(0, True)

    def exponents(self, layout: str) -> torch.Tensor:
        """Exponents of two, int64 `[heads, D]`, if RoPE's pairs lie as `layout` says."""
        energies = []
        for energy in (self.queries.clamp(min=TINY), self.keys.clamp(min=TINY)):
            turned, rest = energy[:, : self.turned], energy[:, self.turned :]
            if layout == "halves":
                turned = turned.unflatten(1, (2, -1)).sum(1).repeat(1, 2)
            else:
                turned = turned.unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1)
            energies.append(torch.cat((turned, rest), 1))
        exponents = (energies[0] / energies[1]).log2() / 4
        exponents -= exponents.mean(1, keepdim=True)  # a factor for all of a key changes nothing
        return exponents.round().clamp(-MOST, MOST).long()

    def scale(self, exponents: torch.Tensor) -> None:
        """Multiply keys by these powers of two, and divide queries by them."""
        for module, power in ((self.k, exponents), (self.q, -exponents)):
            for x in (module.weight, getattr(module, "bias", None)):
                if x is not None:
                    factors = power.to(x).exp2().view(self.heads, 1, -1, *[1] * (x.dim() - 1))
                    x.unflatten(0, (self.heads, -1, self.head_dim)).mul_(factors)
