"""What a packed cache keeps beside its bytes: a mean of keys, and exact tokens through every history."""

import random

import pytest
import torch

from tq_inductor import PackedKVCache
from tq_inductor.beside import DECODE_TOKENS, LEAST_MEAN_TOKENS, SEGMENT, STRIDE
from tq_inductor.cache_layers import AnnouncedLength, TurboQuantLayer
from tq_inductor.storage import PackedStorage

MAX_LEN = 64
FIRST = LEAST_MEAN_TOKENS


class Model:
    """The rules of `beside` in plain Python: which token each slot holds, and which positions are exact."""

    def __init__(self, sinks: int, recent: int) -> None:
        self.sinks, self.recent = sinks, recent
        self.reset()

    def reset(self) -> None:
        self.tokens, self.slots, self.exact_from = [], {}, 0

    def append(self, new: list[int]) -> None:
        before, self.tokens = len(self.tokens), self.tokens + new
        self.exact_from = max(min(self.exact_from, before), len(self.tokens) - self.recent)
        for position in range(before, len(self.tokens)):
            if position < self.sinks or position >= len(self.tokens) - self.recent:
                self.slots[self.slot(position)] = self.tokens[position]

    def crop(self, removed: int) -> None:
        self.tokens = self.tokens[: len(self.tokens) - removed]

    def slot(self, position: int) -> int:
        if position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % max(self.recent, 1)

    def exact(self) -> list[int]:
        first = max(self.exact_from, len(self.tokens) - self.recent, self.sinks)
        return [p for p in range(len(self.tokens)) if p < self.sinks or p >= first]


def packed_layer(sinks, recent, name="k4v4", max_len=MAX_LEN):
    return TurboQuantLayer(max_len, name, AnnouncedLength(), sinks, recent)


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 0), (0, 7), (3, 5), (4, 32), (2, 1), (70, 9)])
def test_any_history_of_appends_and_crops_reads_the_right_tokens(sinks, recent):
    chance = random.Random(torch.initial_seed())
    known = torch.randn(2000, 2, 2, 2, 16)  # of token i: keys and values `[2, B, Hkv, D]`
    layer, model, next_token = packed_layer(sinks, recent), Model(sinks, recent), 0
    for _ in range(60):
        room, act = MAX_LEN - len(model.tokens), chance.random()
        if act < 0.6 and room:
            new = list(range(next_token, next_token + chance.randint(1, min(room, chance.choice((2, 30))))))
            next_token = new[-1] + 1
            model.append(new)
            layer.update(*known[new].permute(1, 2, 3, 0, 4))
        elif act < 0.95 and model.tokens:
            removed = chance.randint(1, len(model.tokens))
            if removed == len(model.tokens):
                model.reset()
            else:
                model.crop(removed)
            layer.crop(-removed)
        elif layer.is_initialized:
            model.reset()
            layer.reset()
        if not model.tokens:
            continue
        exact = model.exact()
        assert all(model.slots[model.slot(p)] == model.tokens[p] for p in exact)
        expected = known[model.tokens].permute(1, 2, 3, 0, 4)
        for read, raw in zip(layer.read(len(model.tokens)), expected, strict=True):
            assert torch.equal(read[:, :, exact], raw[:, :, exact])
            error = (read - raw).square().sum(-1) / raw.square().sum(-1)
            assert error.max() < 0.2  # the right token everywhere


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [20, 1, 1, 13, 5]])
def test_without_crops_all_sinks_and_recent_tokens_are_exact(chunks):
    layer, k = packed_layer(3, 8), torch.randn(1, 1, sum(chunks), 16)
    for part in k.split(chunks, 2):
        layer.update(part, part)
    equal = (layer.keys == k).all(-1).flatten().tolist()
    assert equal == [True] * 3 + [False] * (sum(chunks) - 11) + [True] * 8


def test_tokens_taken_back_soon_leave_the_others_exact():
    layer, k = packed_layer(0, 8), torch.randn(1, 1, 30, 16)
    layer.update(k, k)
    layer.crop(-5)
    assert (layer.keys == k[:, :, :25]).all(-1).flatten().tolist() == [False] * 22 + [True] * 3
    layer.update(k[:, :, :6], k[:, :, :6])
    assert (layer.keys[:, :, 23:] == torch.cat([k[:, :, 23:25], k[:, :, :6]], 2)).all()


def shifted(tokens, dtype=torch.float32):
    """Keys with a large mean in a few channels, `[2, 2, tokens, 64]`, and values."""
    k = torch.randn(2, 2, tokens, 64)
    k[..., :3] += 40
    return k.to(dtype), torch.randn(2, 2, tokens, 64).to(dtype)


def error_of(cache, k):
    keys = PackedStorage.read(cache, k.shape[2])[0]
    return ((keys - k).square().sum() / k.square().sum()).item()


def means_of(chunks, k, v, max_len=700):
    """The cache, and its means, after these numbers of tokens of k and v were appended at once."""
    cache = PackedKVCache(2, 2, 64, max_len, dtype=torch.float32, device="cpu")
    start = 0
    for count in chunks:
        cache.update(*(x[:, :, start : start + count] for x in (k, v)))
        start += count
    return cache, cache.k_mean


def test_a_chunk_sets_the_means_of_the_segments_that_it_starts():
    k, v = shifted(700)
    k[:, :, SEGMENT:] -= 7
    _, means = means_of((30, 500), k, v)
    assert torch.allclose(means[:, :, 0], k[:, :, :30].mean(2), atol=1e-5)  # and did not change
    assert torch.allclose(means[:, :, 1], k[:, :, SEGMENT : 2 * SEGMENT : 4].mean(2), atol=1e-5)
    assert torch.allclose(means[:, :, 2], k[:, :, 2 * SEGMENT : 530].mean(2), atol=1e-5)
    _, means = means_of((SEGMENT + LEAST_MEAN_TOKENS - 1,), k, v)
    assert torch.equal(means[:, :, 1], means[:, :, 0])  # too few for one of their own
    plain, means = means_of((15,) * 4, k, v)
    assert not means.any()
    assert error_of(means_of((60,), k, v)[0], k[:, :, :60]) < 0.1 * error_of(plain, k[:, :, :60])


def test_a_few_tokens_take_the_mean_of_the_segment_before():
    k, v = shifted(600)
    k[:, :, 30:] += 5
    cache, means = means_of((30, *(3,) * 90), k, v)
    stored = PackedStorage.read(cache, 300)[0][:, :, : SEGMENT - DECODE_TOKENS : STRIDE]
    assert torch.allclose(means[:, :, 1], stored.mean(2), atol=1e-4)
    assert not means[:, :, 2].any()
    other, _ = means_of((30, 14, 16, *(12,) * 20), k, v)
    assert torch.equal(cache.packed, other.packed)  # at once or one by one: the same bytes
    cache.reset()
    keys, _ = cache.update(k[:, :, :3], v[:, :, :3])  # a row starts again, with too few
    assert not cache.k_mean[:, :, 0].any()
    fresh, _ = means_of((3,), k, v)
    assert torch.equal(keys, PackedStorage.read(fresh, keys.shape[2])[0])


def test_means_turn_with_the_keys():
    """In some channels the mean turns by half within the context, as after rotary embeddings."""
    k, v = shifted(700)
    angle = torch.linspace(0, torch.pi, 700)[:, None]
    k[..., :2] += 40 * torch.cat((angle.cos(), angle.sin()), -1) - 40
    mean = k[:, :, :SEGMENT].mean(2, keepdim=True)
    frozen = PackedKVCache(2, 2, 64, 700, dtype=torch.float32, device="cpu")
    frozen.k_mean = None
    frozen.append(k - mean, v)
    frozen_error = (frozen.read(700)[0] + mean - k).square().sum() / k.square().sum()
    for chunks, share in (((700,), 0.2), ((300, 400), 0.2), ((100, *(8,) * 75), 0.9)):  # a segment behind
        assert error_of(means_of(chunks, k, v)[0], k) < share * frozen_error


def test_a_first_chunk_with_values_that_are_not_finite_does_not_spread_them():
    k, v = shifted(FIRST)
    k[0, 1, 3, 2], k[1, 0, 5] = float("nan"), float("inf")
    cache = PackedKVCache(2, 2, 64, MAX_LEN, dtype=torch.float32, device="cpu")
    keys, _ = cache.update(k, v)
    broken = torch.zeros(2, 2, MAX_LEN, dtype=torch.bool)
    broken[0, 1, 3] = broken[1, 0, 5] = True
    assert torch.equal(keys.isnan().any(-1), broken)


def test_rows_take_their_own_means_and_tokens_along():
    layer = packed_layer(2, 4)
    k, v = shifted(FIRST + 9)
    k[1] += 7
    layer.update(k, v)
    means, keys = layer.k_mean.clone(), layer.keys
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.k_mean, means[[1, 1]])
    assert torch.equal(layer.keys, keys[[1, 1]])
    layer.batch_select_indices(torch.tensor([0, 1, 0]))
    assert torch.equal(layer.keys, keys[[1, 1, 1]])
