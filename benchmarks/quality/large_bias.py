"""The demo model with keys like Qwen2.5's: four channels of every head have a mean of 40.

An exact change of the model, in two steps. First the two slowest RoPE pairs stop turning, which the model
hardly notices (they turn by 0.3 radians over the texts read here). Then the four channels of these pairs
get 40 more of k_proj's bias. Every score of a query moves by the same amount, which softmax does not see:
what the model computes is unchanged, but each key is two to nine times as long.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .model import load_model

MEAN = 40.0  # as the synthetic keys'; other channels have standard deviations of 0.9 to 1.6
PAIRS = 2


def load_large_bias_model(mean: float = MEAN) -> PreTrainedModel:
    """The demo model with `PAIRS` pairs that do not turn, and `mean` in the bias of their channels."""
    model = load_model()
    frequencies = model.model.rotary_emb.inv_freq
    pairs = torch.arange(len(frequencies) - PAIRS, len(frequencies))
    frequencies[pairs] = 0
    channels = torch.cat([pairs, pairs + len(frequencies)])
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.unflatten(0, (-1, model.config.head_dim))
        bias[:, channels] += mean
    return model
