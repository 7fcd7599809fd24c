"""The ops: `opcheck` on each, what they compute, and that a backward is refused."""

import re

import pytest
import torch
from torch.library import opcheck

import tq_inductor.ops  # noqa: F401
from tq_inductor.errors import CacheMismatchError
from tq_inductor.format import KVFormat, round_up
from tq_inductor.reference import attention, load
from tq_inductor.rotation import rotation_matrix

ops = torch.ops.tq_inductor
MAX_LEN = 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def cache_arguments(name, device, head_dim=16, v_head_dim=16):
    """(cache, (k, v), (seq_lens, rotations)) with 7 tokens in each of 2 rows."""
    fmt = KVFormat(name, head_dim, v_head_dim)
    shape = (2, 2, round_up(MAX_LEN) * fmt.slot_bytes)
    cache = torch.zeros(shape, dtype=torch.uint8, device=device)
    k, v = (torch.randn(2, 2, 7, d, device=device) for d in (head_dim, v_head_dim))
    rotations = (rotation_matrix(head_dim, device), rotation_matrix(v_head_dim, device))
    return cache, (k, v), (torch.tensor(7, device=device), *rotations)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["k4v4", "k3v2", "bf16"])
def test_opcheck(name, device):
    cache, kv, tail = cache_arguments(name, device)
    q = torch.randn(2, 4, 7, 16, device=device)
    mask = torch.ones(1, 1, 7, MAX_LEN, dtype=torch.bool, device=device)
    opcheck(ops.tq_store.default, (cache, *kv, *tail, name))
    ops.tq_store(cache, *kv, *tail, name)
    opcheck(ops.tq_dequantize.default, (cache, *tail, name, MAX_LEN, torch.float32))
    for op in (ops.tq_decode, ops.tq_decode_lse):
        opcheck(op.default, (q, cache, *tail, None, None, None, name, MAX_LEN, 0.25), {"softcap": 5.0})
    opcheck(ops.tq_append_attend.default, (cache, q, *kv, *tail, mask, None, None, name, MAX_LEN, 0.25))


def beside_arguments(device, head_dims=32, seq_lens=()):
    """(k_mean, exact, exact_from, sink_tokens) with 3 sinks and 2 recent tokens."""
    exact = torch.zeros(2, 2, 5, head_dims, device=device)
    return (
        torch.randn(2, 2, 1, 16, device=device),
        exact,
        torch.zeros(seq_lens, dtype=torch.int64).to(device),
        3,
    )


@pytest.mark.parametrize("shape", [(2, 2, 16), (2, 2, 0, 16), (2, 2, 1, 8), (1, 2, 1, 16)])
def test_means_of_another_shape_are_refused_before_anything_is_written(shape):
    cache, kv, tail = cache_arguments("k4v4", "cpu")
    for call in (
        lambda mean: ops.tq_store(cache, *kv, *tail, "k4v4", mean),
        lambda mean: ops.tq_dequantize(cache, *tail, "k4v4", MAX_LEN, torch.float32, mean),
    ):
        with pytest.raises(ValueError, match="at least 1 segments of 256 tokens, 16"):
            call(torch.zeros(shape))
    assert not cache.any()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_with_what_lies_beside(device):
    cache, kv, tail = cache_arguments("k4v4", device)
    beside, q = beside_arguments(device), torch.randn(2, 4, 7, 16, device=device)
    mean_only = (beside[0], None, None, 0)
    for given in (beside, mean_only):
        opcheck(ops.tq_store.default, (cache, *kv, *tail, "k4v4", *given))
        ops.tq_store(cache, *kv, *tail, "k4v4", *given)
        opcheck(ops.tq_dequantize.default, (cache, *tail, "k4v4", MAX_LEN, torch.float32, *given))
        opcheck(ops.tq_decode.default, (q, cache, *tail, None, None, None, "k4v4", MAX_LEN, 0.25, *given))
        arguments = (cache, q, *kv, *tail, None, None, None, "k4v4", MAX_LEN, 0.25, *given)
        opcheck(ops.tq_append_attend.default, arguments)


def paged_arguments(name, device, page_size=16):
    """(cache in pages, block table): as `cache_arguments`, 3 pages a row; the second row has two."""
    fmt = KVFormat(name, 16)
    cache = torch.zeros(7, 2, page_size * fmt.slot_bytes, dtype=torch.uint8, device=device)
    return cache, torch.tensor([[6, 1, 3], [2, 5, -1]], dtype=torch.int32, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["k4v4", "bf16"])
def test_opcheck_with_a_block_table(name, device):
    _, kv, tail = cache_arguments(name, device)
    cache, table = paged_arguments(name, device)
    q, how = torch.randn(2, 4, 7, 16, device=device), {"block_table": table}
    opcheck(ops.tq_store.default, (cache, *kv, *tail, name), how)
    ops.tq_store(cache, *kv, *tail, name, **how)
    opcheck(ops.tq_dequantize.default, (cache, *tail, name, MAX_LEN, torch.float32), how)
    for op in (ops.tq_decode, ops.tq_decode_lse):
        opcheck(op.default, (q, cache, *tail, None, None, None, name, MAX_LEN, 0.25), how)
    arguments = (cache, q, *kv, *tail, None, None, None, name, MAX_LEN, 0.25)
    opcheck(ops.tq_append_attend.default, arguments, how)


@pytest.mark.parametrize("name", ["k4v4", "k3v8", "bf16"])
def test_pages_hold_what_one_page_a_row_holds(name):
    plain, _, (_, *rotations) = cache_arguments(name, "cpu")
    cache, table = paged_arguments(name, "cpu")
    k, v = torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33, 16)
    q, results = torch.randn(2, 4, 2, 16), []
    for packed, how in ((plain, {}), (cache, {"block_table": table})):
        before = (k[:, :, :20], v[:, :, :20], torch.tensor(20), *rotations, name)
        ops.tq_store(packed, *before, **how)
        lens = torch.tensor([33, 22])
        new = (q, k[:, :, -2:], v[:, :, -2:], lens, *rotations, None, None, None, name, MAX_LEN, 0.25)
        read = ops.tq_dequantize(packed, lens, *rotations, name, MAX_LEN, torch.float32, **how)
        results.append((ops.tq_append_attend(packed, *new, **how), *read))
    for in_one, in_pages in zip(*results, strict=True):
        assert torch.equal(in_one, in_pages)
    assert cache[[0, 4]].eq(0).all()  # in no row


@pytest.mark.parametrize("name", ["k4v4", "bf16"])
def test_a_token_without_a_page_is_not_read_unnoticed(name):
    _, _, (_, *rotations) = cache_arguments(name, "cpu")
    cache, table = paged_arguments(name, "cpu")
    k, v = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    lens, how = torch.tensor(40), {"block_table": table}
    ops.tq_store(cache, k, v, lens, *rotations, name, **how)
    keys, values = ops.tq_dequantize(cache, lens, *rotations, name, MAX_LEN, torch.float32, **how)
    assert keys[1, :, 32:].isnan().all()
    assert keys[1, :, :32].isfinite().all()
    assert values[1, :, 32:].eq(0).all()
    bounds = torch.tensor([[0, 33], [3, 32]], dtype=torch.int32).expand(2, 2, 2)
    out, lse = ops.tq_decode_lse(
        torch.randn(2, 4, 2, 16), cache, lens, *rotations, None, bounds, None, name, MAX_LEN, 0.25, **how
    )
    for x in (out, lse):
        assert x[1, :, 0].isnan().all()  # sees position 32 of the second row
        assert x[0].isfinite().all()
        assert x[1, :, 1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda cache, table: (cache, table.long()), "block_table is torch.int64"),
        (lambda cache, table: (cache, table[:1]), r"needs torch.int32 \[2, pages of a row\]"),
        (lambda cache, table: (cache, table[0]), "block_table is"),
        (lambda cache, table: (cache, table[:, :2]), "a row of the block table has 2 pages of 16 tokens"),
        (lambda cache, table: (cache, table[:, :0]), "a row of the block table has 0 pages"),
        (lambda cache, table: (cache[..., : 8 * 20], table), "page_size=8 is not a multiple of 16"),
        (lambda cache, table: (cache[..., :-1], table), "not a multiple of 16|needs a multiple of"),
        (lambda cache, table: (cache[..., :4], table), "needs a multiple of"),
    ],
)
def test_block_tables_that_are_refused(change, error):
    _, kv, tail = cache_arguments("k4v4", "cpu")
    cache, table = change(*paged_arguments("k4v4", "cpu"))
    before, q, how = cache.clone(), torch.randn(2, 4, 7, 16), {"block_table": table}
    with pytest.raises(ValueError, match=error):
        ops.tq_append_attend(cache, q, *kv, *tail, None, None, None, "k4v4", MAX_LEN, 0.25, **how)
    with pytest.raises(ValueError, match=error):
        ops.tq_decode(q, cache, *tail, None, None, None, "k4v4", MAX_LEN, 0.25, **how)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck_attend(device, sinks):
    q, k, v = (torch.randn(2, heads, n, 16, device=device) for heads, n in ((4, 3), (2, 20), (2, 20)))
    bounds = torch.tensor([[[0, 5], [0, 6], [2, 7]]] * 2, dtype=torch.int32, device=device)
    mask = torch.rand(2, 1, 1, 20, device=device) < 0.7
    sink = torch.randn(4, device=device) if sinks else None
    opcheck(ops.attend.default, (q, k, v, mask, bounds, sink, 0.25, "triton"))
    opcheck(
        ops.attend.default,
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, None, None, sink, 0.25, "triton"),
    )
    opcheck(ops.attend_lse.default, (q, k, v, mask, bounds, sink, 0.25, "triton"), {"softcap": 3.0})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(2, 4, 18, 45), (18, 45)])
def test_attend_reads_bits_as_the_mask_that_they_are_of(device, shape):
    q, k, v = (torch.randn(2, heads, n, 16, device=device) for heads, n in ((4, 18), (2, 45), (2, 45)))
    mask = torch.rand(shape, device=device) < 0.4
    opcheck(ops.pack_mask.default, (mask,))
    words = ops.pack_mask(mask)
    opcheck(ops.attend.default, (q, k, v, words, None, None, 0.25, "triton"))
    results = [ops.attend(q, k, v, m, None, None, 0.25, "triton") for m in (mask, words)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mask", [torch.zeros(3, 40), torch.ones(1, 1, 1, 3, 40, dtype=torch.bool)])
def test_masks_that_cannot_be_packed(mask):
    with pytest.raises(ValueError, match=re.escape(f"{list(mask.shape)}: needs torch.bool")):
        ops.pack_mask(mask)


def test_softcap_and_lse():
    cache, kv, tail = cache_arguments("k4v4", "cpu")
    ops.tq_store(cache, *kv, *tail, "k4v4")
    keys, values = (x[:, :, :7] for x in load(cache, *tail, KVFormat("k4v4", 16), MAX_LEN))
    q, sinks = torch.randn(2, 4, 1, 16), torch.randn(4)
    scores = 3 * torch.tanh(q @ keys.repeat_interleave(2, 1).mT * (0.5 / 3))
    scores = torch.cat((scores, sinks.view(1, 4, 1, 1).expand(2, -1, -1, -1)), -1)
    expected = scores.softmax(-1)[..., :-1] @ values.repeat_interleave(2, 1)
    packed = ops.tq_decode_lse(q, cache, *tail, None, None, sinks, "k4v4", MAX_LEN, 0.5, softcap=3.0)
    plain = ops.attend_lse(q, keys, values, None, None, sinks, 0.5, "triton", softcap=3.0)
    for out, lse in (packed, plain):
        assert torch.allclose(out, expected, atol=1e-5)
        assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)


def test_attention_of_parts_is_merged_by_lse():
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((4, 3), (2, 20), (2, 20)))
    parts = []
    for first, end in ((0, 0), (0, 7), (7, 20)):  # the first sees nothing
        bounds = torch.tensor([[[first, end]]], dtype=torch.int32)
        parts.append(ops.attend_lse(q, k, v, None, bounds, None, 0.25, "triton"))
    assert parts[0][1].eq(-torch.inf).all()
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    merged = (lses.softmax(0)[..., None] * outs).sum(0)
    expected, lse = ops.attend_lse(q, k, v, None, None, None, 0.25, "triton")
    assert torch.allclose(merged, expected, atol=1e-5)
    assert torch.allclose(lses.logsumexp(0), lse, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_softcaps_that_are_refused(softcap):
    cache, kv, tail = cache_arguments("k4v4", "cpu")
    before, q = cache.clone(), torch.randn(2, 4, 7, 16)
    how = {"softcap": softcap}
    with pytest.raises(ValueError, match=r"softcap=.* needs a positive number"):
        ops.tq_decode(q, cache, *tail, None, None, None, "k4v4", MAX_LEN, 0.25, **how)
    with pytest.raises(ValueError, match=r"softcap=.* needs a positive number"):
        ops.tq_append_attend(cache, q, *kv, *tail, None, None, None, "k4v4", MAX_LEN, 0.25, **how)
    with pytest.raises(ValueError, match=r"softcap=.* needs a positive number"):
        ops.attend(q, *kv, None, None, None, 0.25, "triton", **how)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("name", ["k4v4", "bf16"])
@pytest.mark.parametrize(("batch", "q_len"), [(0, 1), (0, 3), (2, 0), (0, 0)])
def test_no_rows_or_no_queries(name, batch, q_len):
    cache, (k, v), (seq_lens, *rotations) = cache_arguments(name, "cpu")
    cache, k, v = cache[:batch], k[:batch, :, :q_len], v[:batch, :, :q_len]
    q = torch.randn(batch, 4, q_len, 16)
    for lens in (seq_lens, seq_lens.expand(batch)):
        tail = (lens, *rotations)
        ops.tq_store(cache, k, v, *tail, name)
        keys, _ = ops.tq_dequantize(cache, *tail, name, MAX_LEN, torch.float32)
        assert keys.shape == (batch, 2, MAX_LEN, 16)
        rest = (None, None, None, name, MAX_LEN, 0.25)
        assert ops.tq_decode(q, cache, *tail, *rest).shape == q.shape
        assert ops.tq_append_attend(cache, q, k, v, *tail, *rest).shape == q.shape


@pytest.mark.parametrize(
    ("k", "v"),
    [
        ((3, 2, 1, 16), (3, 2, 1, 16)),
        ((2, 3, 1, 16), (2, 3, 1, 16)),
        ((2, 2, 1, 24), (2, 2, 1, 24)),
        ((2, 2, 1, 16), (2, 2, 2, 16)),
        ((2, 1, 16), (2, 1, 16)),
    ],
)
def test_tokens_that_do_not_fit_are_refused(k, v):
    cache, _, tail = cache_arguments("k4v4", "cpu")
    k, v, q = torch.randn(k), torch.randn(v), torch.randn(2, 4, 1, 16)
    for op, more in ((ops.tq_store, ()), (ops.tq_append_attend, (MAX_LEN, 0.25))):
        masks = (None, None, None) if more else ()
        queries = (q,) if more else ()
        with pytest.raises(CacheMismatchError, match=r"[kv] has shape .*Nothing was written"):
            op(cache, *queries, k, v, *tail, *masks, "k4v4", *more)
    assert not cache.any()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"v": torch.randn(5, 2, 16)}, "as many tokens and heads in k as in v"),
        ({"k": torch.randn(4, 2, 24)}, "a size of q like that of k"),
        ({"k": torch.randn(4, 3, 16), "v": torch.randn(4, 3, 16)}, "a multiple of k's heads"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 4]).int()}, "needs as many sequences"),
        ({"backend": "fa5"}, "unknown attention backend 'fa5'. Allowed: turboquant, triton, "),
    ],
)
def test_ragged_sequences_that_are_refused(change, error):
    starts = torch.tensor([0, 4]).int()
    good = {
        "q": torch.randn(4, 4, 16), "k": torch.randn(4, 2, 16), "v": torch.randn(4, 2, 16),
        "cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 4, "max_seqlen_k": 4,
        "is_causal": True, "scale": 0.25,
    }  # fmt: skip
    assert ops.varlen_attn(**good).shape == (4, 4, 16)
    with pytest.raises(ValueError, match=error):
        ops.varlen_attn(**{**good, **change})


def test_attend_reads_only_what_is_visible():
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((4, 3), (2, 20), (2, 20)))
    bounds = torch.tensor([[[2, 5], [3, 9], [0, 0]], [[4, 4], [2, 3], [8, 9]]], dtype=torch.int32)
    slot = torch.arange(20)
    visible = (bounds[:, None, :, :1] <= slot) & (slot < bounds[:, None, :, 1:])
    for sinks in (None, torch.randn(4)):
        expected = attention(q.double(), k.double(), v.double(), visible, 0.25, None, sinks)
        dirty = [x.clone() for x in (k, v)]
        for x in dirty:
            x[:, :, :2], x[:, :, 9:] = float("nan"), float("nan")
        out = ops.attend(q, *dirty, None, bounds, sinks, 0.25, "triton")
        assert torch.allclose(out.double(), expected, atol=1e-5)
        assert out[0, :, 2].abs().max() == 0  # sees nothing


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_varlen(device):
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(7, heads, 16, device=device) for heads in (4, 2, 2))
    opcheck(ops.varlen_attn.default, (q, k, v, cu_seqlens, cu_seqlens, 4, 4, True, 0.25))


@pytest.mark.parametrize(("name", "kept"), [("k4v4", False), ("k4v4", True), ("bf16", False)])
def test_decode_equals_dequantize_then_sdpa(name, kept):
    cache, kv, tail = cache_arguments(name, "cpu", v_head_dim=8)
    beside = beside_arguments("cpu", 24) if kept else ()
    ops.tq_store(cache, *kv, *tail, name, *beside)
    keys, values = ops.tq_dequantize(cache, *tail, name, MAX_LEN, torch.float32, *beside)
    if kept:
        assert torch.equal(keys[:, :, [0, 1, 2, 5, 6]], kv[0][:, :, [0, 1, 2, 5, 6]])
    q = torch.randn(2, 4, 3, 16)
    mask = torch.rand(2, 1, 3, MAX_LEN) < 0.3  # slots past the length too: zeros, as SDPA sees them
    mask[0, 0, 1] = False
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    expected[0, :, 1] = 0  # a query that sees nothing gives zeros
    got = ops.tq_decode(q, cache, *tail, mask, None, None, name, MAX_LEN, 0.25, *beside)
    assert torch.allclose(got, expected, atol=1e-5)
    bias = torch.where(mask, torch.randn(2, 1, 3, MAX_LEN), float("-inf"))
    biased = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=bias, scale=0.25, enable_gqa=True
    )
    biased[0, :, 1] = 0
    got = ops.tq_decode(q, cache, *tail, bias, None, None, name, MAX_LEN, 0.25, *beside)
    assert torch.allclose(got, biased, atol=1e-5)


def test_without_a_mask_decode_is_causal_bottom_right():
    cache, kv, (_, *rotations) = cache_arguments("k4v4", "cpu")
    seq_lens = torch.tensor([7, 4])
    ops.tq_store(cache, *kv, seq_lens, *rotations, "k4v4")
    q = torch.randn(2, 4, 3, 16)
    got = ops.tq_decode(q, cache, seq_lens, *rotations, None, None, None, "k4v4", MAX_LEN, 0.25)
    keys, values = load(cache, seq_lens, *rotations, KVFormat("k4v4", 16), MAX_LEN)
    for row, length in enumerate(seq_lens.tolist()):
        visible = torch.arange(MAX_LEN) <= torch.arange(length - 3, length)[:, None]
        one = slice(row, row + 1)
        expected = attention(q[one].double(), keys[one].double(), values[one].double(), visible, 0.25)
        assert torch.allclose(got[one].double(), expected, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen_equals_one_by_one(is_causal):
    lens_q, lens_k = [3, 0, 5, 1], [4, 2, 5, 0]
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    q, k, v = torch.randn(9, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 24)
    out = ops.varlen_attn(q, k, v, cu_q, cu_k, 5, 5, is_causal, 0.25)
    assert out.shape == (9, 4, 24)
    for i, (q_len, k_len) in enumerate(zip(lens_q, lens_k, strict=True)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        mask = torch.ones(q_len, k_len).tril(k_len - q_len).bool() if is_causal else None
        if k_len:
            parts = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            expected = torch.nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=mask, scale=0.25, enable_gqa=True
            )
            assert torch.allclose(out[rows], expected[0].transpose(0, 1), atol=1e-5)
    assert out[8].abs().max() == 0  # no key at all


def test_backward_is_refused():
    cache, kv, tail = cache_arguments("k4v4", "cpu")
    ops.tq_store(cache, *kv, *tail, "k4v4")
    q = torch.randn(2, 4, 1, 16, requires_grad=True)
    out = ops.tq_decode(q, cache, *tail, None, None, None, "k4v4", MAX_LEN, 0.25)
    with pytest.raises(RuntimeError, match=r"no backward.*torch.no_grad"):
        out.sum().backward()
    out, _ = ops.attend_lse(q, *kv, None, None, None, 0.25, "triton")
    with pytest.raises(RuntimeError, match=r"no backward.*torch.no_grad"):
        out.sum().backward()
