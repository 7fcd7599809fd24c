"""How one vector becomes codes and a scale, and back, in plain torch: the specification of the codes."""

from __future__ import annotations

import torch

from .codebook import FP8_UNIT, codebook
from .format import SCALE_DTYPE

FP8_MAX = 448.0


def encode_vectors(x: torch.Tensor, bits: int, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate vectors and round each coordinate to its nearest centroid.

    What a centroid of 3 or 4 bits is worth while rounding depends on the vector's largest rotated
    magnitude too: a vector with a large coordinate is coded more coarsely, one without more finely.
    The scale is the least-squares one, <y, c> / <c, c>, rather than the norm: at the same bytes it
    has less distortion, and it is exact for vectors that the rotation makes flat (one-hot ones).

    Args:
        x: `[..., D]`, any float dtype.
        bits: 2, 3, 4 or 8.
        rotation: `[D, D]` float32.

    Returns:
        codes `[..., D]` uint8 and scales `[...]` bf16, with x ~ (scale * centroid) @ rotation.T. A
        zero vector has scale 0; a vector with NaN or inf has scale NaN, so that it reads back as
        NaN and is never mistaken for data (checking it here would cost a host sync).
    """
    x = x.to(torch.float32)
    # By a power of two first, so that squares neither overflow nor vanish; neither does its inverse.
    largest = x.abs().amax(-1, keepdim=True)
    unit = ((largest.view(torch.int32) >> 23).clamp(1, 253) << 23).view(torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    y = (x / (unit + (largest - largest))) @ rotation  # NaN if the largest is infinite
    rms = y.square().mean(-1, keepdim=True).sqrt().clamp(min=tiny)
    peak = y.abs().amax(-1, keepdim=True).clamp(min=tiny)
    if bits == 8:
        grid = (y * (FP8_UNIT / rms)).clamp(-FP8_MAX, FP8_MAX).nan_to_num(0.0)
        codes = grid.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        book = codebook(bits)
        grid = y.abs() * (book.per_rms / rms + book.per_peak / peak)
        codes = (grid[..., None] > grid.new_tensor(book.midpoints)).sum(-1)
        codes = (codes | ((y < 0).long() << (bits - 1))).to(torch.uint8)
    centroids = centroids_of(codes, bits)
    fit = (y * centroids).sum(-1) / centroids.square().sum(-1).clamp(min=tiny)
    scales = torch.where(largest[..., 0] < tiny, 0.0, fit * unit[..., 0])
    return codes, scales.to(SCALE_DTYPE)


def centroids_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., D]` uint8 -> centroids `[..., D]` float32, in e4m3 units."""
    if bits == 8:
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    magnitudes = codebook(bits).magnitudes
    table = torch.tensor([*magnitudes, *(-m for m in magnitudes)], device=codes.device)
    return table[codes.long()]


def decode_vectors(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, rotation: torch.Tensor
) -> torch.Tensor:
    """Codes `[..., D]` and scales `[...]` -> vectors `[..., D]` float32, rotated back."""
    return (centroids_of(codes, bits) * scales.to(torch.float32)[..., None]) @ rotation.T


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., D]` -> rows `[..., D * bits / 8]` uint8, in the order that `format` documents."""
    if bits == 3:
        return torch.cat([_pack_plane(codes & 3, 2), _pack_plane(codes >> 2, 1)], -1)
    return _pack_plane(codes, bits)


def unpack(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows `[..., D * bits / 8]` -> codes `[..., D]` uint8; the inverse of `pack`."""
    if bits == 3:
        magnitudes, signs = rows.split([rows.shape[-1] // 3 * 2, rows.shape[-1] // 3], -1)
        return _unpack_plane(magnitudes, 2) | _unpack_plane(signs, 1) << 2
    return _unpack_plane(rows, bits)


def _pack_plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    groups = codes.unflatten(-1, (8 // bits, -1))  # [..., codes per byte, bytes]
    packed = groups[..., 0, :]
    for i in range(1, 8 // bits):
        packed = packed | groups[..., i, :] << (i * bits)
    return packed


def _unpack_plane(rows: torch.Tensor, bits: int) -> torch.Tensor:
    mask = 2**bits - 1
    return torch.cat([rows >> (i * bits) & mask for i in range(8 // bits)], -1)
