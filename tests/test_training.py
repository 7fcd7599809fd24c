"""A model trained through the backend learns what it learns without."""

import pytest
import torch
from architectures import ARCHITECTURES
from torch._dynamo.utils import counters

STEPS = 20


def train(padding, compiled):
    """(losses, gradients of the first step)."""
    model = ARCHITECTURES["llama"].build().train()  # without dropout, as Llama is
    if compiled:
        model.compile(backend="turboquant")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = ARCHITECTURES["llama"].inputs(padding)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100)
    losses, gradients = [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), gradients


@pytest.mark.parametrize("padding", ["", "left", "right"])
def test_losses_and_gradients_equal_eager(padding):
    expected_losses, expected_gradients = train(padding, compiled=False)
    counters.clear()
    losses, gradients = train(padding, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["turboquant"]["calls"] == 2
    assert expected_losses[-1] < 0.8 * expected_losses[0]
    assert torch.allclose(losses, expected_losses, rtol=1e-4)
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name
