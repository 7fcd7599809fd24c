"""PackedKVCache: eager and compiled, lengths, errors that change nothing, memory."""

import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from tq_inductor import KVFormat, PackedKVCache
from tq_inductor.errors import CacheFullError, CacheMismatchError, FormatError
from tq_inductor.storage import known_length


def make(max_len=32, **kwargs):
    return PackedKVCache(2, 2, 16, max_len, **{"dtype": torch.float32, "device": "cpu", **kwargs})


def new_tokens(q_len, dtype=torch.float32):
    return torch.randn(2, 2, q_len, 16, dtype=dtype), torch.randn(2, 2, q_len, 16, dtype=dtype)


def step(cache, q, k, v):
    keys, values = cache.update(k, v)
    mask = (torch.arange(keys.shape[2], device=q.device) < cache.seq_length)[None]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


def state(cache):
    held = (cache.packed, cache.seq_length, cache.k_mean)
    return [buffer.clone() for buffer in held if buffer is not None]


def assert_unchanged(cache, before):
    assert all(torch.equal(a, b) for a, b in zip(state(cache), before, strict=True))


def test_update_returns_everything_and_zeros_past_the_length():
    cache = make(max_len=30)  # not a whole number of 16-token groups
    k, v = new_tokens(5)
    keys, values = cache.update(k, v)
    assert keys.shape == values.shape == (2, 2, 30, 16)
    assert keys.dtype == torch.float32
    assert cache.seq_length.shape == ()
    assert (cache.seq_length.dtype, int(cache.seq_length)) == (torch.int64, 5)
    assert (keys[:, :, :5] - k).square().mean() < 0.02
    assert keys[:, :, 5:].abs().max() == values[:, :, 5:].abs().max() == 0
    again, _ = cache.update(*new_tokens(3))
    assert torch.equal(again[:, :, :5], keys[:, :, :5])
    assert int(cache.seq_length) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lossless_format_is_lossless(dtype):
    cache = make(kv_format="bf16" if dtype == torch.bfloat16 else "fp16", dtype=dtype)
    k, v = new_tokens(9, dtype)
    keys, values = cache.update(k, v)
    assert torch.equal(keys[:, :, :9], k)
    assert torch.equal(values[:, :, :9], v)


@pytest.mark.parametrize("name", ["k4v4", "bf16"])
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_casting_the_model_around_it_changes_no_byte(cast, name):
    cast_too, alone = make(kv_format=name), make(kv_format=name)
    model = nn.Module()
    model.linear, model.cache = nn.Linear(2, 2), cast_too
    cast(model)
    kv = new_tokens(20)
    for given, expected in zip(cast_too.update(*kv), alone.update(*kv), strict=True):
        assert torch.equal(given, expected)
    assert {b.dtype for b in cast_too.buffers()} == {b.dtype for b in alone.buffers()}


def test_a_module_moves_to_another_device():
    cache = make().half().to("meta")
    assert {buffer.device.type for buffer in cache.buffers()} == {"meta"}
    assert cache.k_rotation.dtype == torch.float32


def test_its_rotation_is_of_its_own_device_whatever_the_default_is():
    with torch.device("meta"):
        cache = make()
    assert {buffer.device.type for buffer in cache.buffers()} == {"cpu"}
    assert torch.equal(cache.k_rotation, make().k_rotation)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
        ({"batch_size": "2"}, "batch_size='2' must be a whole number, at least 1"),
        ({"num_kv_heads": -1}, "num_kv_heads=-1 must be a whole number, at least 1"),
        ({"head_dim": 16.0}, "head_dim=16.0 must be a whole number, at least 1"),
        ({"v_head_dim": 0}, "v_head_dim=0 must be a whole number, at least 1"),
        ({"max_len": 32.5}, "max_len=32.5 must be a whole number, at least 1"),
        ({"dtype": torch.int64}, "dtype=torch.int64 cannot be that of keys and values: give one of"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn cannot be that of keys and values"),
        ({"dtype": "float32"}, "dtype='float32' cannot be that of keys and values"),
    ],
)
def test_sizes_and_dtypes_that_no_cache_can_have(given, message):
    sizes = {"batch_size": 2, "num_kv_heads": 2, "head_dim": 16, "max_len": 32}
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedKVCache(**{**sizes, "device": "cpu", **given})


def test_reset_forgets_everything():
    cache, fresh = make(), make()
    cache.update(*new_tokens(20))
    cache.reset()
    k, v = new_tokens(4)
    for got, expected in zip(cache.update(k, v), fresh.update(k, v), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["k4v4", "k8v4", "k2v3", "bf16"])
def test_nbytes_is_what_the_format_promises(name):
    cache = make(max_len=48, kv_format=name)
    mean = 0 if name == "bf16" else 2 * 2 * 16 * 4  # of keys, in the cache's float32
    assert KVFormat(name, 16).cache_bytes(2, 2, 48) == cache.packed.numel() == cache.nbytes - mean
    assert name in repr(cache)


def test_a_cache_of_float64():
    cache = make(dtype=torch.float64)
    k, v = new_tokens(20, torch.float64)  # enough for a mean of keys
    keys, values = cache.update(k, v)
    assert keys.dtype == values.dtype == torch.float64
    assert (keys[:, :, :20] - k).square().mean() < 0.02


def test_values_with_another_head_dim():
    cache = make(v_head_dim=24)
    k, _ = new_tokens(3)
    keys, values = cache.update(k, torch.randn(2, 2, 3, 24))
    assert (keys.shape[-1], values.shape[-1]) == (16, 24)


def test_a_full_cache_says_so_before_writing():
    cache = make(max_len=30)
    cache.update(*new_tokens(28))
    before = state(cache)
    with pytest.raises(CacheFullError, match=r"holds 28 of at most 30 tokens.*cannot take 3 more"):
        cache.update(*new_tokens(3))
    assert_unchanged(cache, before)
    cache.update(*new_tokens(2))  # exactly full is fine
    with pytest.raises(CacheFullError, match=r"Nothing was written.*larger max_len"):
        cache.update(*new_tokens(1))


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        ((2, 3, 1, 16), (2, 3, 1, 16), "num_kv_heads=2"),
        ((3, 2, 1, 16), (3, 2, 1, 16), "batch_size=2"),
        ((2, 2, 1, 24), (2, 2, 1, 24), "head_dim=16"),
        ((2, 2, 2, 16), (2, 2, 1, 16), "as many in k as in v"),
        ((2, 2, 16), (2, 2, 16), "shape"),
        ((16,), (16,), "shape"),
    ],
)
def test_shapes_that_do_not_fit_change_nothing(k, v, message):
    cache = make()
    cache.update(*new_tokens(2))
    before = state(cache)
    with pytest.raises(CacheMismatchError, match=message):
        cache.update(torch.randn(k), torch.randn(v))
    assert_unchanged(cache, before)


def test_dtype_and_device_that_do_not_fit_change_nothing():
    cache = make()
    before = state(cache)
    with pytest.raises(CacheMismatchError, match=r"bfloat16, but this cache was made for torch.float32"):
        cache.update(*new_tokens(1, torch.bfloat16))
    with pytest.raises(CacheMismatchError, match=r"is on meta, but this cache is on cpu"):
        cache.update(*(x.to("meta") for x in new_tokens(1)))
    assert_unchanged(cache, before)


@pytest.mark.gpu
def test_a_cpu_tensor_to_a_cuda_cache_changes_nothing():
    cache = make(device="cuda")
    before = state(cache)
    with pytest.raises(CacheMismatchError, match=r"is on cpu, but this cache is on cuda:0"):
        cache.update(*new_tokens(1))
    assert_unchanged(cache, before)


def test_unknown_format_and_head_dim():
    with pytest.raises(FormatError, match="unknown kv_format 'k5v5'"):
        make(kv_format="k5v5")
    with pytest.raises(FormatError, match="head_dim=12"):
        PackedKVCache(1, 1, 12, 16, device="cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["k4v4", "k3v2", "k8v8", "bf16"])
def test_compiled_equals_eager_without_a_recompile(name, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    eager, compiled = (make(kv_format=name, device=device, dtype=dtype) for _ in range(2))
    counter = CompileCounterWithBackend("turboquant")
    compiled_step = torch.compile(step, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(16):
            q, k, v = torch.randn(2, 4, 1, 16), *new_tokens(1)
            q, k, v = (x.to(device, dtype) for x in (q, k, v))
            got, expected = compiled_step(compiled, q, k, v), step(eager, q, k, v)
            tolerance = 1e-5 if device == "cpu" else 2e-2
            assert (got - expected).abs().max() < tolerance
    assert counter.frame_count == 1
    assert torch.equal(compiled.packed, eager.packed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_full_cache_is_refused_by_the_compiled_step_too(device):
    cache = make(max_len=18, device=device)
    compiled_step = torch.compile(step, backend="turboquant", fullgraph=True)
    q = torch.randn(2, 4, 1, 16, device=device)
    with torch.no_grad():
        for _ in range(18):
            compiled_step(cache, q, *(x.to(device) for x in new_tokens(1)))
        before = state(cache)
        with pytest.raises(CacheFullError, match="holds 18 of at most 18 tokens"):
            compiled_step(cache, q, *(x.to(device) for x in new_tokens(1)))
        assert_unchanged(cache, before)
        cache.reset()
        compiled_step(cache, q, *(x.to(device) for x in new_tokens(1)))
    assert int(cache.seq_length) == 1


def test_two_updates_in_one_compiled_graph_are_both_counted():
    def twice(cache, k, v):
        cache.update(k, v)
        return cache.update(k, v)[0]

    cache = make(max_len=16)
    compiled = torch.compile(twice, backend="turboquant", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            compiled(cache, *new_tokens(3))
        before = state(cache)
        with pytest.raises(CacheFullError, match="holds 12 of at most 16 tokens and cannot take 6 more"):
            compiled(cache, *new_tokens(3))
    assert_unchanged(cache, before)


def test_a_compiled_reset_makes_room():
    def start_again(cache, k, v):
        cache.reset()
        return cache.update(k, v)[0]

    cache = make(max_len=16)
    cache.update(*new_tokens(16))
    with torch.no_grad():
        torch.compile(start_again, backend="turboquant", fullgraph=True)(cache, *new_tokens(3))
    assert int(cache.seq_length) == 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_no_one_refused_reads_as_nan(backend):
    cache = make(max_len=16)
    compiled = torch.compile(lambda k, v: cache.update(k, v), backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(*new_tokens(14))
        assert not compiled(*new_tokens(2))[0].isnan().any()
        keys, values = compiled(*new_tokens(2))
    assert keys.isnan().all()
    assert values.isnan().all()


@pytest.mark.gpu
def test_the_host_mirror_follows_the_device():
    def step_back(cache, k, v):
        cache.update(k, v)
        cache.seq_length.sub_(1)

    cache = make(device="cuda")
    compiled = torch.compile(step_back, backend="turboquant", fullgraph=True)
    with torch.no_grad():
        for held in (1, 2, 3):
            compiled(cache, *(x.cuda() for x in new_tokens(2)))
            assert known_length(cache.seq_length) == int(cache.seq_length) == held
        cache.update(*(x.cuda() for x in new_tokens(4)))
        assert known_length(cache.seq_length) == int(cache.seq_length) == 7


def test_autocast_does_not_reach_the_ops():
    plain, cast = make(), make()
    k, v = new_tokens(5)
    plain.update(k, v)
    with torch.autocast("cpu", torch.bfloat16):
        cast.update(k, v)
    assert torch.equal(plain.packed, cast.packed)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_through_the_cache_is_an_error(compiled):
    cache = make()
    run = torch.compile(step, backend="turboquant", fullgraph=True) if compiled else step
    k, v = (x.requires_grad_() for x in new_tokens(1))
    out = run(cache, torch.randn(2, 4, 1, 16), k, v)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()
