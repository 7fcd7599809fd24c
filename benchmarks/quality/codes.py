"""Codes under test: each turns vectors into what a cache would read back, at a price in bytes.

Scalar codes are the package's own (`tq_inductor.reference`). vLLM's scheme, plain fp8 and the vector
codes are simulated here, in plain torch; nothing of this is used by the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from tq_inductor.codebook import codebook
from tq_inductor.codec import centroids_of, decode_vectors, encode_vectors
from tq_inductor.rotation import rotation_matrix

from .trellis import trellis

SCALE_BYTES = 2
VECTOR_SAMPLES = 100_000  # normal vectors that a vector codebook is fitted to
VECTOR_ROUNDS = 30
# e4m3 units per standard deviation; of three those with the least error on the unit sphere at D=128.
SCALES = {4: (0.981, 1.112, 1.264), 3: (1.307, 1.49, 1.672), 2: (1.118, 1.242, 1.341)}
SLICE = 1 << 15  # vectors coded at a time: bounds the memory of the search


@dataclass(frozen=True)
class Code:
    """A code for single vectors.

    Attributes:
        bits: per coordinate, scales not counted.
        extra_bytes: scales and zero points of one vector.
        round_trip: `[..., D]` float32 -> the same shape, as read back.
    """

    bits: float
    extra_bytes: int
    round_trip: Callable[[torch.Tensor], torch.Tensor]

    def bytes_of(self, head_dim: int) -> float:
        """Bytes of one stored vector."""
        return self.bits * head_dim / 8 + self.extra_bytes


def scalar(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The package's code: rotation, the best centroids of the fp8 grid, least-squares scale."""
    rotation = _rotation(x.shape[-1])
    return decode_vectors(*encode_vectors(x, bits, rotation), bits, rotation)


def unbiased(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The package's codes with the scale <y, y> / <y, c>: inner products without bias (EDEN)."""
    rotation = _rotation(x.shape[-1])
    y = x @ rotation
    centroids = centroids_of(encode_vectors(x, bits, rotation)[0], bits)
    scale = y.square().sum(-1, keepdim=True) / (y * centroids).sum(-1, keepdim=True)
    return (centroids * scale.bfloat16().float()) @ rotation.T


def best_scale(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The package's centroids, rounded to at each of three scales; what fits best is kept.

    As many bytes, and read as fast; storing would take longer.
    """
    rotation = _rotation(x.shape[-1])
    y = x @ rotation
    book = codebook(bits)
    magnitudes, midpoints = y.new_tensor(book.magnitudes), y.new_tensor(book.midpoints)
    grid = y.abs() / y.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    tries = torch.stack(
        [torch.copysign(magnitudes[torch.bucketize(grid * f, midpoints)], y) for f in SCALES[bits]]
    )
    dot, square = ((z * tries).sum(-1, keepdim=True) for z in (y, tries))
    best = (dot * dot / square).argmax(0, keepdim=True)  # what is kept of y's length: the rest is error
    scale = (dot / square).gather(0, best)[0].bfloat16().float()
    return (tries.gather(0, best.expand_as(tries[:1]))[0] * scale) @ rotation.T


def vllm_key(x: torch.Tensor, bits: int) -> torch.Tensor:
    """vLLM's key: Hadamard without signs, Lloyd-Max codes of x / |x|, norm fp16, "norm correction".

    The correction makes the centroid vector as long as x (vLLM pull request 38479). Centroids are exact,
    where vLLM's come from a numerical integral.
    """
    norm = x.norm(dim=-1, keepdim=True)
    y = x / (norm + 1e-8) @ _plain_hadamard(x.shape[-1])
    magnitudes = lloyd_max(2 ** (bits - 1))
    index = torch.bucketize(y.abs() * x.shape[-1] ** 0.5, (magnitudes[1:] + magnitudes[:-1]) / 2)
    centroids = torch.copysign(magnitudes[index], y)
    unit = centroids / centroids.norm(dim=-1, keepdim=True)
    return unit * norm.half().float() @ _plain_hadamard(x.shape[-1]).T


@cache
def lloyd_max(levels: int) -> torch.Tensor:
    """Positive centroids of the best symmetric quantiser of a standard normal with 2 * `levels` values."""
    centroids = 3 * (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    ends = torch.tensor([0.0, torch.inf], dtype=torch.float64)
    for _ in range(5000):
        edges = torch.cat([ends[:1], (centroids[1:] + centroids[:-1]) / 2, ends[1:]])
        density = (-edges.square() / 2).exp() / (2 * torch.pi) ** 0.5
        centroids = -density.diff() / torch.special.ndtr(edges).diff()
    return centroids.float()


def min_max(x: torch.Tensor, bits: int) -> torch.Tensor:
    """vLLM's value: not rotated, 2**bits even steps from the vector's least to its largest, fp16."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    index = ((x - low) / step + 0.5).floor().clamp(0, 2**bits - 1)
    return index * step.half().float() + low.half().float()


def vector(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Rotated coordinates in groups, each the nearest of 2**(bits * group) points; least-squares scale.

    As in HIGGS (arXiv 2411.17525). One table look-up gives `group` coordinates, so up to 256 points it
    decodes with fewer look-ups than a scalar code.
    """
    points = vector_codebook(bits, group)
    return _of_unit_variance(x, lambda y: points[_nearest(y.reshape(-1, group), points)].view_as(y))


def along_a_trellis(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rotated coordinates by trellis-coded quantisation; least-squares scale."""
    return _of_unit_variance(x, lambda y: trellis(y, bits))


def _of_unit_variance(x: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Rotated vectors, a mean square of 1 each, by what is `nearest` to them `[n, D]`."""
    rotation = _rotation(x.shape[-1])
    read = []
    for part in x.reshape(-1, x.shape[-1]).split(SLICE):
        y = part @ rotation
        centroids = nearest(y / y.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30))
        scale = (y * centroids).sum(-1, keepdim=True) / centroids.square().sum(-1, keepdim=True)
        read.append(centroids * scale.bfloat16().float() @ rotation.T)
    return torch.cat(read).view_as(x)


def _nearest(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Indices `[n]` of the nearest of `points` `[m, g]` for x `[n, g]`."""
    return torch.addmm(-points.square().sum(-1) / 2, x, points.T).argmax(-1)


@cache
def vector_codebook(bits: int, group: int) -> torch.Tensor:
    """Points `[2**(bits * group), group]` fitted to a normal distribution by k-means, always the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(VECTOR_SAMPLES, group, generator=generator)
    points = x[: 2 ** (bits * group)].clone()
    for _ in range(VECTOR_ROUNDS):
        index = _nearest(x, points)
        counts = torch.bincount(index, minlength=len(points)).clamp(min=1)[:, None]
        points = torch.zeros_like(points).index_add_(0, index, x) / counts
    return points


@cache
def _rotation(head_dim: int) -> torch.Tensor:
    return rotation_matrix(head_dim)


@cache
def _plain_hadamard(head_dim: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < head_dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / head_dim**0.5


def _plain_fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


CODES: dict[str, Code] = {
    "exact": Code(32, 0, lambda x: x),
    "bf16": Code(16, 0, lambda x: x.bfloat16().float()),
    "fp8": Code(8, 0, _plain_fp8),  # e4m3 with scale 1, as fp8 caches are used by default
    **{str(b): Code(b, SCALE_BYTES, lambda x, b=b: scalar(x, b)) for b in (2, 3, 4, 8)},
    **{f"unbiased{b}": Code(b, SCALE_BYTES, lambda x, b=b: unbiased(x, b)) for b in (2, 3, 4)},
    **{f"scales{b}": Code(b, SCALE_BYTES, lambda x, b=b: best_scale(x, b)) for b in (2, 3, 4)},
    **{f"vllm{b}": Code(b, SCALE_BYTES, lambda x, b=b: vllm_key(x, b)) for b in (3, 4)},
    **{f"minmax{b}": Code(b, 2 * SCALE_BYTES, lambda x, b=b: min_max(x, b)) for b in (2, 3, 4)},
    # as many coordinates to a look-up as 256 points allow
    "vector2": Code(2, SCALE_BYTES, lambda x: vector(x, 2, 4)),
    "vector3": Code(3, SCALE_BYTES, lambda x: vector(x, 3, 2)),
    "vector4": Code(4, SCALE_BYTES, lambda x: vector(x, 4, 2)),
    **{f"trellis{b}": Code(b, SCALE_BYTES, lambda x, b=b: along_a_trellis(x, b)) for b in (2, 3)},
}
