"""Checks of the Triton kernels against the reference, and a script that runs them.

    python tests/kernel_checks.py --interpret [GROUP...]   on CPU tensors, in Triton's interpreter
    python tests/kernel_checks.py [GROUP...] [--shard I/N] on the GPU, the longer list; --small: the same

A script because Triton decides on the interpreter when a kernel is decorated, once per process.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    if "--interpret" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
import triton.language as tl
from kernel_cases import (
    APPEND_GPU,
    APPEND_INTERPRETED,
    ATTEND_GPU,
    ATTEND_INTERPRETED,
    BF16,
    DECODE_GPU,
    DECODE_INTERPRETED,
    DEQUANTIZE_GPU,
    DEQUANTIZE_INTERPRETED,
    EXACT_GPU,
    EXACT_INTERPRETED,
    FP16,
    FP32,
    LARGE_GPU,
    PIECES_GPU,
    PIECES_INTERPRETED,
    PREFILL_GPU,
    PREFILL_INTERPRETED,
    STORE_GPU,
    STORE_INTERPRETED,
    VARLEN_GPU,
    VARLEN_INTERPRETED,
    Case,
    Ragged,
)
from kernel_inputs import (
    block_table,
    empty_beside,
    exact_tokens,
    filled_cache,
    garbage_cache,
    lengths,
    make_bounds,
    make_mask,
    make_sinks,
    moved,
    nan_filled_memory,
    on,
    random_vectors,
    rotations,
)
from tq_inductor.kernels import attend_wgmma, decode_warp, prefill_pieces
from tq_inductor.kernels.append import append_and_attend
from tq_inductor.kernels.bits import fp8_byte, fp8_value
from tq_inductor.kernels.decode import attend, decode
from tq_inductor.kernels.decode_query import store_and_rotate
from tq_inductor.kernels.decode_warp import takes, warp_split
from tq_inductor.kernels.dequantize import dequantize
from tq_inductor.kernels.exact import exact_positions, exact_work
from tq_inductor.kernels.pack_mask import pack_mask as pack_mask_by_kernel
from tq_inductor.kernels.pages import tokens_of_page
from tq_inductor.kernels.store import store
from tq_inductor.kernels.store_prompt import LEAST_TOKENS
from tq_inductor.kernels.unpacked import attend_unpacked
from tq_inductor.kernels.varlen import varlen_attention

from tq_inductor import codec, reference, reference_attention
from tq_inductor.beside import DECODE_TOKENS, SEGMENT
from tq_inductor.format import round_up
from tq_inductor.reference_masks import last_tokens, pack_mask, visible_keys
from tq_inductor.reference_pages import has_no_page, rows_of


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, roundings: int = 1
) -> None:
    """Relative error of the whole tensor (float64 oracle), NaN and zero rows exactly where expected.

    For 16-bit outputs at most 2e-3, or where operands too are rounded (`roundings` in all, independent
    of each other) 1.2 times what that many roundings of the oracle to the dtype give.
    """
    actual = actual.cpu().to(torch.float64)
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in the wrong places"
    assert not actual[(expected == 0).all(-1)].any(), "rows that see nothing are not zero"
    error = (actual - expected).nan_to_num().norm() / expected.nan_to_num().norm().clamp(min=1e-30)
    tolerance = 1e-5 if dtype == FP32 else 2e-3
    if dtype != FP32 and roundings > 1:
        exact = expected.nan_to_num()
        rounding = (exact.to(dtype).double() - exact).norm() / exact.norm().clamp(min=1e-30)
        tolerance = max(tolerance, 1.2 * roundings**0.5 * rounding.item())
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def empty_lse(case: Case, device: str) -> torch.Tensor:
    """Where a kernel puts the LSE of a case."""
    return torch.full((case.batch, case.heads, case.q_len), 7.0, device=device)


def assert_lse_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """NaN and -inf exactly where expected; elsewhere an error of 2e-3, or of so much of a large LSE."""
    tolerance = 1e-5 if dtype == FP32 else 2e-3
    close = torch.isclose(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert close.all(), f"{(~close).sum()} of {close.numel()} LSEs are wrong"


def check_store(case: Case, device: str) -> None:
    """The bytes are the reference's, but for codes that rounding moves over a decision boundary."""
    fmt = case.format
    shape = (case.batch, case.kv_heads, case.q_len)
    k = random_vectors((*shape, fmt.head_dim), case.dtype, device, "transposed")
    view = "dense" if case.q_len >= LEAST_TOKENS else "strided"  # which `store_prompt` does not take
    v = random_vectors((*shape, fmt.v_head_dim), case.dtype, device, view)
    if case.q_len > 8:
        tiny, huge = (6e-8, 6e4) if case.dtype == FP16 else (1e-30, 1e30)
        for x in (k, v):
            for i, factor in enumerate((tiny, huge, 0.0, float("nan"), float("inf"))):
                x[:, :, 2 + i] *= factor
            x[0, 0, 7, 1:] = 0  # one-hot: flat after the rotation
            x[0, 0, 8, -1] = float("nan")
    before, beside = garbage_cache(case, "cpu"), empty_beside(case)
    if any(case.exact) and case.q_len <= DECODE_TOKENS:  # a mean may be that of stored tokens
        before, beside = filled_cache(case, "cpu")
    expected, actual, got_beside = before.clone(), before.to(device), moved(beside, device)
    table, last = block_table(case, "cpu"), (fmt, beside, block_table(case, "cpu"))
    reference.store(expected, k.cpu(), v.cpu(), lengths(case, "cpu"), *rotations(case, "cpu"), *last)
    last = (fmt, got_beside, block_table(case, device))
    store(actual, k, v, lengths(case, device), *rotations(case, device), *last)
    if any(case.exact):
        tolerance = {BF16: 2**-8, FP16: 2**-11, FP32: 1e-5}[case.dtype]
        assert torch.allclose(got_beside.k_mean.cpu(), beside.k_mean, rtol=tolerance, atol=1e-6), "mean"
        copies = [x.exact.cpu().nan_to_num(nan=7.0) for x in (got_beside, beside)]
        assert torch.equal(*copies), "exact tokens"
        assert torch.equal(got_beside.exact_from.cpu(), beside.exact_from), "exact_from"
    old, want, got = (reference._planes(x.cpu(), fmt) for x in (before, expected, actual))
    tokens = round_up(case.max_len)
    if table is not None:
        assert torch.equal(actual[0].cpu(), before[0]), "the page that is nobody's"
        old, want, got = (
            {name: rows_of(plane, table) for name, plane in x.items()} for x in (old, want, got)
        )
        tokens = case.page * table.shape[1]
    slot = torch.arange(tokens)
    lens = lengths(case, "cpu").expand(case.batch)[:, None]
    written = (slot >= lens - case.q_len) & (slot < lens)
    if table is not None:
        written &= ~has_no_page(table, case.page, tokens)
    written = written[:, None].expand(-1, case.kv_heads, -1)
    for side, bits in (("k", fmt.k_bits), ("v", fmt.v_bits)):
        rows = [x[f"{side}_rows"].view(torch.uint8) for x in (old, want, got)]
        if side == "v" and not fmt.is_lossless:
            rows = [x.transpose(-1, -2).flatten(2, 3) for x in rows]
        assert torch.equal(rows[2][~written], rows[0][~written]), f"{side}: another token's bytes"
        if fmt.is_lossless:
            values = [x[f"{side}_rows"][written].nan_to_num(7.0) for x in (want, got)]
            assert torch.equal(*values), f"{side}: not a plain conversion"
            continue
        codes = [codec.unpack(x[written], bits) for x in rows[1:]]
        wrong = (codes[0] != codes[1]).float().mean()
        assert wrong < 1e-3, f"{side}: {wrong:.2%} of the codes differ"
        scales = [x[f"{side}_scales"] for x in (old, want, got)]
        assert torch.equal(*(x[~written].view(torch.int16) for x in scales[::2])), f"{side}: scales"
        want_scale, got_scale = (x[written].float() for x in scales[1:])
        # Where a code is another one, at a boundary, the scale is the least-squares fit of these codes.
        for at in (codes[0] != codes[1]).any(-1).nonzero()[:, 0].tolist():
            row, token = written.nonzero()[at, :2], written.nonzero()[at, 2]
            token = token - (lengths(case, "cpu").expand(case.batch)[row[0]] - case.q_len)
            x = (k if side == "k" else v)[row[0], row[1], token].cpu().double()
            if side == "k" and got_beside.k_mean is not None:
                x = x - got_beside.k_mean[row[0], row[1], written.nonzero()[at, 2] // SEGMENT].cpu()
            y = x @ rotations(case, "cpu")[side == "v"].double()
            c = codec.centroids_of(codes[1][at], bits).double()
            want_scale[at] = y @ c / (c @ c)
        ulps = torch.ones(len(want_scale))
        if side == "k" and beside.k_mean is not None:  # a mean that rounds to its other neighbour
            moved_mean = (got_beside.k_mean.cpu() != beside.k_mean).any(-1)
            ulps += moved_mean[..., (slot // SEGMENT).clamp(max=beside.segments - 1)][written]
        close = (got_scale - want_scale).abs() <= want_scale.abs() * ulps * 2**-7
        close |= (got_scale == want_scale) | (got_scale.isnan() & want_scale.isnan())
        assert close.all(), f"{side}: {(~close).sum()} scales are more than one bf16 ulp away"


def check_dequantize(case: Case, device: str) -> None:
    """`reference.load` in the dtype asked for, zero past the lengths; long chunks as they came."""
    fmt, (cache, beside) = case.format, filled_cache(case, device)
    own = None
    if case.q_len > DECODE_TOKENS:
        shape = (case.batch, case.kv_heads, case.q_len)
        own = (
            random_vectors((*shape, fmt.head_dim), case.dtype, device, "transposed"),
            random_vectors((*shape, fmt.v_head_dim), case.dtype, device, "strided"),
        )
    with nan_filled_memory():
        results = dequantize(
            cache, lengths(case, device), *rotations(case, device), fmt, case.max_len, case.dtype,
            moved(beside, device), block_table(case, device), own,
        )  # fmt: skip
    own = None if own is None else (own[0].cpu(), own[1].cpu())
    lens, last = lengths(case, "cpu"), (beside, block_table(case, "cpu"), own)
    expected = reference.load(cache.cpu(), lens, *rotations(case, "cpu"), fmt, case.max_len, *last)
    for actual, wanted in zip(results, expected, strict=True):
        wanted = reference.poison_overfull(wanted, lens, case.max_len)
        assert actual.dtype == case.dtype
        assert_close(actual, wanted.double(), case.dtype)


def check_decode(case: Case, device: str) -> None:
    """Attention in float64 over what the reference loads from the same bytes, and its LSE."""
    fmt, (cache, beside) = case.format, filled_cache(case, device)
    q = random_vectors((case.batch, case.heads, case.q_len, case.dim), case.dtype, device, "transposed")
    mask = make_mask(case)
    bounds, sinks = make_bounds(case, mask), make_sinks(case)
    scale, lse = 1.5 / case.dim**0.5, empty_lse(case, device)
    fewer = mock.patch.object(decode_warp, "sm_count", return_value=case.sms) if case.sms else nullcontext()
    with nan_filled_memory(), fewer:
        actual = decode(
            q, cache, lengths(case, device), *rotations(case, device), *on(device, mask, bounds, sinks),
            fmt, case.max_len, scale, moved(beside, device), case.softcap, block_table(case, device), lse,
        )  # fmt: skip
    assert actual.dtype == case.dtype
    lens, last = lengths(case, "cpu"), (beside, block_table(case, "cpu"))
    k, v = reference.load(cache.cpu(), lens, *rotations(case, "cpu"), fmt, case.max_len, *last)
    if mask is None and bounds is None:
        bounds = last_tokens(lens, case.batch, case.q_len)
    expected = float64_attention(q, k, v, mask, bounds, sinks, scale, case.softcap)
    expected, expected_lse = (reference.poison_overfull(x, lens, case.max_len) for x in expected)
    assert_close(actual, expected, case.dtype)
    assert_lse_close(lse, expected_lse, case.dtype)


def check_append(case: Case, device: str) -> None:
    """What is stored is `store`'s, and the result, the same each time, is the attention over it.

    Of more than `DECODE_TOKENS` tokens, over what was stored before and the tokens as they came.
    """
    fmt, (cache, beside) = case.format, filled_cache(case, device)
    lens, turns = lengths(case, device), rotations(case, device)
    q, k, v = (
        random_vectors((case.batch, heads, case.q_len, dim), case.dtype, device, "transposed")
        for heads, dim in (
            (case.heads, case.dim),
            (case.kv_heads, case.dim),
            (case.kv_heads, fmt.v_head_dim),
        )
    )
    stored, stored_beside, beside = cache.clone(), moved(beside, device), moved(beside, device)
    table = block_table(case, device)
    store(stored, k, v, lens, *turns, fmt, stored_beside, table)
    scale, own = 1.5 / case.dim**0.5, case.q_len > DECODE_TOKENS
    mask = make_mask(case)
    bounds, sinks = make_bounds(case, mask), make_sinks(case)
    visible = on(device, mask, bounds, sinks)
    last = (*visible, fmt, case.max_len, scale, beside, case.softcap, table, own)
    with nan_filled_memory():
        actual = append_and_attend(cache, q, k, v, lens, *turns, *last)
    if device != "cpu":  # in the interpreter nothing races
        again = append_and_attend(cache, q, k, v, lens, *turns, *last)
        assert torch.equal(actual.nan_to_num(7.0), again.nan_to_num(7.0)), "another result, same inputs"
    assert torch.equal(cache, stored)
    for mine, other in zip(beside[:3], stored_beside[:3], strict=True):
        assert mine is None or torch.equal(mine.nan_to_num(7.0), other.nan_to_num(7.0)), "beside"
    lens, own_tokens = lens.cpu(), (k.cpu(), v.cpu()) if own else None
    last = (moved(beside, "cpu"), block_table(case, "cpu"), own_tokens)
    keys, values = reference.load(cache.cpu(), lens, *rotations(case, "cpu"), fmt, case.max_len, *last)
    if mask is None and bounds is None:
        bounds = last_tokens(lens, case.batch, case.q_len)
    expected, _ = float64_attention(q, keys, values, mask, bounds, sinks, scale, case.softcap)
    expected = reference.poison_overfull(expected, lens, case.max_len)
    assert_close(actual, expected, case.dtype, roundings=2 if own else 1)  # the weights of the chunk


def check_pieces(case: Case, device: str) -> None:
    """`check_append`; small pieces are of one tile of a row, which many programs unpack."""
    sizes = {"WORKSPACE": 1, "LEAST_PIECE": 1, "UNPACK_PROGRAMS_PER_SM": 1000} if case.small_pieces else {}
    if device == "cpu" and case.small_pieces:  # the largest tiles too
        sizes["is_roomy"] = lambda device: True
    with mock.patch.multiple(prefill_pieces, LEAST_ROWS=1, **sizes):
        check_append(case, device)


def check_exact(case: Case, device: str) -> None:
    """Exact tokens alone: by `unpacked`, and by the launch that attends to packed ones (not interpreted).

    The latter with the new ones stored in the launch before it, which it does not wait for: what that
    overwrites may be old, new or, as here, nothing of the kind; and with all of them stored long ago.
    """
    fmt, (cache, before) = case.format, filled_cache(case, device)
    lens, turns, table = lengths(case, device), rotations(case, device), block_table(case, device)
    shape = (case.batch, case.kv_heads, case.q_len)
    q = random_vectors((case.batch, case.heads, case.q_len, case.dim), case.dtype, device, "strided")
    k, v = (
        random_vectors((*shape, d), case.dtype, device, "transposed") for d in (case.dim, fmt.v_head_dim)
    )
    scale, mask = 1.5 / case.dim**0.5, make_mask(case)
    bounds, beside = make_bounds(case, mask), moved(before, device)
    visible = on(device, mask, None if bounds is None else bounds.expand(case.batch, case.q_len, -1))
    found = []
    with nan_filled_memory():
        queries = store_and_rotate(cache, q, k, v, lens, *turns, fmt, scale, beside, table)
        rest = (*visible, case.max_len, scale, case.softcap, case.kv_heads, fmt.v_head_dim)
        found.append(attend_unpacked(q, None, beside, lens, *rest))
        overwritten = (beside.exact != before.exact.to(device)).any(-1, keepdim=True)
        torn = beside._replace(
            exact=beside.exact.masked_fill(overwritten, float("nan")),
            exact_from=before.exact_from.to(device),
        )
        if takes(q, fmt, case.kv_heads, *visible, tokens_of_page(cache, fmt, table), beside):
            for kept, new in ((beside, None), (beside, (k, v)), (torn, (k, v))):
                work = exact_work(q, case.kv_heads, fmt.v_head_dim, scale, kept, new)
                of_cache = (*visible, case.q_len, fmt, case.max_len, 2, work, kept, case.softcap, table)
                warp_split(queries, cache, lens, *of_cache)
                found.append(work.parts)
    stored, lens, table = moved(before, "cpu"), lens.cpu(), block_table(case, "cpu")
    cache, turns = cache.cpu(), rotations(case, "cpu")
    reference.store(cache.clone(), k.cpu(), v.cpu(), lens, *turns, fmt, stored, table)
    assert torch.equal(beside.exact.cpu().nan_to_num(7.0), stored.exact.nan_to_num(7.0)), "exact tokens"
    keys, values = reference.load(cache, lens, *turns, fmt, case.max_len, stored, table)
    seen = exact_tokens(stored, lens, case.max_len)[:, None, None]
    seen = seen if mask is None else seen & mask
    bounds = last_tokens(lens, case.batch, case.q_len) if bounds is None else bounds
    expected, expected_lse = float64_attention(q, keys, values, seen, bounds, None, scale, case.softcap)
    for parts in found:
        if parts is None:
            assert sum(case.exact) > 256
            continue
        logs = parts.logs.cpu().double()
        log = torch.logsumexp(logs * math.log(2), -1, keepdim=True)
        weights = torch.where(logs.isneginf(), 0.0, (logs * math.log(2) - log).exp())[..., None]
        outputs = torch.where(logs.isneginf()[..., None], 0.0, parts.outputs.cpu().double())
        out, lse = (outputs * weights).sum(3), log
        out, lse = (  # rows are token-major
            x.unflatten(2, (case.q_len, -1)).transpose(2, 3).flatten(1, 2) for x in (out, lse)
        )
        assert_close(out, expected, case.dtype)
        assert_lse_close(lse[..., 0], expected_lse, case.dtype)


@triton.jit
def positions_kernel(
    out_ptr, held_ptr, length, exact_from, new, end, SINKS: tl.constexpr, RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, BLOCK)
    position, held = exact_positions(slot, length, exact_from, new, end, SINKS, RECENT)
    tl.store(out_ptr + slot, position)
    tl.store(held_ptr + slot, held.to(tl.int8))


def check_positions(case: tuple[int, int], device: str) -> None:
    """Which tokens slots hold, of random histories, before and after the last ones are stored."""
    sinks, recent = case
    out, held = torch.zeros(2, 16, dtype=torch.int32, device=device)
    for _ in range(40):
        before, new = (int(torch.randint(low, 30, ())) for low in (0, 1))
        length, exact_from = before + new, int(torch.randint(0, 40, ()))
        first = max(min(exact_from, before), length - recent)
        wanted = {p for p in range(length) if p < sinks or p >= max(first, sinks)}
        for state, tokens in ((exact_from, new), (first, new), (first, 0)):
            positions_kernel[(1,)](out, held, length, state, tokens, length, sinks, recent, BLOCK=16)
            found = {int(p): slot for slot, p in enumerate(out.tolist()) if held[slot]}
            assert set(found) == wanted
            slots = {p: p if p < sinks else sinks + (p - sinks) % recent for p in wanted}
            assert found == slots


def check_large(case: Case, device: str) -> None:
    """The last tokens of a cache whose bytes lie past 2**31 are read as those of a small one."""
    fmt, shape = case.format, (case.batch, case.kv_heads, case.lens[0], case.dim)
    q = torch.randn(case.batch, case.heads, 1, case.dim).to(device, case.dtype)
    k, v = torch.randn(2, *shape).to(device, case.dtype)
    results = []
    for length in (round_up(case.lens[0]), case.max_len):
        cache = torch.zeros(*shape[:2], fmt.slot_bytes * length, dtype=torch.uint8, device=device)
        lens, turns = torch.tensor(length, device=device), rotations(case, device)
        store(cache, k, v, lens, *turns, fmt)
        bounds = torch.tensor([[[length - case.lens[0], length]]], dtype=torch.int32, device=device)
        last = (x[:, :, -1:] for x in (k, v))
        results.append(
            append_and_attend(cache, q, *last, lens, *turns, None, bounds, None, fmt, length, 0.1)
        )
    assert_close(results[1], results[0].double().cpu(), case.dtype)


def check_attend(case: Case, device: str) -> None:
    """Attention in float64 over plain keys and values, with NaN where nothing may read, and its LSE."""
    q = random_vectors((case.batch, case.heads, case.q_len, case.dim), case.dtype, device, "transposed")
    mask = make_mask(case)
    bounds, sinks = make_bounds(case, mask), make_sinks(case)
    k, v = (
        torch.randn(case.batch, case.max_len, case.kv_heads, d).to(device, case.dtype).transpose(1, 2)
        for d in (case.dim, case.v_dim or case.dim)
    )
    scale, lse = 1.5 / case.dim**0.5, empty_lse(case, device)
    expected, expected_lse = float64_attention(q, k, v, mask, bounds, sinks, scale, case.softcap)
    if bounds is not None and case.bounds == "row":  # no tile of 64 slots reaches it
        k[1, :, 128:], v[1, :, 128:] = float("nan"), float("nan")
    with nan_filled_memory(), mock.patch.object(attend_wgmma, "LEAST_FILLED", 0.1):
        for attn_mask in (mask,) if not is_packable(mask) else (mask, pack_mask(mask)):
            actual = attend(q, k, v, *on(device, attn_mask, bounds, sinks), scale, case.softcap, lse)
            assert actual.dtype == case.dtype
            assert_close(actual, expected, case.dtype, roundings=2)  # the weights, the result
            assert_lse_close(lse, expected_lse, case.dtype)


def is_packable(mask: torch.Tensor | None) -> bool:
    """Whether a mask is bool and of several queries."""
    return mask is not None and mask.dtype == torch.bool and mask.shape[-2] > 1


def check_masks(shape: tuple[int, ...], device: str) -> None:
    """Words of a mask however it lies: dense, columns apart, rows shared by heads."""
    mask = torch.rand(shape) < 0.5
    for each in (mask, mask.mT.contiguous().mT, mask[:1].expand(shape)):
        with nan_filled_memory():
            assert torch.equal(pack_mask_by_kernel(each.to(device)).cpu(), pack_mask(each))


def float64_attention(q, k, v, mask, bounds, sinks, scale, softcap) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference on a CPU in float64, with the LSE."""
    visible, bias = visible_keys(mask, bounds, k.shape[2])
    inputs = (x.cpu().double() for x in (q, k, v))
    bias = None if bias is None else bias.double()
    return reference.attention_and_lse(*inputs, visible, scale, bias, sinks, softcap)


def check_varlen(case: Ragged, device: str) -> None:
    """`reference_attention.varlen_attention` in float32 inside, from float64 inputs where it matters."""
    tokens_q, tokens_k = sum(case.q_lens) + 3, sum(case.k_lens) + 3  # three that no sequence has
    q = torch.randn(case.heads, tokens_q, case.dim).to(device, case.dtype).transpose(0, 1)
    k = torch.randn(tokens_k, case.kv_heads, case.dim).to(device, case.dtype)
    v = torch.randn(tokens_k, case.kv_heads, case.v_dim).to(device, case.dtype)
    starts = [
        torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32)
        for lens in (case.q_lens, case.k_lens)
    ]
    k[starts[1][-1] :], v[starts[1][-1] :] = float("nan"), float("nan")
    sizes = (max(case.q_lens), max(case.k_lens), case.causal, case.dim**-0.5)
    with nan_filled_memory():
        actual = varlen_attention(q, k, v, *starts, *sizes)
    assert actual.dtype == case.dtype
    inputs = (x.cpu().float() for x in (q, k, v))
    expected = reference_attention.varlen_attention(*inputs, *(x.cpu() for x in starts), *sizes)
    assert_close(actual, expected.double(), case.dtype, roundings=2)  # the weights, the result


@triton.jit
def fp8_byte_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, fp8_byte(tl.load(x_ptr + place)).to(tl.uint8))


@triton.jit
def fp8_value_kernel(words_ptr, out_ptr, WORDS: tl.constexpr):
    place = tl.arange(0, WORDS)
    word = tl.load(words_ptr + place)
    for i in tl.static_range(4):
        tl.store(out_ptr + place * 4 + i, fp8_value(word, i))


def check_fp8(case: str, device: str) -> None:
    """`fp8_byte` and `fp8_value` convert as torch: all values, ties and their neighbours, both signs."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, 1e3)]
    x = torch.cat([values, ties, *beside])
    x = torch.cat([x, -x, torch.zeros(1024 - 2 * len(x))])
    out = torch.zeros(1024, dtype=torch.uint8, device=device)
    fp8_byte_kernel[(1,)](x.to(device), out, BLOCK=1024)
    assert torch.equal(out.cpu(), x.to(torch.float8_e4m3fn).view(torch.uint8))
    values = torch.full((1024,), float("nan"), device=device)
    fp8_value_kernel[(1,)](out.view(torch.int32), values, WORDS=256)
    assert torch.equal(values.cpu(), x.to(torch.float8_e4m3fn).float())


MASKS = [(2, 3, 5, 70), (3, 33), (1, 1, 4, 32), (1, 4, 300, 257)]
GROUPS = {
    "fp8": (check_fp8, ["every value and tie"], ["every value and tie"]),
    "store": (check_store, STORE_INTERPRETED, STORE_GPU),
    "dequantize": (check_dequantize, DEQUANTIZE_INTERPRETED, DEQUANTIZE_GPU),
    "decode": (check_decode, DECODE_INTERPRETED, DECODE_GPU),
    "append": (check_append, APPEND_INTERPRETED, APPEND_GPU),
    "prefill": (check_append, PREFILL_INTERPRETED, PREFILL_GPU),
    "pieces": (check_pieces, PIECES_INTERPRETED, PIECES_GPU),
    "exact": (check_exact, EXACT_INTERPRETED, EXACT_GPU),
    "slots": (check_positions, [(4, 8), (0, 5), (3, 0), (15, 1)], [(4, 8), (0, 5), (3, 0), (15, 1)]),
    "large": (check_large, [], LARGE_GPU),
    "masks": (check_masks, MASKS, MASKS),
    "attend": (check_attend, ATTEND_INTERPRETED, ATTEND_GPU),
    "varlen": (check_varlen, VARLEN_INTERPRETED, VARLEN_GPU),
}


def run(check, case, device: str) -> None:
    """One case, with its own seed."""
    torch.manual_seed(0)
    check(case, device)


def run_all(groups: list[str], device: str, small: bool, shard: str) -> int:
    """Run the cases of `groups`, print a line each; the number of failures."""
    part, parts = map(int, shard.split("/"))
    failures = 0
    todo = [(g, c) for g in groups for c in GROUPS[g][1 if small else 2]]
    for group, case in todo[part::parts]:
        started = time.perf_counter()
        try:
            run(GROUPS[group][0], case, device)
            result = "ok"
        except Exception as error:
            failures += 1
            result = f"FAILED: {type(error).__name__}: {error}"
        print(f"{group:10} {case} ({time.perf_counter() - started:.1f} s) {result}", flush=True)
    print(f"{failures} of {len(todo[part::parts])} cases failed")
    return failures


def repair_interpreter() -> None:
    """Let `range()` over tensors work: Triton 3.6 calls `int(array)`, which numpy 2.4 refuses.

    Prepare `triton.language` for a device function at its first call, not at each of thousands. And leave
    out the check of every integer operation for overflow, a third of the time: shapes are small here.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair
    call, called = interpreter.InterpretedFunction.__call__, set()

    def prepare_once(self, *args, **kwargs):
        if self.fn in called:
            return self.rewrite()(*args, **kwargs)
        called.add(self.fn)
        return call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = prepare_once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all")
    parser.add_argument("--interpret", action="store_true", help="on the CPU")
    parser.add_argument("--small", action="store_true", help="the cases of --interpret, on the GPU")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth case from the Ith")
    options = parser.parse_args()
    if options.interpret:
        repair_interpreter()
    device = "cpu" if options.interpret else "cuda"
    small = options.interpret or options.small
    return min(1, run_all(options.groups or list(GROUPS), device, small, options.shard))


if __name__ == "__main__":
    sys.exit(main())
