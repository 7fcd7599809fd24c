"""Chunks of a prompt over a packed cache: they see themselves as they came, and nothing is dequantized."""

from __future__ import annotations

import functools

import pytest
import torch
from architectures import ARCHITECTURES
from expecttest import assert_expected_inline
from torch.library import opcheck
from torch.nn import functional as F
from tq_inductor.lowering.rewrite import rewrite

from tq_inductor import KVFormat, PackedKVCache, TurboQuantCache
from tq_inductor.beside import DECODE_TOKENS

LONG = DECODE_TOKENS + 1
OPS = torch.ops.tq_inductor


def make_cache(max_len=64, **changes):
    return PackedKVCache(2, 2, 16, max_len, **{"dtype": torch.float32, "device": "cpu", **changes})


def tokens(count, heads=2):
    return torch.randn(2, heads, count, 16)


def attend(cache, q, k, v, readers=1):
    """As a hand-written model does; several layers may read what one of them appended."""
    keys, values = cache.update(k, v)
    places = cache.seq_length - q.shape[2] + torch.arange(q.shape[2])
    mask = torch.arange(keys.shape[2]) <= places[:, None]
    for _ in range(readers):
        q = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return q


class Rewriting:
    """A compiler that rewrites and stops there; `called` are our ops of all graphs, `nodes` their nodes."""

    def __init__(self):
        torch._dynamo.reset()
        self.nodes = []

    def __call__(self, gm, example_inputs):
        rewrite(gm, {"prefill": "auto", "decode": "auto"})
        self.nodes += [node for node in gm.graph.nodes if "tq_" in str(node.target)]
        return gm.forward

    @property
    def called(self):
        return [str(node.target).removesuffix(".default").split(".")[-1] for node in self.nodes]


def compiled(fn, *args, **kwargs):
    """(our ops of all graphs, in order; result)."""
    backend = Rewriting()
    with torch.no_grad():
        result = torch.compile(fn, backend=backend)(*args, **kwargs)
    return backend.called, result


@pytest.mark.parametrize("name", ["k4v4", "k2v2", "k8v3"])
def test_more_than_a_few_new_tokens_are_read_as_they_came(name):
    cache = make_cache(kv_format=name)
    first, chunk, few = (torch.stack((tokens(n), tokens(n))) for n in (9, LONG, DECODE_TOKENS))
    before = [x[:, :, :9] for x in cache.update(*first)]
    for read, new, old in zip(cache.update(*chunk), chunk, before, strict=True):
        assert torch.equal(read[:, :, 9 : 9 + LONG], new)
        assert torch.equal(read[:, :, :9], old)  # what was there before is read from the bytes
        assert not torch.equal(read[:, :, :9], first[0])
        assert read[:, :, 9 + LONG :].abs().max() == 0
    for read, new, old in zip(cache.update(*few), few, chunk, strict=True):
        assert not torch.equal(read[:, :, -DECODE_TOKENS:], new)
        error = (read[:, :, 9 : 9 + LONG] - old).square().mean()
        assert 0 < error < 0.3  # the chunk too is packed by now


def test_a_chunk_is_packed_like_any_other_tokens():
    chunked, token_by_token = make_cache(), make_cache()
    first, (k, v) = (tokens(20), tokens(20)), (tokens(LONG), tokens(LONG))
    for cache in (chunked, token_by_token):
        cache.update(*first)
    chunked.update(k, v)
    for i in range(LONG):
        token_by_token.update(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert torch.equal(chunked.packed, token_by_token.packed)


def test_a_lossless_format_reads_what_it_stored():
    cache = make_cache(kv_format="bf16")
    k, v = tokens(LONG), tokens(LONG)
    for read, new in zip(cache.update(k, v), (k, v), strict=True):
        assert torch.equal(read[:, :, :LONG], new.bfloat16().float())


def test_a_chunk_sees_itself_as_it_came_in_pages_too():
    fmt, turn, lens = KVFormat("k4v4", 16), make_cache().k_rotation, torch.tensor([45, 40])
    table = torch.tensor([[3, 1], [2, -1]], dtype=torch.int32)  # the end of the second row is dropped
    results = []
    for pages, how in ((2, {}), (4, {"block_table": table})):
        torch.manual_seed(0)
        packed = torch.zeros(pages, 2, (32 if how else 64) * fmt.slot_bytes, dtype=torch.uint8)
        OPS.tq_store(packed, tokens(28), tokens(28), torch.tensor(28), turn, turn, "k4v4", **how)
        q, k, v = tokens(LONG, 4), tokens(LONG), tokens(LONG)
        OPS.tq_store(packed, k, v, lens, turn, turn, "k4v4", **how)
        last = (lens, turn, turn, None, None, None, "k4v4", 64, 0.25)
        named = {"softcap": 2.0, **how}
        out, lse = OPS.tq_decode_lse(q, packed, *last, **named, own_k=k, own_v=v)
        results.append((out, lse, OPS.tq_append_attend(packed, q, k, v, *last, **named, own=True)))
    (out, lse, appended), in_pages = results
    assert torch.equal(out, appended)
    for one, other in zip(results[0], in_pages, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("count", [DECODE_TOKENS, LONG, 129])
def test_a_compiled_chunk_is_one_op_and_equals_eager(count):
    eager, other = make_cache(200), make_cache(200)
    for cache in (eager, other):
        torch.manual_seed(0)
        cache.update(tokens(30), tokens(30))
    q, k, v = tokens(count, 4), tokens(count), tokens(count)
    expected = attend(eager, q, k, v)
    called, result = compiled(functools.partial(attend, other), q, k, v)
    assert called == ["tq_append_attend"]
    assert torch.allclose(result, expected, atol=1e-5)
    assert torch.equal(eager.packed, other.packed)


def test_several_readers_of_a_chunk_read_it_as_it_came():
    eager, other = make_cache(), make_cache()
    q, k, v = tokens(LONG, 4), tokens(LONG), tokens(LONG)
    expected = attend(eager, q, k, v, readers=2)
    called, result = compiled(functools.partial(attend, other, readers=2), q, k, v)
    assert called == ["tq_store", "tq_decode", "tq_decode"]
    assert torch.allclose(result, expected, atol=1e-5)


def by_hand(own_k, own_v, packed, lens, turn, q, k, v):
    OPS.tq_store(packed, k, v, lens, turn, turn, "k4v4")
    keys, values = OPS.tq_dequantize(
        packed, lens, turn, turn, "k4v4", 64, torch.float32, own_k=own_k, own_v=own_v
    )
    mask = torch.arange(64) < lens
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None], enable_gqa=True)


@pytest.mark.parametrize("given", ["others", "none"])
def test_a_store_is_taken_over_only_with_what_it_stored(given):
    cache = make_cache()
    q, k, v = tokens(LONG, 4), tokens(LONG), tokens(LONG)
    own = (tokens(5), tokens(5)) if given == "others" else (None, None)
    arguments = (torch.tensor(40), cache.k_rotation, q, k, v)
    expected = by_hand(*own, cache.packed.clone(), *arguments)
    called, result = compiled(by_hand, *own, cache.packed, *arguments)
    assert called == (["tq_store", "tq_decode"] if given == "others" else ["tq_append_attend"])
    assert torch.allclose(result, expected, atol=1e-5)


def test_a_chunk_changed_before_attention_is_dequantized_where_it_was():
    def f(cache, q, k, v):
        keys, values = cache.update(k, v)
        k.mul_(2)
        mask = torch.arange(64) < cache.seq_length
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None], enable_gqa=True)

    eager, other = make_cache(), make_cache()
    q, k, v = tokens(LONG, 4), tokens(LONG), tokens(LONG)
    expected = f(eager, q, k.clone(), v)
    called, result = compiled(functools.partial(f, other), q, k.clone(), v)
    assert called[:2] == ["tq_store", "tq_dequantize"]
    assert not {"tq_append_attend", "tq_decode"} & {*called}
    assert torch.allclose(result, expected, atol=1e-5)


def test_chunks_of_unknown_length_read_the_packed_bytes():
    eager, other = make_cache(), make_cache()
    q, k, v = tokens(LONG + 3, 4), tokens(LONG + 3), tokens(LONG + 3)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    expected = attend(eager, q, k, v)
    called, result = compiled(functools.partial(attend, other), q, k, v)
    assert called == ["tq_append_attend"]
    assert torch.allclose(result, expected, atol=1e-5)


def model_graphs(chunk, padding=0):
    """(our ops of a compiled chunk over a cache of 40 tokens, its logits, those of eager)."""
    results = []
    for run_compiled in (False, True):
        model = ARCHITECTURES["llama"].build().float()
        torch.manual_seed(0)
        ids = torch.randint(2, 90, (2, 40 + chunk))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        cache = TurboQuantCache(model.config, 1100, max_batch_size=2, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
            arguments = {"attention_mask": mask, "past_key_values": cache}
            if not run_compiled:
                results.append(model(ids[:, 40:], **arguments).logits)
                continue
        called, output = compiled(model, ids[:, 40:], **arguments)
        results += [called, output.logits]
    return results[1], results[2], results[0]


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("chunk", [LONG, 129, 1000])
def test_no_graph_of_a_chunked_prefill_dequantizes(chunk, padding):
    called, logits, expected = model_graphs(chunk, padding)
    assert set(called) == {"tq_append_attend"}
    assert torch.allclose(logits[:, -1], expected[:, -1], atol=1e-3)


def test_no_graph_of_continued_generation_dequantizes():
    model = ARCHITECTURES["llama"].build().float()
    cache = TurboQuantCache(model.config, 128, max_batch_size=1, dtype=torch.float32, device="cpu")
    backend = Rewriting()
    ids = torch.randint(2, 90, (1, 30))
    compiled_model = torch.compile(model, backend=backend)
    for _ in range(2):  # a second turn of 30 tokens over what the first left
        with torch.no_grad():
            compiled_model(ids, past_key_values=cache)
            compiled_model(ids[:, :1], past_key_values=cache)
    assert int(cache.get_seq_length()) == 62
    assert {*backend.called} == {"tq_store", "tq_append_attend"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    cache = make_cache(device=device)
    k, v, q = (x.to(device) for x in (tokens(LONG), tokens(LONG), tokens(LONG, 4)))
    cache.update(k, v)
    places = (cache.packed, cache.seq_length, cache.k_rotation, cache.v_rotation)
    own = {"own_k": k, "own_v": v}
    opcheck(OPS.tq_dequantize.default, (*places, "k4v4", 64, torch.float32), own)
    visible = (None, None, None, "k4v4", 64, 0.25)
    opcheck(OPS.tq_decode.default, (q, *places, *visible), own)
    opcheck(OPS.tq_append_attend.default, (cache.packed, q, k, v, *places[1:], *visible), {"own": True})


@pytest.mark.parametrize("compile_it", [False, True])
def test_a_backward_through_a_chunk_is_an_error(compile_it):
    run = torch.compile(attend, backend="turboquant") if compile_it else attend
    k, v = tokens(LONG).requires_grad_(), tokens(LONG).requires_grad_()
    out = run(make_cache(), tokens(LONG, 4), k, v)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


def test_the_graph_of_a_chunk_says_that_it_is_read_as_it_came():
    backend = Rewriting()
    cache = make_cache()
    with torch.no_grad():
        torch.compile(attend, backend=backend)(cache, tokens(LONG, 4), tokens(LONG), tokens(LONG))
    (node,) = backend.nodes
    assert_expected_inline(
        "\n".join(map(str, (*node.args, node.kwargs))),
        """\
l_cache_buffers_packed_
l_q_
l_k_
l_v_
l_cache_buffers_seq_length_
l_cache_buffers_k_rotation_
l_cache_buffers_k_rotation_
None
to
None
k4v4
64
0.25
l_cache_buffers_k_mean_
None
None
0
{'own': True}""",
    )
