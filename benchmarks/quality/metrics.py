"""Figures of merit: Kullback-Leibler divergence, and a bootstrap confidence interval."""

from __future__ import annotations

import torch

RESAMPLES = 10_000


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats over the last dimension of log-probabilities; where p is 0 nothing is added."""
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1)


def bootstrap_interval(samples: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap confidence interval of the mean of independent `samples` `[n]`."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(samples), (RESAMPLES, len(samples)), generator=generator)
    means = samples.double()[index].mean(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
