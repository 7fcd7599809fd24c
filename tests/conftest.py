"""Fresh random inputs in every run; pytest shows the seed of a test that fails."""

import gc
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    seed = random.SystemRandom().randrange(2**32)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _dynamo():
    """No test sees sizes that Dynamo made dynamic in another."""
    yield
    torch._dynamo.reset()


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not go over it again while Dynamo traces."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
