"""The mask of `generate` grows by a column at every step; what a CUDA graph gets does not."""

from __future__ import annotations

import pytest
import torch
from tq_inductor.lowering.growing_inputs import split_growing_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from tq_inductor import TurboQuantCache


def llama():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=99, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def make_cache(model, device="cpu"):
    return TurboQuantCache(model.config, 64, max_batch_size=2, device=device, dtype=torch.float32)


def generate(model, mask, ids, cache=None):
    cache = cache or make_cache(model)
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False
    )


def padded_batch(device="cpu"):
    ids = torch.randint(3, 99, (2, 12), device=device)
    mask = torch.ones(2, 12, dtype=torch.long, device=device)
    mask[1, :3] = 0
    return mask, ids


def test_decode_graphs_of_generate_get_fixed_shapes_only(monkeypatch):
    model, batch = llama(), padded_batch()
    expected = generate(model, *batch)
    graphs = []

    def inductor(gm, example_inputs, options):
        placeholders = gm.graph.find_nodes(op="placeholder")
        cudagraphs = options["triton.cudagraphs"]
        if cudagraphs:  # or no input counts as static
            assert gm._param_name_to_source
            assert all(hasattr(node, "_dynamo_source") for node in placeholders)
        fixed = all(isinstance(size, int) for x in example_inputs for size in getattr(x, "shape", [x]))
        graphs.append((cudagraphs, fixed, len(placeholders) == len(example_inputs)))
        return gm.forward

    monkeypatch.setattr(torch._inductor, "compile", inductor)
    torch._dynamo.reset()
    model.compile(backend="turboquant", mode="reduce-overhead")
    for _ in range(2):
        assert torch.equal(generate(model, *batch), expected)
    assert graphs == [(False, True, True), (True, True, True)]  # prefill, all steps


def splits(f, *args):
    found = []

    def backend(gm, example_inputs):
        split = split_growing_inputs(gm, example_inputs)
        found.append(split is not None)
        return gm.forward if split is None else lambda *args: split.gm(*split.inputs_from(args))

    expected = f(*(x.clone() for x in args))
    torch._dynamo.reset()
    result = torch.compile(f, backend=backend, fullgraph=True, dynamic=True)(*args)
    torch.testing.assert_close(result, expected)
    return found == [True]


def pad(x, size):
    return torch.nn.functional.pad(x, (0, size - x.shape[1]))


def test_only_what_reaches_a_fixed_shape_is_split_off():
    x, w = torch.randn(3, 5), torch.randn(3, 8)
    torch._dynamo.mark_static(w)
    torch._dynamo.mark_static(x, 0)
    assert splits(lambda x, w: pad(x > 0, 8) * w, x, w)
    assert not splits(lambda x, w: (x.sum() + w, pad(x, 8)), x, w)  # two results
    assert not splits(lambda x, w: pad(x, 8) * w * x.shape[1], x, w)  # its size is used elsewhere
    assert not splits(lambda x, w: pad(x.add_(1), 8) * w, x, w)  # it is written to
    assert not splits(lambda x, w: (x * 2, w), x, w)  # it leaves the graph at its own size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_generate_replays_one_cuda_graph():
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    model, batch = llama().cuda(), padded_batch("cuda")
    caches = [make_cache(model, "cuda") for _ in range(3)]
    expected = generate(model, *batch, caches[0])
    recorded = []
    original = CUDAGraphNode._record

    def record(self, *args, **kwargs):
        recorded.append(self)
        return original(self, *args, **kwargs)

    torch._dynamo.reset()
    model.compile(backend="turboquant", mode="reduce-overhead")
    CUDAGraphNode._record = record
    try:
        assert torch.equal(generate(model, *batch, caches[1]), expected)
        assert len(recorded) == 1  # after a step without a graph
        caches[1].reset()
        assert torch.equal(generate(model, *batch, caches[1]), expected)
        assert len(recorded) == 1
        assert torch.equal(generate(model, *batch, caches[2]), expected)
        assert len(recorded) == 2  # other memory
    finally:
        CUDAGraphNode._record = original
