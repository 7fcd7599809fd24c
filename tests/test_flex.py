"""The attention backend `flex` on a CPU; on a GPU: test_attention_on_gpu.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

from tq_inductor.attention import flex
from tq_inductor.attention.arguments import DenseArguments
from tq_inductor.reference_attention import dense_attention

FULL, CAUSAL = (None, None), (None, 0)


class Passing(TorchDispatchMode):
    """Like the mode in which AOTAutograd runs a graph with custom ops for the first time (torch 2.11)."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

    @classmethod
    def ignore_compile_internals(cls):
        return True


@pytest.fixture
def op():
    """Call with `DenseArguments`: `flex.attend` inside a custom op under `Passing`."""
    asked = []
    with torch.library._scoped_library("tq_test_flex", "FRAGMENT") as library:
        library.define("attend(Tensor q) -> Tensor")
        library.impl("attend", lambda q: flex.attend(asked[-1]).contiguous(), "CompositeExplicitAutograd")

        def call(x):
            asked.append(x)
            with torch.no_grad(), Passing():
                return torch.ops.tq_test_flex.attend(x.q)

        yield call


def masks():
    some = torch.rand(2, 1, 77, 300) < 0.5
    some[0, 0, 3] = False
    return {"none": None, "bool": some, "float": some.float()}


@pytest.mark.parametrize(
    ("mask", "slopes", "alignment", "window", "softcap"),
    [("bool", None, "", FULL, None), ("float", None, "", FULL, 5.0),
     ("none", torch.arange(8) / 100, "bottom-right", (40, 7), None)],
)  # fmt: skip
def test_it_is_compiled_inside_an_op_that_is_watched(op, mask, slopes, alignment, window, softcap):
    q, k, v = (torch.randn(2, heads, n, 32) for heads, n in ((8, 77), (1, 300), (1, 300)))
    x = DenseArguments(q, k, v, masks()[mask], slopes, None, alignment, window, softcap, 0.25)
    torch.testing.assert_close(op(x), dense_attention(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 200, 300), (1, 1, 128, 256), (1, 3, 5, 1)])
def test_blocks_are_those_of_pytorch(shape):
    batch, heads, q_len, kv_len = shape
    seen = torch.rand(shape) < 0.5
    seen[..., : q_len // 2, : kv_len // 2] = False
    seen[..., q_len // 2 :, :] = True

    def mask_mod(b, h, i, j):
        return seen[b, h, i, j]

    ours = flex.block_mask(mask_mod, shape, torch.device("cpu"))
    theirs = torch_flex.create_block_mask(mask_mod, batch, heads, q_len, kv_len, device="cpu")
    assert (ours.shape, ours.seq_lengths) == (theirs.shape, theirs.seq_lengths)
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize(("q_len", "heads", "forced"), [(77, 8, True), (16, 8, False), (17, 8, True)])
def test_few_queries_of_many_heads_take_the_kernel_for_many(monkeypatch, q_len, heads, forced):
    """The one for few has no configuration for more than a block of queries of a KV head."""
    seen = []

    def flex_attention(q, k, v, **kwargs):
        seen.append(kwargs["kernel_options"])
        return q

    monkeypatch.setattr(torch_flex, "flex_attention", flex_attention)
    q, k, v = (torch.zeros(1, h, n, 16) for h, n in ((heads, q_len), (1, 300), (1, 300)))
    flex.flexible(None, False, "bottom-right", CAUSAL, None, 1.0)(q, k, v, None, None)
    assert seen == [{"FORCE_USE_FLEX_ATTENTION": True} if forced else None]
