"""`varlen_attn` over keys and values as others keep them: fp8 bytes of a declared format, pages."""

import pytest
import torch
from torch.library import opcheck

import tq_inductor.ops  # noqa: F401
from tq_inductor.foreign_kv import FP8, check_stored

varlen_attn = torch.ops.tq_inductor.varlen_attn
LENGTHS = [5, 0, 9, 1]
CU_Q, CU_K = (torch.tensor([0, *x]).cumsum(0).int() for x in ([3, 2, 4, 1], LENGTHS))
ARGS = (CU_Q, CU_K, 4, 9, True, 0.25)


def qkv(dtype=torch.bfloat16):
    return [torch.randn(n, heads, 16, dtype=dtype) for n, heads in ((10, 4), (15, 2), (15, 2))]


def paged(x, page_size=4):
    """x `[T, heads, D]` in pages `[7, 4, heads, D]` in any order, and its block table."""
    table = torch.full((4, 3), -1, dtype=torch.int32)  # pages that nobody needs may be anything
    pages = torch.full((7, page_size, *x.shape[1:]), 7).to(x.dtype)
    free = [6, 2, 5, 0, 3, 1]
    for row, (start, length) in enumerate(zip(CU_K.tolist(), LENGTHS, strict=False)):
        for i in range(0, length, page_size):
            table[row, i // page_size] = free[-1]
            part = x[start + i : start + min(i + page_size, length)]
            pages[free.pop(), : len(part)] = part
    return pages, table


@pytest.mark.parametrize("kv_format", FP8)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_fp8_of_a_declared_format(kv_format, as_bytes):
    q, k, v = qkv()
    k8, v8 = (x.to(FP8[kv_format]) for x in (k, v))
    expected = varlen_attn(q, k8.to(q.dtype) * 0.5, v8.to(q.dtype) * 4.0, *ARGS)
    stored = [x.view(torch.uint8) if as_bytes else x for x in (k8, v8)]
    got = varlen_attn(q, *stored, *ARGS, "triton", kv_format, 0.5, 4.0)
    torch.testing.assert_close(got, expected)


def test_pages():
    q, k, v = qkv()
    (k_pages, table), (v_pages, _) = paged(k), paged(v)
    got = varlen_attn(q, k_pages, v_pages, *ARGS, block_table=table)
    torch.testing.assert_close(got, varlen_attn(q, k, v, *ARGS))


def test_pages_of_fp8():
    q, k, v = (x.to(torch.float8_e4m3fn) for x in qkv())
    (k_pages, table), (v_pages, _) = paged(k.view(torch.uint8)), paged(v.view(torch.uint8))
    q = q.to(torch.bfloat16)
    got = varlen_attn(q, k_pages, v_pages, *ARGS, kv_format="e4m3", block_table=table)
    torch.testing.assert_close(got, varlen_attn(q, k.to(q.dtype), v.to(q.dtype), *ARGS))


def test_opcheck():
    q, k, v = qkv(torch.float32)
    (k_pages, table), (v_pages, _) = paged(k), paged(v)
    opcheck(varlen_attn.default, (q, k_pages, v_pages, *ARGS), {"block_table": table})
    stored = [x.to(torch.float8_e5m2).view(torch.uint8) for x in (k, v)]
    opcheck(varlen_attn.default, (q, *stored, *ARGS, "triton", "e5m2", 0.5, 2.0))


@pytest.mark.parametrize(
    ("dtype", "kv_format", "message"),
    [
        (torch.uint8, None, r"torch.uint8, queries torch.bfloat16: say kv_format \(e4m3, e5m2\)"),
        (torch.float8_e4m3fn, None, "say kv_format"),
        (torch.uint8, "nvfp4", "'nvfp4' is none of e4m3, e5m2"),
        (torch.float8_e5m2, "e4m3", "'e4m3' of a tensor of torch.float8_e5m2"),
        (torch.bfloat16, "e4m3", "'e4m3' of a tensor of torch.bfloat16"),
    ],
)
def test_bytes_are_never_guessed(dtype, kv_format, message):
    x = torch.zeros(15, 2, 16, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        check_stored(x, torch.bfloat16, kv_format, None)


def test_pages_need_a_block_table():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="belong together"):
        varlen_attn(q, paged(k)[0], paged(v)[0], *ARGS)
