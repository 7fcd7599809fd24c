"""How far a compiled model's logits may be from an eager one's over a packed cache."""

from collections.abc import Iterable

import torch

from tq_inductor.storage import PackedStorage


def assert_equal_but_for_codes(
    got: torch.Tensor,
    expected: torch.Tensor,
    caches: Iterable[PackedStorage],
    expected_caches: Iterable[PackedStorage],
    oracle: torch.Tensor,
) -> None:
    """Logits `[steps, B, ..., V]` of the same tokens, in float32 on a CPU or bf16 on a GPU; their caches.

    In float32 they differ by rounding, 1e-4 of the largest at most, in every row of the batch that stored
    the same bytes. Now and then a value lies so near the border of two codes that rounding decides; then
    few bytes differ, and the row by what follows from them. In 16 bits rounding decides everywhere: they
    may differ by twice what `expected` is away from `oracle`, the logits of the same model in float32.
    """
    errors = (got - expected).abs().flatten(2).amax((0, 2)) / expected.abs().max()  # [B]
    if expected.dtype != torch.float32:
        own = (expected - oracle).abs().max() / expected.abs().max()
        assert errors.max() <= max(0.02, 2 * own), (errors, own)
        return
    pairs = zip(caches, expected_caches, strict=True)
    differ = torch.cat([(a.packed != b.packed).flatten(1) for a, b in pairs], 1)
    assert differ.float().mean() <= 0.01, "other codes were stored"
    assert (errors <= torch.where(differ.any(1), 0.02, 1e-4)).all(), errors
