"""The random rotation of TurboQuant: seeded signs, then a Hadamard transform.

Signs come *before* the transform. Without them a constant offset over the channels, which real keys
have, lands on one coordinate and ruins the code. A head dimension that is not a power of two gets
two transforms of the largest power of two below it, over its first and over its last coordinates;
they overlap, so that energy spreads over the whole vector and stays nearly even.
"""

from __future__ import annotations

import torch

# Of 400 seeds the one whose transform of a constant vector is coded best: at every power of two from
# 32 to 512 and the dimensions between that models use, within 4% of a Gaussian vector's distortion.
ROTATION_SEED = 0x7A83


def _signs(count: int, stream: int) -> torch.Tensor:
    """`count` signs, float64, from an integer hash of their index.

    Not from a `torch.Generator`, which cannot be made inside a compiled graph, where a cache may be.
    """
    x = torch.arange(count, dtype=torch.int64, device="cpu") + (ROTATION_SEED << 16) + (stream << 12)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F):  # murmur3's and xxhash's finalisers
        x = ((x ^ (x >> 15)) * multiplier) & 0xFFFFFFFF
    return ((x >> 16) & 1).to(torch.float64) * 2 - 1


def _signed_hadamard(start: int, size: int, head_dim: int, stream: int) -> torch.Tensor:
    """Identity of `head_dim` with `diag(signs) @ H / sqrt(size)` at `start..start+size`, float64."""
    hadamard = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while hadamard.shape[0] < size:
        top = torch.cat([hadamard, hadamard], dim=1)
        hadamard = torch.cat([top, torch.cat([hadamard, -hadamard], dim=1)])
    matrix = torch.eye(head_dim, dtype=torch.float64, device="cpu")
    block = _signs(size, stream)[:, None] * hadamard / size**0.5
    matrix[start : start + size, start : start + size] = block
    return matrix


def rotation_matrix(head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The rotation `R`, float32 `[head_dim, head_dim]`, orthogonal: rotate by `x @ R`, undo by `y @ R.T`.

    The same on every machine and for every layer. `device` is where it is put; it is made on the
    CPU, whatever the default device is.
    """
    size = 1 << (head_dim.bit_length() - 1)
    matrix = _signed_hadamard(0, size, head_dim, 0)
    if size != head_dim:
        matrix = matrix @ _signed_hadamard(head_dim - size, size, head_dim, 1)
    return matrix.to(torch.float32).to(device)
