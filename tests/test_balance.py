"""`balance_keys`: a model stays the same bit for bit, and packed keys lose less."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tq_inductor import TurboQuantCache, balance_keys
from tq_inductor.cli import main
from tq_inductor.corpus import training_files
from tq_inductor.errors import UnsupportedModelError
from tq_inductor.generate_text import DEMO_MODEL

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(3, 99, (2, 300), generator=torch.Generator().manual_seed(0))


def small(name, dtype=torch.float32, **changes):
    """A model, some of whose keys are large."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | changes), dtype=dtype)
    for parameter_name, x in model.named_parameters():
        if parameter_name.endswith("k_proj.bias"):
            x.data.normal_(0, 8)
        if parameter_name.endswith("k_proj.weight"):
            x.data[3::16] *= 40
        if parameter_name.endswith("k_norm.weight"):
            x.data = torch.linspace(0.1, 8, x.numel(), dtype=dtype)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi", "glm", "cohere", "olmo2", "gemma2"])
def test_a_model_stays_the_same_bit_for_bit(name, dtype):
    model = small(name, dtype)
    with torch.no_grad():
        before = model(IDS).logits
        exponents = balance_keys(model, IDS[:1])
        assert torch.equal(model(IDS).logits, before)
    assert sorted(exponents) == [0, 1]
    head_dim = model.model.layers[0].self_attn.head_dim
    for layer in exponents.values():
        assert layer.shape == (2 if name not in ("qwen3", "olmo2") else 1, head_dim)
        assert layer.amin() < 0


def test_packed_keys_lose_less_where_biases_turn_fast():
    model = small("qwen2", num_hidden_layers=1, hidden_size=128, head_dim=32)
    projections = model.model.layers[0].self_attn
    projections.q_proj.weight.data *= 20
    projections.q_proj.bias.data.zero_()
    projections.k_proj.bias.data.zero_()
    projections.k_proj.bias.data[2:6] = 60.0  # of the first head's fastest pairs
    errors = []
    for balanced in (False, True):
        if balanced:
            balance_keys(model, IDS[:1])
        outcomes = []
        for cache in (
            DynamicCache(config=model.config),
            TurboQuantCache(model.config, 320, sink_tokens=0, recent_tokens=0),
        ):
            with torch.no_grad():
                model(IDS[:, :299], past_key_values=cache)
                outcomes.append(model(IDS[:, 299:], past_key_values=cache).logits.log_softmax(-1))
        exact, packed = outcomes
        errors.append((exact.exp() * (exact - packed)).sum().item())
    assert errors[1] < 0.5 * errors[0]


def test_what_it_cannot_change_is_refused_and_stays():
    with pytest.raises(UnsupportedModelError, match="gpt_neox has no attention layer with a q_proj"):
        balance_keys(small("gpt_neox"), IDS)
    model = small("gemma3_text")  # multiplies by 1 + weight
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="is not the same with balanced keys"):
        balance_keys(model, IDS)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_weights_come_back_when_the_model_fails(monkeypatch):
    model = small("llama")
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    calls = []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        balance_keys(model.train(), IDS)
    assert model.training
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_the_command_writes_the_same_model(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(next(iter(training_files())).read_bytes()[:1200])
    command = [
        "balance",
        str(text),
        str(DEMO_MODEL),
        "--out",
        str(tmp_path / "balanced"),
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    assert "channels of keys; wrote" in capsys.readouterr().out
    assert main(command) != 0
    assert "exists: name a folder that does not" in capsys.readouterr().err
    AutoTokenizer.from_pretrained(tmp_path / "balanced")
    (tmp_path / "empty.txt").touch()
    assert (
        main(["balance", str(tmp_path / "empty.txt"), str(DEMO_MODEL), "--out", str(tmp_path / "b")]) == 1
    )
    assert "the text has no tokens: give one" in capsys.readouterr().err
    ids = torch.tensor([list(text.read_bytes()[:200])])
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (DEMO_MODEL, tmp_path / "balanced")]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))
    weights = [model.model.layers[1].self_attn.k_proj.weight for model in models]
    assert not torch.equal(*weights)
