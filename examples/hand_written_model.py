"""A model written by hand, without transformers, that keeps its keys and values in `PackedKVCache`.

    python examples/hand_written_model.py [--kv-format k4v4] [--new-tokens 200] [--eager]

Three lines make the cache a packed one: it is made (`make_caches`), it is appended to and read
(`Attention.forward`), and the step is compiled with `backend="turboquant"` (`generate`). The weights are
those of the small model that ships with the package, so that it writes Python.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.resources import files

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tq_inductor import PackedKVCache

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 256, 704, 7, 4, 2, 64
ROPE_BASE = 10_000.0
PROMPT = "import math\n\n\ndef mean(values):\n"


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over a packed cache."""

    cache: PackedKVCache

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        """x `[B, q, WIDTH]`, angles `[q, HEAD_DIM]` in radians, mask `[q, max_len]`."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, values = self.cache.update(rotate(k, angles), v)
        out = F.scaled_dot_product_attention(
            rotate(q, angles), keys, values, attn_mask=mask, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, q, WIDTH]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each after a norm and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.mlp = GatedMLP()

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        """As `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class ByteModel(nn.Module):
    """The decoder: bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def make_caches(self, batch: int, max_len: int, kv_format: str) -> None:
        """A packed cache for each layer, on the model's device and in its dtype."""
        weight = self.lm_head.weight
        for layer in self.layers:
            layer.self_attn.cache = PackedKVCache(
                batch, KV_HEADS, HEAD_DIM, max_len,
                kv_format=kv_format, dtype=weight.dtype, device=weight.device,
            )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """Append ids `[B, q]` to what the caches hold; logits `[B, VOCABULARY]` after the last."""
        cache = self.layers[0].self_attn.cache
        positions = cache.seq_length + torch.arange(ids.shape[1], device=ids.device)
        mask = torch.arange(cache.max_len, device=ids.device) <= positions[:, None]
        speeds = ROPE_BASE ** -(torch.arange(0, HEAD_DIM, 2, device=ids.device) / HEAD_DIM)
        angles = (positions[:, None] * speeds).repeat(1, 2)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.lm_head(self.norm(x[:, -1]))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x `[B, H, q, HEAD_DIM]`, its halves rotated against each other by angles `[q, HEAD_DIM]`."""
    low, high = x.chunk(2, -1)
    turned = torch.cat((-high, low), -1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def load(device: str) -> ByteModel:
    """The trained model: bf16 on a GPU, float32 on a CPU, where that is faster."""
    weights = load_file(str(files("tq_inductor.demo_model") / "model.safetensors"))
    model = ByteModel()
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


@torch.no_grad()
def generate(step: Callable[[Tensor], Tensor], model: ByteModel, prompt: Tensor, new_tokens: int) -> Tensor:
    """prompt `[B, n]` is read eagerly, the rest written by `step`: new tokens `[B, new_tokens]`."""
    token = model(prompt).argmax(-1, keepdim=True)
    tokens = [token]
    for _ in range(new_tokens - 1):
        token = step(token).argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, 1)


def main(argv: list[str] | None = None) -> None:
    """Go on with a prompt; the first steps, which compile, are not timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kv-format", default="k4v4")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(device)
    prompt = torch.tensor([list(PROMPT.encode())], device=device)
    model.make_caches(1, prompt.shape[1] + args.new_tokens, args.kv_format)
    step: Callable[[Tensor], Tensor] = model
    if not args.eager:
        mode = "reduce-overhead" if device == "cuda" else None
        step = torch.compile(model, backend="turboquant", mode=mode, fullgraph=True)
    generate(step, model, prompt, min(4, args.new_tokens))
    for layer in model.layers:
        layer.self_attn.cache.reset()
    start = time.perf_counter()
    tokens = generate(step, model, prompt, args.new_tokens)
    print(PROMPT + bytes(tokens[0].tolist()).decode(errors="replace"))
    size = sum(layer.self_attn.cache.nbytes for layer in model.layers)
    seconds = time.perf_counter() - start
    print(f"\n{args.new_tokens / seconds:.0f} tokens/s; caches ({args.kv_format}): {size:,} bytes")


if __name__ == "__main__":
    main()
