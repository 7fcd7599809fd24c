"""What `store_prompt` encodes with: no threshold moves, and codes come in the order of the format."""

from __future__ import annotations

import pytest
import torch
from tq_inductor.kernels.prompt_codes import (
    CURVES,
    FINE,
    MAGIC,
    Curve,
    code_steps,
    field_order,
    first_byte,
    lanes_apart,
    table_words,
    words_of_call,
)
from tq_inductor.kernels.store_prompt import copies_whole

from tq_inductor import codec
from tq_inductor.codebook import FP8_UNIT, codebook
from tq_inductor.format import row_bytes


def float16(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, in float64."""
    return x.to(torch.float16).to(torch.float64)


def magnitude_codes(steps: torch.Tensor, curve: Curve) -> torch.Tensor:
    """The arithmetic of `code_lines`: steps of magnitudes -> codes. Each multiply-add rounds once."""
    middle = steps // curve.cell * curve.cell + curve.cell // 2
    u = middle.to(torch.int16).view(torch.float16).to(torch.float64) * curve.slope + curve.offset
    u = float16(u).clamp(0, 1)
    h = torch.full_like(u, curve.coefficients[-1])
    for c in curve.coefficients[-2::-1]:
        h = float16(h * u + c)
    return (float16(h * u + MAGIC) - MAGIC).long()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_cell_gets_the_code_of_all_that_it_holds(bits):
    curve, midpoints = CURVES[bits], torch.tensor(codebook(bits).midpoints, dtype=torch.float64)
    assert curve.cell % FINE == 0
    assert not ((midpoints * curve.steps) % curve.cell).any()  # a midpoint itself is in the cell above
    steps = torch.arange(int(codebook(bits).largest(128) * curve.steps) + curve.cell)
    assert torch.equal(
        magnitude_codes(steps, curve), torch.bucketize((steps + 0.5) / curve.steps, midpoints)
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_no_scale_is_off_by_a_bf16_ulp(bits, dim):
    """Of vectors of two magnitudes, if every middle is off by half a cell to the same side."""
    book, half = codebook(bits), FINE / 2 / CURVES[bits].steps
    midpoints, magnitudes = (
        torch.tensor(x, dtype=torch.float64) for x in (book.midpoints, book.magnitudes)
    )
    small = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None, None]
    large = torch.arange(dim) < torch.tensor([1, 2, 3, 4, 8, 16, 32])[:, None]
    y = torch.where(large, 1.0, small)
    x = y * (book.per_rms / y.square().mean(-1, True).sqrt() + book.per_peak)
    c = magnitudes[torch.bucketize(x, midpoints)]
    assert (half * c.sum(-1) < 2**-8 * (x * c).sum(-1)).all()


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
    assert code_steps(8) == (1, 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_sums_fit_their_integers(bits, dim):
    """Coordinates are the largest, or a vector the longest that it can be; and centroids the largest."""
    steps, centroid_steps = code_steps(bits)
    book = codebook(bits)
    y = torch.randn(1000, dim) * 10 ** torch.rand(1000, dim)
    y[0, 1:] = 0  # a coordinate of all the length
    y[1] = 1
    factor = book.per_rms / y.square().mean(-1).sqrt() + book.per_peak / y.abs().amax(-1)
    grid = y.abs() * factor[:, None]
    assert grid.max() <= book.largest(dim) * (1 + 1e-6)
    assert steps * book.largest(dim) < 0x7C00  # which as a float16 is infinity
    assert dim * (centroid_steps * book.magnitudes[-1]) ** 2 < 2**31
    length = steps * (book.per_rms + book.per_peak) * dim**0.5  # of a vector whose coordinates are equal
    assert steps * grid.norm(dim=-1).max() <= length * (1 + 1e-6)
    assert length * centroid_steps * book.magnitudes[-1] * dim**0.5 < 2**31
    low, high = table_words(bits)
    table = [(low | high << 32) >> 8 * i & 0xFF for i in range(len(book.magnitudes))]
    assert table == [centroid_steps * m for m in book.magnitudes]


def test_only_tensors_of_whole_16_bytes_are_copied():
    x = torch.zeros(2, 66, 3, 128, dtype=torch.bfloat16)
    assert copies_whole(x.transpose(1, 2))
    assert copies_whole(x.transpose(1, 2)[:, :, 1:-1])
    odd = torch.zeros(x.numel() + 8, dtype=torch.bfloat16)
    assert not copies_whole(odd[1:-7].view(x.shape))  # starts between
    assert not copies_whole(torch.zeros(2, 3, 64, 129, dtype=torch.bfloat16)[..., :128])
    assert not copies_whole(x.transpose(2, 3))
