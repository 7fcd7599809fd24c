"""Rewrites over ordinary caches and plain calls, and the look-alikes that must not be rewritten."""

from __future__ import annotations

import warnings

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tq_inductor.lowering.rewrite import rewrite

B, HQ, H, L, D = 2, 4, 2, 32, 16
AUTO = {"prefill": "auto", "decode": "auto"}


def rewritten(f, *args, dynamic=None):
    """(rows, body of the graph, result of the rewritten graph)."""
    rows, bodies = [], []

    def backend(gm, example_inputs):
        rows.extend(rewrite(gm, AUTO).rows)
        code = gm.print_readable(print_output=False, include_stride=False, include_device=False)
        bodies.extend(line.split("#")[0].split(";")[0].strip() for line in code.splitlines())
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return rows, [line for line in bodies if " = " in line and "= L_" not in line], result


def check(f, *args, backend, mask=None, changed=True):
    """The one call of `f` goes to `backend`, and the result is eager's; arguments may be written to."""
    again = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    expected = f(*again)
    rows, body, result = rewritten(f, *args)
    (row,) = rows
    assert (row.backend, row.rewritten) == (backend, changed), row
    if mask is not None:
        assert row.mask == mask
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    for x, y in zip(args, again, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x.detach(), y.detach())
    return row, body


def qkv(q_len=1, kv_len=L, kv_heads=H):
    return (
        torch.randn(B, HQ, q_len, D),
        torch.randn(B, kv_heads, kv_len, D),
        torch.randn(B, kv_heads, kv_len, D),
    )


def repeat_kv(x):
    b, h, n, d = x.shape
    return x[:, :, None, :, :].expand(b, h, HQ // h, n, d).reshape(b, HQ, n, d)


def up_to(position, q_len=1):
    """Of a cache with `position` tokens before these: the usual mask `[1, 1, q, L]`."""
    return (torch.arange(L) <= torch.arange(q_len)[:, None] + position)[None, None]


def static_cache_step(q, k_new, v_new, k_cache, v_cache, position):
    """transformers' StaticCache: the mask is made before the length moves on."""
    mask = up_to(position, q.shape[2])
    where = torch.arange(q.shape[2]) + position
    position.add_(q.shape[2])
    k_cache.index_copy_(2, where, k_new)
    v_cache.index_copy_(2, where, v_new)
    return F.scaled_dot_product_attention(q, repeat_kv(k_cache), repeat_kv(v_cache), attn_mask=mask)


def gpt_fast_step(q, k_new, v_new, k_cache, v_cache, position):
    """gpt-fast: a causal table indexed by position, assignment into the cache."""
    where = position + torch.arange(q.shape[2])
    mask = torch.tril(torch.ones(L, L, dtype=torch.bool))[None, None, where]
    k_cache[:, :, where] = k_new
    v_cache[:, :, where] = v_new
    k, v = (x.repeat_interleave(HQ // H, dim=1) for x in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)


def step_arguments(q_len=1, length=9):
    new = [torch.randn(B, h, q_len, D) for h in (HQ, H, H)]
    caches = [torch.randn(B, H, L, D), torch.randn(B, H, L, D)]
    return (*new, *caches, torch.tensor(length))


@pytest.mark.parametrize("q_len", [1, 3, 20])
@pytest.mark.parametrize("step", [static_cache_step, gpt_fast_step])
def test_static_caches_are_read_up_to_their_length(step, q_len):
    args = step_arguments(q_len)
    args[3][:, :, 9 + q_len :] = float("nan")  # eager's result would be NaN
    args[4][:, :, 9 + q_len :] = float("nan")
    clean = [x.nan_to_num() for x in args]
    expected = step(*clean)
    rows, body, result = rewritten(step, *args)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert [row.backend for row in rows] == ["triton"]
    assert rows[0].kv_source == "a static cache, max_len=32"
    assert not any("repeat" in line or ".reshape(" in line for line in body)


def test_snapshot_of_a_static_cache_step():
    _, body, _ = rewritten(static_cache_step, *step_arguments())
    text = "\n".join(body).replace("torch.ops.tq_inductor.", "").replace("l_k_cache_, l_v_cache_", "K, V")
    assert_expected_inline(
        text,
        """\
arange: "i64[32]" = torch.arange(32)
arange_1: "i64[1]" = torch.arange(1)
getitem: "i64[1, 1]" = arange_1[(slice(None, None, None), None)]
add: "i64[1, 1]" = getitem + l_position_
le: "b8[1, 32]" = arange <= add
mask: "b8[1, 1, 1, 32]" = le[(None, None)]
full: "i64[1, 1, 1, 1]" = torch.full((1, 1, 1, 1), 0, dtype = torch.int64, device = device(type='cpu'))
clamp: "i64[]" = l_position_.clamp(-2305843009213693952, 2305843009213693952)
add_2: "i64[]" = clamp + 1
view: "i64[1, 1, 1, 1]" = add_2.view(1, 1, 1, 1)
broadcast_tensors = torch.functional.broadcast_tensors(full, view)
getitem_4: "i64[1, 1, 1, 1]" = broadcast_tensors[0]
getitem_5: "i64[1, 1, 1, 1]" = broadcast_tensors[1]
cat: "i64[1, 1, 1, 2]" = torch.cat([getitem_4, getitem_5], -1)
squeeze: "i64[1, 1, 2]" = cat.squeeze(1)
clamp_1: "i64[1, 1, 2]" = squeeze.clamp(0, 2147483647)
to: "i32[1, 1, 2]" = clamp_1.to(torch.int32)
arange_2: "i64[1]" = torch.arange(1)
where: "i64[1]" = arange_2 + l_position_
add_: "i64[]" = l_position_.add_(1)
index_copy_: "f32[2, 2, 32, 16]" = l_k_cache_.index_copy_(2, where, l_k_new_)
index_copy__1: "f32[2, 2, 32, 16]" = l_v_cache_.index_copy_(2, where, l_v_new_)
attend_default: "f32[2, 4, 1, 16]" = attend.default(l_q_, K, V, None, to, None, 0.25, 'triton')""",
    )


def test_an_opaque_mask_still_bounds_the_reading():
    """`generate` builds the mask outside the graph: fixed shape, meaning unknown."""
    q, k, v = qkv()
    mask = torch.zeros(B, 1, 1, L, dtype=torch.bool)
    mask[0, :, :, 3:9], mask[1, :, :, 5:6] = True, True
    k[:, :, 9:], v[:, :, 9:] = float("nan"), float("nan")

    def f(q, k, v, mask):
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)

    rows, _, result = rewritten(f, q, k, v, mask)
    torch.testing.assert_close(result, f(q, k.nan_to_num(), v.nan_to_num(), mask), rtol=1e-4, atol=1e-5)
    assert rows[0].backend == "triton"


@pytest.mark.parametrize("heads", [1, HQ])
def test_an_opaque_mask_of_many_queries_is_packed_once(heads):
    def f(q, k, v, mask):
        for _ in range(2):
            q = F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)
        return q

    mask = torch.rand(B, heads, 20, 45) < 0.3
    mask[..., 0], mask[:, :, 3], mask[..., 41:] = True, False, False
    rows, body, result = rewritten(f, *(args := (*qkv(20, 45), mask)))
    assert [(row.backend, row.mask) for row in rows] == [("triton", "bool")] * 2
    torch.testing.assert_close(result, f(*args), rtol=1e-4, atol=1e-5)
    assert sum("pack_mask.default" in line for line in body) == 1
    assert sum(" = torch.ops.tq_inductor.attend" in line and "pack_mask" in line for line in body) == 2


@pytest.mark.parametrize("what", ["few queries", "float", "changed since"])
def test_other_opaque_masks_are_not_packed(what):
    def f(q, k, v, mask):
        seen = mask | (torch.arange(L) < 2)
        if what == "changed since":
            seen[..., 7] = True
        if what == "float":
            seen = torch.zeros(()).masked_fill(~seen, float("-inf")) + 0.1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    q_len = 3 if what == "few queries" else 20
    _, body, result = rewritten(f, *(args := (*qkv(q_len), torch.rand(B, 1, q_len, L) < 0.5)))
    assert not any("pack_mask" in line for line in body)
    torch.testing.assert_close(result, f(*args), rtol=1e-4, atol=1e-5)


def test_sizes_that_are_not_known_make_one_graph():
    def f(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    compiled = torch.compile(f, backend="turboquant", dynamic=True)
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Raw Sym")  # a symbol that is passed as if it were a number
        for q_len, kv_len in ((20, 45), (33, 64), (3, 70), (40, 41)):
            q, k = (torch.randn(B, H, n, D) for n in (q_len, kv_len))
            mask = torch.rand(B, 1, q_len, kv_len) < 0.4
            mask[..., 0] = True
            torch.testing.assert_close(compiled(q, k, k, mask), f(q, k, k, mask), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_layers_share_what_the_mask_costs():
    def f(q, k, v, position):
        mask = up_to(position)
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)
        return q

    rows, body, _ = rewritten(f, *qkv(), torch.tensor(5))
    assert [row.backend for row in rows] == ["triton"] * 3
    assert sum("torch.cat(" in line for line in body) == 1


@pytest.mark.parametrize("q_len", [1, 20])
def test_fully_masked_rows_are_eagers(q_len):
    def f(q, k, v, position):
        mask = (torch.arange(L) < position) & (torch.arange(q_len)[:, None] != 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    check(f, *qkv(q_len), torch.tensor(7), backend="triton")
    check(f, *qkv(q_len), torch.tensor(0), backend="triton")


def test_plain_causal_masks_become_the_flag():
    def f(q, k, v):
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)

    _, body = check(f, *qkv(L), backend="sdpa", mask="causal")
    assert "attn_mask = None" in body[-1]
    assert "is_causal = True" in body[-1]
    assert "enable_gqa = True" in body[-1]


def test_masks_that_hide_nothing_go():
    def f(q, k, v):
        mask = torch.arange(L) <= torch.arange(1)[:, None] + L - 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    _, body = check(f, *qkv(), backend="sdpa", mask="none (hides nothing)")
    assert "attn_mask = None" in body[-1]


@pytest.mark.parametrize("offset", [-1, 1])
def test_refuses_causal_off_by_one(offset):
    def f(q, k, v):
        mask = torch.ones(L, L, dtype=torch.bool).tril(offset)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    row, body = check(f, *qkv(L), backend="triton" if offset < 0 else "sdpa", changed=offset < 0)
    assert row.mask == f"causal, offset {offset}"
    assert "is_causal = True" not in body[-1]


def test_the_flag_stays_top_left():
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    check(f, *qkv(3), backend="triton", mask="causal top-left")


def test_causal_with_equal_lengths_is_left_to_sdpa():
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    row, _ = check(f, *qkv(L), backend="sdpa", mask="causal", changed=False)
    assert "nothing to leave unread" in row.not_chosen["triton"][0]


def test_a_window_on_the_wrong_side():
    def f(q, k, v):
        mask = torch.arange(L) >= torch.arange(L)[:, None] + 3
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    check(f, *qkv(L), backend="triton", mask="at most -3 back")


def test_causal_on_some_rows_only():
    def f(q, k, v):
        causal = torch.ones(L, L, dtype=torch.bool).tril()
        mask = torch.where(torch.arange(L)[:, None] < 5, causal, True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    _, body = check(f, *qkv(L), backend="triton")
    assert "is_causal = True" not in body[-1]


def test_refuses_heads_in_another_order():
    def f(q, k, v, position):
        k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=up_to(position))

    _, body = check(f, *qkv(), torch.tensor(5), backend="triton")
    assert sum(".repeat(" in line for line in body) == 2  # the heads stay as they were put


@pytest.mark.parametrize("change", ["before", "after", "between"])
def test_writes_around_the_repetition(change):
    """A repetition is a copy: what happens to the cache after it must not be seen."""

    def f(q, k, v, position):
        mask = up_to(position)
        if change == "before":
            k.mul_(2)
        keys, values = repeat_kv(k), repeat_kv(v)
        if change == "between":
            k.mul_(2)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        if change == "after":
            k.mul_(2)
        return out

    _, body = check(f, *qkv(), torch.tensor(5), backend="triton")
    assert any(".reshape(" in line for line in body) == (change == "between")


def test_keys_changed_after_repetition_by_a_function_with_a_flag():
    def f(q, k, v, position):
        keys, values = repeat_kv(k), repeat_kv(v)
        changed = F.relu(k, True).sum() + F.silu(v, inplace=True).sum()
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=up_to(position)) + changed

    _, body = check(f, *qkv(), torch.tensor(5), backend="triton")
    assert any(".reshape(" in line for line in body)


def test_heads_repeated_once_for_keys_and_values_all_by_name():
    def f(q, k, v, position):
        both = torch.repeat_interleave(input=k, repeats=HQ // H, dim=1)
        return F.scaled_dot_product_attention(q, both, both, attn_mask=up_to(position))

    _, body = check(f, *qkv(), torch.tensor(5), backend="triton")
    assert not any("repeat_interleave" in line for line in body)


def test_inside_vmap_it_stays():
    def one(q, k, v, position):
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=up_to(position))

    def f(q, k, v, position):
        return torch.func.vmap(one, in_dims=(0, 0, 0, None))(q[None], k[None], v[None], position)

    row, _ = check(f, *qkv(), torch.tensor(5), backend="sdpa", changed=False)
    assert row.not_chosen["triton"][0] == "inside torch.func.vmap, grad or jvp"


def test_keys_changed_after_repetition():
    def f(q, k, v, position):
        keys = repeat_kv(k)
        keys.mul_(3)
        return F.scaled_dot_product_attention(q, keys, repeat_kv(v), attn_mask=up_to(position))

    check(f, *qkv(), torch.tensor(5), backend="triton")


def test_the_length_moves_before_and_after_the_mask():
    def f(q, k, v, position):
        position.add_(2)
        mask = up_to(position)
        position.add_(4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    check(f, *qkv(), torch.tensor(5), backend="triton", mask="key length")


def test_the_length_moves_while_the_mask_is_made():
    def f(q, k, v, position):
        low = torch.arange(L) > position
        position.add_(4)
        mask = low & (torch.arange(L) <= position)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=True)

    row, _ = check(f, *qkv(), torch.tensor(5), backend="sdpa", changed=False)
    assert "nothing to leave unread" in row.not_chosen["triton"][0]


def test_the_mask_is_changed_after_it_was_made():
    def f(q, k, v, position):
        mask = up_to(position)
        mask[..., 0] = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    check(f, *qkv(), torch.tensor(5), backend="sdpa", changed=False)


def test_a_mask_that_depends_on_values():
    def f(q, k, v, scores):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=scores > 0, enable_gqa=True)

    for heads in (1, HQ):  # read from the first key to the last that a query sees, and applied
        check(f, *qkv(20), torch.randn(B, heads, 20, L), backend="triton", mask="bool")
    check(f, *qkv(L), torch.randn(B, 1, L, L), backend="sdpa", mask="bool", changed=False)
    check(f, *qkv(), torch.randn(B, 1, 1, L), backend="triton", mask="padding")


@pytest.mark.parametrize("shape", [(L, D), (H, L, D), (1, 1, 1, L, D)])
def test_a_mask_over_keys_of_other_dimensions_stays(shape):
    def f(q, k, mask):
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    q, mask = torch.randn(B, H, 3, D), torch.rand(3, L) < 0.5
    mask[:, 0] = True
    row, _ = check(f, q, torch.randn(shape), mask, backend="sdpa", mask="dense", changed=False)
    assert "dimensions (needs 4" in row.not_chosen["triton"][0]


def test_dropout_is_left_alone():
    def f(q, k, v, position):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=up_to(position), dropout_p=0.5, enable_gqa=True
        )

    rows, _, _ = rewritten(f, *qkv(), torch.tensor(5))
    assert not rows[0].rewritten
    assert "dropout_p=0.5 (needs 0)" in rows[0].not_chosen["triton"]


def test_gradients_are_eagers():
    def f(q, k, v):
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)

    inputs = [x.requires_grad_() for x in qkv(L)]
    rows, _, result = rewritten(f, *inputs)
    assert rows[0].rewritten
    wanted = torch.autograd.grad(f(*inputs).square().sum(), inputs)
    for got, want in zip(torch.autograd.grad(result.square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_call_that_needs_a_gradient_stays_differentiable():
    inputs = [x.requires_grad_() for x in qkv()]

    def f(q, k, v, position):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=up_to(position), enable_gqa=True)

    rows, _, result = rewritten(f, *inputs, torch.tensor(5))
    assert (
        "a gradient is needed and our kernels have none (use torch.no_grad())"
        in rows[0].not_chosen["triton"]
    )
    torch.autograd.grad(result.sum(), inputs)


def test_a_mask_that_needs_a_gradient_keeps_it():
    def f(q, k, v, bias, position):
        mask = torch.where(up_to(position), bias, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    bias = torch.randn(1, 1, 1, L, requires_grad=True)
    args = (*qkv(), bias, torch.tensor(5))
    rows, _, result = rewritten(f, *args)
    assert rows[0].backend == "sdpa"
    torch.testing.assert_close(*(torch.autograd.grad(r.sum(), bias)[0] for r in (result, f(*args))))
    with torch.no_grad():
        rows, _, _ = rewritten(f, *args)
    assert rows[0].backend == "triton"


def test_the_users_choice_of_kernels_is_respected():
    def f(q, k, v, position):
        with sdpa_kernel(SDPBackend.MATH):
            first = F.scaled_dot_product_attention(q, k, v, attn_mask=up_to(position), enable_gqa=True)
        return F.scaled_dot_product_attention(first, k, v, attn_mask=up_to(position), enable_gqa=True)

    rows, _, _ = rewritten(f, *qkv(), torch.tensor(5))
    assert [row.backend for row in rows] == ["sdpa", "triton"]
    assert rows[0].not_chosen["triton"] == ["inside torch.nn.attention.sdpa_kernel(MATH)"]


@pytest.mark.parametrize("how", ["checkpoint", "cond"])
def test_the_users_choice_of_kernels_holds_in_sub_graphs(how):
    def attend(q, k, v, position):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=up_to(position))

    def f(q, k, v, position):
        with sdpa_kernel(SDPBackend.MATH):
            if how == "checkpoint":
                return checkpoint(attend, q, k, v, position, use_reentrant=False)
            return torch.cond(position > 3, attend, lambda *args: attend(*args) * 2, (q, k, v, position))

    rows, _, _ = rewritten(f, *qkv(kv_heads=HQ), torch.tensor(5))
    assert {row.backend for row in rows} == {"sdpa"}
    assert all("sdpa_kernel(MATH)" in row.not_chosen["triton"][0] for row in rows)


def test_autocast_is_left_alone():
    def f(q, k, v, position):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=up_to(position), enable_gqa=True)

    args = (*qkv(), torch.tensor(5))
    rows, _, result = rewritten(f, *args)
    assert "the result torch.bfloat16 (autocast?)" in rows[0].not_chosen["triton"][0]
    assert result.dtype == f(*args).dtype == torch.bfloat16


def test_a_growing_cache_of_any_length_compiles_once():
    count = 0

    def backend(gm, example_inputs):
        nonlocal count
        count += 1
        rewrite(gm, AUTO)
        return gm.forward

    def f(q, k, v):
        mask = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=True)
    for length in (5, 6, 9, 17):
        args = qkv(1, length)
        torch.testing.assert_close(compiled(*args), f(*args), rtol=1e-4, atol=1e-5)
    assert count == 1
