"""Which calls the wgmma kernel for prompts takes; its results are checked by `kernel_checks` on a GPU."""

from unittest import mock

import pytest
import torch
from tq_inductor.kernels import attend_wgmma
from tq_inductor.kernels.attend_wgmma import LEAST_KEYS

from tq_inductor.reference_masks import pack_mask

KEYS = 2 * LEAST_KEYS
# Two KV heads of four queries: the fewest tokens in blocks of 32 that are enough for 132 multiprocessors.
QUERIES = 1600
SIZES = (1, 2, KEYS, 128)


def heads_of(x: torch.Tensor) -> torch.Tensor:
    """`[B, L, H, D]` as projections leave it, `[B, H, L, D]`."""
    return x.transpose(1, 2)


def on_an_h200():
    """What decides sees one."""
    return mock.patch.multiple(attend_wgmma, has_wgmma=lambda _: True, sm_count=lambda _: 132)


def taken(**changes):
    """Whether a call is taken that differs from one that is by these arguments."""
    q_len, dim, dtype = (changes.pop(name, usual) for name, usual in USUAL.items())
    q = torch.empty(1, 8, q_len, dim, dtype=dtype)
    k = torch.empty(1, 2, KEYS, dim, dtype=dtype)
    call = dict(k=k, v=k, attn_mask=None, sinks=None, scale=0.1, softcap=None, lse=None)
    with on_an_h200():
        return attend_wgmma.takes(q, **(call | changes))


USUAL = {"q_len": QUERIES, "dim": 128, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16},
        {"attn_mask": pack_mask(torch.ones(QUERIES, KEYS, dtype=torch.bool))},
        {"attn_mask": torch.ones(1, 1, 1, KEYS, dtype=torch.bool)},
        {"v": heads_of(torch.empty(1, KEYS, 2, 64, dtype=torch.bfloat16))},
        {"k": torch.empty(2 * KEYS * 128, dtype=torch.bfloat16).as_strided(SIZES, (3, KEYS * 128, 128, 1))},
    ],
    ids=["plain", "float16", "bits", "keys", "values as projected", "any stride of one row"],
)  # fmt: skip
def test_what_it_takes(changes):
    assert taken(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_len": QUERIES - 32},
        {"dim": 80},
        {"dim": 64, "k": torch.empty(1, 2, KEYS, 64, dtype=torch.bfloat16)},
        {"dtype": torch.float32},
        {"v": torch.empty(1, 2, KEYS, 128, dtype=torch.float16)},
        {"attn_mask": torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool)},
        {"attn_mask": torch.zeros(1, 1, 1, KEYS)},
        {"sinks": torch.zeros(8)},
        {"softcap": 30.0},
        {"lse": torch.zeros(1, 8, QUERIES)},
        {"scale": -0.1},
        {"k": torch.empty(1, 2, KEYS * 128 + 1, dtype=torch.bfloat16)[..., 1:].unflatten(2, (KEYS, 128))},
        {"k": torch.empty(1, 2, 128, KEYS, dtype=torch.bfloat16).mT},
        {"k": torch.empty(1, 1, KEYS, 128, dtype=torch.bfloat16).expand(1, 2, -1, -1)},
    ],
    ids=[
        *(
            "few blocks",
            "dim 80",
            "dim 64",
            "float32",
            "unlike dtypes",
            "any mask",
            "float mask",
            "sinks",
            "softcap",
        ),
        *("lse", "negative scale", "unaligned", "dims apart", "expanded"),
    ],
)
def test_what_it_leaves_to_the_portable_kernel(changes):
    assert not taken(**changes)


def test_few_keys_stay_with_the_portable_kernel():
    q, k = (torch.empty(64, heads, LEAST_KEYS - 1, 128, dtype=torch.bfloat16) for heads in (8, 2))
    with on_an_h200():
        assert not attend_wgmma.takes(q, k, k, None, None, 0.1, None, None)


def test_decoding_stays_with_the_portable_kernel():
    q, k = (torch.empty(64, heads, n, 128, dtype=torch.bfloat16) for heads, n in ((8, 1), (2, KEYS)))
    with on_an_h200():
        assert not attend_wgmma.takes(q, k, k, None, None, 0.1, None, None)


def test_other_gpus_keep_the_portable_kernel():
    q, k = (torch.empty(1, heads, KEYS, 128, dtype=torch.bfloat16) for heads in (8, 2))
    assert not attend_wgmma.takes(q, k, k, None, None, 0.1, None, None)
