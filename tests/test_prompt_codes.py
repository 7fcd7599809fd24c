"""What `store_prompt` encodes with: no threshold moves, and codes come in the order of the format."""

from __future__ import annotations

import pytest
import torch
from tq_inductor.kernels.prompt_codes import (
    MAGIC,
    code_polynomial,
    code_steps,
    field_order,
    first_byte,
    lanes_apart,
    table_words,
    words_of_call,
)

from tq_inductor import codec
from tq_inductor.codebook import FP8_UNIT, codebook
from tq_inductor.format import row_bytes


def float32(x: torch.Tensor | float) -> torch.Tensor:
    """Rounded to float32, in float64."""
    return torch.as_tensor(x, dtype=torch.float64).to(torch.float32).to(torch.float64)


def magnitude_codes(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The arithmetic of `encode_asm` for x >= 0, in e4m3 units: float32, each step rounded once."""
    start, width, coefficients = code_polynomial(bits)
    steps = code_steps(bits, dim)[0]
    u = float32(x * steps * float32(1 / (width * steps)) + float32(-start / width)).clamp(0, 1)
    total = float32(coefficients[-1])
    for c in coefficients[-2::-1]:
        total = float32(total * u + float32(c))
    return (float32(total * u + MAGIC) - MAGIC).long()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_polynomial_rounds_to_the_code_on_both_sides_of_every_midpoint(bits):
    midpoints = torch.tensor(codebook(bits).midpoints, dtype=torch.float64)
    near = midpoints[:, None] * (1 + torch.tensor([-1.0, 1.0]) * 3e-6)
    x = float32(torch.cat([torch.linspace(0, 16, 200_001, dtype=torch.float64), near.flatten()]))
    x = x[((x[:, None] - midpoints).abs() > 2e-6 * midpoints).all(1)]
    assert torch.equal(magnitude_codes(x, bits, 128), torch.bucketize(x, midpoints))


@pytest.mark.parametrize(("bits", "dim"), [(2, 128), (4, 64), (4, 128)])
def test_codes_lie_in_the_bytes_that_the_format_says(bits, dim):
    """Lane r has dims 4r + 2e + d of every 32, for e = 0 and 1 the inputs 2q + e of `encode_asm`."""
    codes = torch.randint(0, 2**bits, (dim,))
    expected = codec.pack(codes, bits)
    row = torch.zeros(dim * bits // 8, dtype=torch.int64)
    for lane in range(8):
        for d in range(2):
            inputs = codes.view(-1, 8, 2, 2)[:, lane, :, d].flatten()
            fields = inputs[field_order(bits, dim)].view(-1, 8 // bits)
            packed = (fields << torch.arange(0, 8, bits)).sum(1)
            row.view(-1, 8, 2, 2)[:, lane, :, d] = packed.view(-1, 2)
    assert torch.equal(row, expected.long())


@pytest.mark.parametrize(("bits", "dim"), [(2, 128), (3, 128), (4, 64), (4, 128), (8, 64), (8, 128)])
def test_every_byte_of_a_row_is_written_once(bits, dim):
    """By `write_key_words`: lane r writes bytes 4r to 4r + 3 of every 32, two at a time those of a word."""
    row = row_bytes(bits, dim)
    written = [
        first_byte(bits, dim, word) + byte // 2 * 32 + byte % 2 * 2 + 4 * lane + d
        for word in range(words_of_call(bits, dim))
        for lane in range(lanes_apart(bits, word))
        for byte in range(4 if row >= 64 else 2)
        for d in range(2)
    ]
    assert sorted(written) == list(range(row))


def test_no_coordinate_of_8_bits_saturates():
    assert FP8_UNIT * 128**0.5 < codec.FP8_MAX
    assert code_steps(8, 128) == (1, 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_sums_fit_their_integers(bits, dim):
    """Coordinates are the largest, or a vector the longest that it can be; and centroids the largest."""
    steps, centroid_steps = code_steps(bits, dim)
    book = codebook(bits)
    y = torch.randn(1000, dim) * 10 ** torch.rand(1000, dim)
    y[0, 1:] = 0  # a coordinate of all the length
    y[1] = 1
    factor = book.per_rms / y.square().mean(-1).sqrt() + book.per_peak / y.abs().amax(-1)
    grid = y.abs() * factor[:, None]
    assert grid.max() <= book.largest(dim) * (1 + 1e-6)
    assert steps * book.largest(dim) < 2**15
    assert dim * (centroid_steps * book.magnitudes[-1]) ** 2 < 2**31
    length = steps * (book.per_rms + book.per_peak) * dim**0.5  # of a vector whose coordinates are equal
    assert steps * grid.norm(dim=-1).max() <= length * (1 + 1e-6)
    assert length * centroid_steps * book.magnitudes[-1] * dim**0.5 < 2**31
    low, high = table_words(bits)
    table = [(low | high << 32) >> 8 * i & 0xFF for i in range(len(book.magnitudes))]
    assert table == [centroid_steps * m for m in book.magnitudes]
