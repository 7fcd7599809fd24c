"""The codec of the reference implementation: codebooks, rotation, distortion, extreme values."""

import itertools

import pytest
import torch

from tq_inductor.codebook import codebook
from tq_inductor.codec import centroids_of, decode_vectors, encode_vectors, pack, unpack
from tq_inductor.format import KVFormat, round_up
from tq_inductor.reference import load, store
from tq_inductor.rotation import rotation_matrix

# Distortion of TurboQuant's exact codes on the unit sphere (shared/reference/quality-and-peers.md §1).
EXACT = {
    64: {2: 0.1145, 3: 0.0334, 4: 0.00913},
    128: {2: 0.1160, 3: 0.0340, 4: 0.00932},
    256: {2: 0.1167, 3: 0.0343, 4: 0.00941},
}


def round_trip(x, bits):
    rotation = rotation_matrix(x.shape[-1])
    return decode_vectors(*encode_vectors(x, bits, rotation), bits, rotation)


def distortion(x, bits):
    error = round_trip(x, bits).double() - x.double()
    return (error.square().sum(-1) / x.double().square().sum(-1)).mean().item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook_is_on_the_fp8_grid(bits):
    book = codebook(bits)
    values = torch.tensor(book.magnitudes)
    assert torch.equal(values.to(torch.float8_e4m3fn).to(torch.float32), values)
    assert torch.equal(
        values.to(torch.float8_e4m3fn).view(torch.uint8), torch.tensor(book.fp8_bytes).byte()
    )


class Coordinate:
    """A coordinate of a random unit vector times sqrt(D), D=128: squared error of parts of its range."""

    STEP, RANGE = 5e-4, 8.0

    def __init__(self):
        y = torch.arange(0, self.RANGE, self.STEP, dtype=torch.float64)
        density = (1 - y * y / 128).clamp(min=0) ** ((128 - 3) / 2)
        density /= density.sum()
        moments = torch.stack([density, density * y, density * y * y])
        self.moments = torch.cat([torch.zeros(3, 1), moments.cumsum(-1)], -1)

    def cost(self, low, high, centroid):
        """Mean of (|y| - centroid)^2 where low <= |y| < high, zero elsewhere."""
        start, end = ((x / self.STEP).round().long() for x in (low, high))
        zeroth, first, second = self.moments[:, end] - self.moments[:, start]
        return second - 2 * centroid * first + centroid**2 * zeroth

    def of_magnitudes(self, magnitudes):
        """Expected squared error of a quantiser with these `[n]`."""
        edges = torch.cat([torch.zeros(1), (magnitudes[1:] + magnitudes[:-1]) / 2, torch.tensor([7.9])])
        return self.cost(edges[:-1], edges[1:], magnitudes).sum().item()

    def least(self, grid, count):
        """The least squared error of any `count` magnitudes out of `grid` `[n]`, ascending."""
        a, b = grid[:, None].expand(-1, len(grid)), grid[None].expand(len(grid), -1)
        middle = (a + b) / 2
        between = self.cost(a, middle, a) + self.cost(middle, b, b)
        between[a >= b] = torch.inf
        best = self.cost(torch.zeros_like(grid), grid, grid)  # of those that end with each of the grid
        for _ in range(count - 1):
            best = (best[:, None] + between).amin(0)
        return (best + self.cost(grid, torch.full_like(grid, 7.9), grid)).min().item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_magnitudes_of_the_grid_do_better(bits):
    """With one unit for all vectors, the best for each set of magnitudes: a vector's peak plays no part."""
    coordinate = Coordinate()
    mantissas, octaves = torch.arange(8, 16).double() / 8, 2.0 ** torch.arange(-6, 4)
    grid = (octaves[:, None] * mantissas).flatten()
    units = 2 ** (torch.arange(60) / 60).double()  # the grid repeats every octave
    found = min(
        coordinate.least(scaled[(scaled > 0.03) & (scaled < 4.5)], 2 ** (bits - 1))
        for scaled in (grid / unit for unit in units)
    )
    magnitudes = torch.tensor(codebook(bits).magnitudes).double()
    ours = min(coordinate.of_magnitudes(magnitudes / unit) for unit in units)
    assert found <= ours * (1 + 1e-9)
    assert ours <= found * 1.0003  # two sets of magnitudes of 3 bits are as good as equal
    exact = {2: 0.1160, 3: 0.0340, 4: 0.00932}[bits]
    assert found == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("bits", "bar"), [(2, 0.1153), (3, 0.0330), (4, 0.00840)])
def test_distortion_at_128_dimensions_holds_its_bar(bits, bar):
    # Always the same vectors: the bars are near.
    x = torch.randn(60_000, 128, generator=torch.Generator().manual_seed(1))
    assert distortion(x, bits) <= bar


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 112, 128, 192, 256, 512, 576])
def test_rotation_is_orthogonal_and_the_same_everywhere(head_dim):
    rotation = rotation_matrix(head_dim)
    assert torch.allclose(rotation @ rotation.T, torch.eye(head_dim), atol=1e-5)
    assert torch.equal(rotation, rotation_matrix(head_dim))


@pytest.mark.parametrize(("head_dim", "bits"), list(itertools.product(EXACT, (2, 3, 4))))
def test_distortion_on_the_sphere(head_dim, bits):
    x = torch.nn.functional.normalize(torch.randn(20_000, head_dim), dim=-1)
    assert distortion(x, bits) <= EXACT[head_dim][bits] * 1.01


@pytest.mark.parametrize(
    ("bits", "head_dim", "saved"),
    [
        (3, 32, 0.05), (3, 64, 0.03), (3, 128, 0.015), (3, 256, 0.0),
        (4, 32, 0.18), (4, 64, 0.13), (4, 80, 0.11), (4, 128, 0.08), (4, 256, 0.04), (4, 512, 0.0),
    ],
)  # fmt: skip
def test_the_peak_saves_against_the_best_unit_for_all(bits, head_dim, saved):
    x = torch.randn(10_000, head_dim, generator=torch.Generator().manual_seed(2))
    y = x @ rotation_matrix(head_dim)
    y /= y.square().mean(-1, keepdim=True).sqrt()
    book, lost = codebook(bits), []
    for unit in torch.linspace(0.95, 1.05, 11) * {3: 1.52, 4: 1.11}[bits]:
        index = torch.bucketize(y.abs() * unit, torch.tensor(book.midpoints))
        centroids = torch.tensor(book.magnitudes)[index]
        kept = (y.abs() * centroids).sum(-1).square() / centroids.square().sum(-1) / head_dim
        lost.append(1 - kept.double().mean().item())
    assert distortion(x, bits) <= min(lost) * (1 - saved)


@pytest.mark.parametrize(("bits", "bar"), [(3, 0.145), (4, 0.037)])
def test_a_coordinate_that_is_large_after_the_rotation_is_not_cut_off(bits, bar):
    y = torch.randn(2000, 128, generator=torch.Generator().manual_seed(3))
    y[:, 3] = 8 * y[:, 3].sign()
    assert distortion(y @ rotation_matrix(128).T, bits) <= bar  # 0.174 and 0.113 with a unit for all


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_vectors_that_the_rotation_makes_flat_are_exact(head_dim, bits):
    x = torch.eye(head_dim)
    assert distortion(x, bits) <= 2**-16  # the scale is bf16


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["one-hot", "constant", "constant offset", "20x outlier"])
def test_distortion_of_hard_vectors(kind, head_dim, bits):
    noise = torch.randn(2000, head_dim)
    x = {
        "one-hot": torch.eye(head_dim),
        "constant": torch.full((1, head_dim), 0.3),
        "constant offset": noise + 3,
        "20x outlier": torch.cat([noise[:, :5], noise[:, 5:6] * 20, noise[:, 6:]], -1),
    }[kind]
    assert distortion(x, bits) <= EXACT[head_dim][bits] * 1.3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [80, 96, 112, 192, 576])
def test_head_dims_that_are_no_power_of_two(head_dim, bits):
    limit = {2: 0.119, 3: 0.035, 4: 0.0097, 8: 0.0008}[bits]
    assert distortion(torch.randn(2000, head_dim), bits) <= limit
    assert distortion(torch.eye(head_dim), bits) <= limit * 1.3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_vectors(bits):
    x = torch.randn(64, 128)
    for factor in (1e30, 1e5, 1e-7, 1e-30):  # past fp16's largest, and below its smallest
        assert distortion(x * factor, bits) == pytest.approx(distortion(x, bits), rel=0.05)
    zeros = torch.zeros(3, 128)
    assert torch.equal(round_trip(zeros, bits), zeros)
    assert round_trip(torch.full((1, 128), 1e-42), bits).abs().max() < 1e-38  # a subnormal vanishes
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[5, 7] = bad
        back = round_trip(y, bits)
        assert back[5].isnan().all()  # visibly not data
        assert back[[4, 6]].isfinite().all()  # and only that vector


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 576])
def test_pack_is_undone_by_unpack(head_dim, bits):
    codes = torch.randint(0, 2**bits, (5, head_dim), dtype=torch.uint8)
    rows = pack(codes, bits)
    assert rows.shape == (5, head_dim * bits // 8)
    assert torch.equal(unpack(rows, bits), codes)


def test_bit_order_is_as_documented():
    codes = torch.arange(16, dtype=torch.uint8) % 8
    assert pack(codes, 4)[1] == codes[1] | codes[9] << 4
    signs_and_magnitudes = pack(codes, 3)
    assert (
        signs_and_magnitudes[0]
        == codes[0] & 3 | (codes[4] & 3) << 2 | (codes[8] & 3) << 4 | (codes[12] & 3) << 6
    )
    assert signs_and_magnitudes[4] == sum(int(codes[2 * i] >> 2) << i for i in range(8))


def test_sign_and_magnitude():
    magnitudes = torch.tensor(codebook(3).magnitudes)
    assert torch.equal(
        centroids_of(torch.arange(8, dtype=torch.uint8), 3), torch.cat([magnitudes, -magnitudes])
    )


@pytest.mark.parametrize("name", ["k4v4", "k3v2", "k8v3", "k2v8", "bf16", "fp16"])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(16, 16), (80, 80), (128, 64)])
def test_store_in_pieces_equals_store_at_once(name, head_dim, v_head_dim):
    fmt = KVFormat(name, head_dim, v_head_dim)
    rotations = (rotation_matrix(head_dim), rotation_matrix(v_head_dim))
    k, v = torch.randn(2, 3, 37, head_dim), torch.randn(2, 3, 37, v_head_dim)
    page_bytes = round_up(37) * fmt.slot_bytes
    whole, pieces = torch.zeros(2, 2, 3, page_bytes, dtype=torch.uint8)
    store(whole, k, v, torch.tensor(37), *rotations, fmt)
    for end, size in ((20, 20), (21, 1), (37, 16)):
        new = slice(end - size, end)
        store(pieces, k[:, :, new], v[:, :, new], torch.tensor(end), *rotations, fmt)
    assert torch.equal(whole, pieces)
    keys, values = load(whole, torch.tensor([37, 5]), *rotations, fmt, 40)
    assert keys.shape == (2, 3, 40, head_dim)
    assert values.shape == (2, 3, 40, v_head_dim)
    assert (keys[0, :, :37] - k[0]).square().mean() < 0.15
    assert keys[1, :, 5:].abs().max() == 0  # past the row's length
    assert values[0, :, 37:].abs().max() == 0


def test_tokens_outside_the_page_are_skipped():
    fmt = KVFormat("k4v4", 16)
    rotation = rotation_matrix(16)
    k = torch.randn(2, 1, 4, 16)
    cache = torch.zeros(2, 1, 16 * fmt.slot_bytes, dtype=torch.uint8)
    store(cache, k, k, torch.tensor([2, 18]), rotation, rotation, fmt)  # positions -2..1 and 14..17
    keys, _ = load(cache, torch.tensor([16, 16]), rotation, rotation, fmt, 16)
    held = keys.abs().sum(-1)[:, 0] > 0
    assert held.nonzero().tolist() == [[0, 0], [0, 1], [1, 14], [1, 15]]
