"""How `decode_warp` shares its work: enough runs for all multiprocessors, none longer than it may be."""

from __future__ import annotations

import pytest
import torch
import triton
from tq_inductor.kernels import decode_warp
from tq_inductor.kernels.segments import MEAN_OF
from tq_inductor.kernels.warp_means import MOST_SEGMENTS
from tq_inductor.kernels.warp_share import WARPS, best_splits, share, shared_bytes

TILE, SEGMENT, MOST_TILES = decode_warp.TILE.value, MEAN_OF.value, decode_warp.MOST_TILES


@pytest.mark.parametrize("groups", [1, 8, 64, 513, 4096])
@pytest.mark.parametrize("tiles", [1, 32, 253, 254, 2048, 20000])
def test_no_run_touches_more_segments_than_have_scores(groups, tiles):
    splits = best_splits(groups, tiles, 528, 2, MOST_TILES)
    run = triton.cdiv(tiles, splits)  # the kernel's, of a row that is full
    for offset in range(SEGMENT // TILE):  # a run starts at any tile of a segment
        assert triton.cdiv((offset + run) * TILE, SEGMENT) <= MOST_SEGMENTS
    if triton.cdiv(tiles, best_splits(groups, tiles, 528, 2, tiles)) <= MOST_TILES:
        assert splits == best_splits(groups, tiles, 528, 2, tiles)


@pytest.mark.parametrize(("groups", "tiles", "splits"), [(8, 32, 32), (64, 512, 16), (8, 2048, 128)])
def test_the_schedulers_have_a_run_or_two_each(groups, tiles, splits):
    assert best_splits(groups, tiles, 528, 2, tiles) == splits


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_multiprocessor_has_room_for_its_share_and_no_more(batch):
    sms, shared, others, device = 132, 8704, 8 * batch, torch.device("cpu")
    splits, spare = share(8 * batch, 32, others, MOST_TILES, shared, sms, device)
    asked = shared + spare + 1024  # which a program takes more than it asks for
    share_of_one = triton.cdiv(8 * batch * splits + others, sms)
    most = min(WARPS, shared_bytes(device) // (shared + 1024))
    assert shared_bytes(device) // asked == min(share_of_one, most)
