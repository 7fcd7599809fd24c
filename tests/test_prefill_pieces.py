"""How the workspace of `prefill_pieces` is divided; what the kernels compute is `kernel_checks`'s."""

from __future__ import annotations

import itertools

import pytest
from tq_inductor.kernels import prefill_pieces
from tq_inductor.kernels.prefill_pieces import ALIGNMENT, LEAST_PIECE, WORKSPACE, split_workspace

from tq_inductor.format import KVFormat


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_workspace_is_bounded_and_well_used(dim):
    fmt, align = KVFormat("k4v4", dim), ALIGNMENT.value
    for batch, heads, max_len in itertools.product((1, 3, 64), (1, 8, 40), (1, 129, 4096, 32_768, 1 << 20)):
        together, piece = split_workspace(fmt, batch, heads, max_len)
        used = together * piece * heads * 2 * 2 * dim
        assert used <= WORKSPACE
        assert 1 <= together <= batch
        assert piece % align == 0
        assert piece <= -(-max_len // align) * align
        assert piece >= max_len or piece >= LEAST_PIECE or together == 1
        everything = together == batch and piece >= max_len
        assert everything or used > WORKSPACE // 2


def test_a_piece_is_a_tile_at_least(monkeypatch):
    monkeypatch.setattr(prefill_pieces, "WORKSPACE", 1)
    assert split_workspace(KVFormat("k4v4", 128), 2, 8, 1000) == (1, ALIGNMENT.value)
