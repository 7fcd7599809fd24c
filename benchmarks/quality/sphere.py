"""Distortion and inner products of unit vectors, against exact values."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .codes import CODES

VECTORS = 60_000
DIMENSIONS = (64, 128, 256)
# Mean squared error of TurboQuant's exact codes with the norm as scale (quality-and-peers, section 1).
# The package's least-squares scale should be a little below, its fp8 grid costs up to 0.8% at 4 bits.
EXACT = {
    64: {"2": 0.1145, "3": 0.0334, "4": 0.00913},
    128: {"2": 0.1160, "3": 0.0340, "4": 0.00932},
    256: {"2": 0.1167, "3": 0.0343, "4": 0.00941},
}
SPHERE_CODES = (
    *("8", "4", "3", "2"),
    *("unbiased4", "unbiased3", "unbiased2"),
    *("scales4", "scales3", "scales2"),
    *("vector4", "vector3", "vector2"),
    *("vllm4", "vllm3", "minmax4", "minmax3", "minmax2", "fp8", "bf16"),
)


def figures(name: str, head_dim: int, vectors: int = VECTORS, seed: int = 0) -> dict[str, Any]:
    """Figures of a code on random unit vectors x, with random unit vectors q to multiply.

    `mse`: mean |x - x'|^2. `slope` of <q, x'> on <q, x>; `offset`, the mean of what remains, times
    sqrt(d); `variance`, that of what remains, times d.
    """
    generator = torch.Generator().manual_seed(seed)
    x, q = (F.normalize(torch.randn(vectors, head_dim, generator=generator), dim=-1) for _ in range(2))
    read = CODES[name].round_trip(x).double()
    x, q = x.double(), q.double()
    true, found = (q * x).sum(-1), (q * read).sum(-1)
    # <q, x'> averaged over all q is <x, x'> <q, x>: the slope without the noise of the few q drawn.
    slope = (x * read).sum(-1).mean()
    rest = found - slope * true
    return {
        "mse": float(f"{(x - read).square().sum(-1).mean().item():.4g}"),
        "exact_mse": EXACT.get(head_dim, {}).get(name),
        "slope": round(slope.item(), 4),
        "offset": round(rest.mean().item() * head_dim**0.5, 5),
        "variance": float(f"{rest.var().item() * head_dim:.3g}"),
    }
