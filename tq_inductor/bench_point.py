"""One measurement of `tq-inductor bench`: a model with random weights generates, as users call it.

Every figure is of `model.generate` itself, timed by a streamer, so what transformers does between two
steps counts too. The first call compiles, the second is measured.
"""

from __future__ import annotations

import functools
import gc
import resource
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    CompileConfig,
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from .cache import TurboQuantCache
from .clock import Clock, cache_bytes

EAGER = ("dynamic", "quantized")
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 16, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    }),
    "qwen3": ("qwen3", {  # Qwen3-8B
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
    }),
    "gemma3": ("gemma3_text", {  # Gemma-3-4B
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "sliding_window": 1024,
    }),
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
TINY_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# Parts of the free memory that a cache may take, tried one after the other.
PARTS = (0.95, 0.85, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1)
FILL_CHUNK = 4096  # tokens


@dataclass(frozen=True)
class Point:
    """What is measured.

    Attributes:
        model: one of `FULL`.
        size: "full", or "tiny" for a trial on a CPU.
        cache: "dynamic" and "quantized" (transformers, eager), "static-inductor" (transformers'
            StaticCache, compiled as `generate` does by itself), "static" (the same, compiled by us), or
            the KV format of a `TurboQuantCache`.
        batch: rows.
        context: tokens of each prompt; None to look for the largest that fits.
        new_tokens: generated; at least 3: the first step compiles, and the second may record a CUDA graph.
        prefill_tokens: of the whole batch at once; longer prompts are read in chunks.
    """

    model: str
    size: str
    cache: str
    batch: int
    context: int | None
    new_tokens: int
    prefill_tokens: int


def measure(point: Point) -> dict[str, Any]:
    """The figures of a point; times in seconds or milliseconds, sizes in bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(point.model, point.size, device)
    if point.context is None:
        return {"largest_context": largest_context(point, model)}
    ids = torch.randint(3, model.config.vocab_size, (point.batch, point.context), device=device)
    cache = make_cache(point.cache, model, point.batch, point.context + point.new_tokens)
    options = compile_for(point.cache, model)
    if (chunk := max(point.prefill_tokens // point.batch, 1)) < point.context:
        options["prefill_chunk_size"] = chunk
    counters.clear()
    cold = _run(model, ids, cache, point.new_tokens, options)
    graphs = counters["stats"]["unique_graphs"]
    if point.cache in EAGER:
        del cache
        cache = make_cache(point.cache, model, point.batch, 0)
    else:
        cache.reset()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warm = _run(model, ids, cache, point.new_tokens, options)
    step = warm.median_step_s or 0.0
    total = [clock.times[-1] - clock.times[0] for clock in (cold, warm)]
    return {
        "step_ms": round(step * 1e3, 3),
        "step_spread_ms": round((max(warm.steps_s) - min(warm.steps_s)) * 1e3, 3),
        "tokens_per_s": round(point.batch / step, 2),
        "first_token_s": round(warm.first_token_s, 4),
        "compile_s": None if point.cache in EAGER else round(total[0] - total[1], 1),
        "peak_bytes": _peak_bytes(device),
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "cache_bytes": cache_bytes(cache),
        "graphs": graphs,
        "graphs_after_warm_up": counters["stats"]["unique_graphs"] - graphs,
    }


@functools.lru_cache(maxsize=1)
def build_model(name: str, size: str, device: str) -> PreTrainedModel:
    """A model of this shape with random weights; bf16, or float32 on a CPU."""
    architecture, sizes = FULL[name]
    if size == "tiny":
        sizes = TINY | (TINY_WINDOW if name == "gemma3" else {})
    config = AutoConfig.for_model(
        architecture, **sizes, max_position_embeddings=1 << 22, eos_token_id=None, pad_token_id=0
    )
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_cache(kind: str, model: PreTrainedModel, batch: int, max_len: int) -> Cache:
    """An empty cache of one of the kinds of `Point.cache`, for `max_len` tokens if it must know.

    Those of fixed size are allocated now: made inside a compiled prefill, they would be of another kind
    for the compiler than when they are used again.
    """
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "quantized":
        backend = "quanto" if is_optimum_quanto_available() else "hqq" if is_hqq_available() else None
        if backend is None:
            raise ModuleNotFoundError("QuantizedCache needs optimum-quanto or hqq; neither is installed")
        axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
        return QuantizedCache(backend, model.config, nbits=4, **axis)
    if kind.startswith("static"):
        cache = StaticCache(config=model.config, max_cache_len=max_len)
        config = model.config
        sizes = (batch, config.num_key_value_heads, config.head_dim)
        cache.early_initialization(*sizes, dtype=model.dtype, device=model.device)
        return cache
    return TurboQuantCache(
        model.config, max_len, kv_format=kind, max_batch_size=batch, dtype=model.dtype, device=model.device
    )


def compile_for(kind: str, model: PreTrainedModel) -> dict[str, Any]:
    """Compile the model as its cache is to be used; options for `generate`."""
    torch.compiler.reset()
    model._compiled_call_impl = None
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    if kind == "static-inductor":
        config = CompileConfig(mode=mode)
        config._compile_all_devices = True  # `generate` compiles for GPUs only, unless told
        return {"compile_config": config}
    if kind not in EAGER:
        model.compile(backend="turboquant", mode=mode)
    return {"disable_compile": True}


def _run(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, new_tokens: int, options: dict[str, Any]
) -> Clock:
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=clock,
        max_new_tokens=new_tokens, do_sample=False, **options,
    )  # fmt: skip
    return clock


def _peak_bytes(device: str) -> int:
    """Most memory in use: of the GPU since it was last reset, or of this process ever."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fill(cache: Cache, model: PreTrainedModel, batch: int, tokens: int) -> None:
    """Append `tokens` random tokens to every layer of an empty cache, without running the model."""
    config = model.config
    shape = (batch, config.num_key_value_heads, min(tokens, FILL_CHUNK), config.head_dim)
    chunk = torch.randn(shape, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        append = layer.update  # ours gives the first chunk back, and would decode itself for later ones
        for done in range(0, tokens, FILL_CHUNK):
            new = chunk[:, :, : tokens - done]
            append(new, new)
            append = getattr(layer, "append", layer.update)


def largest_context(point: Point, model: PreTrainedModel, free_bytes: int | None = None) -> int | None:
    """Tokens per row, in steps of about a tenth, at which a filled cache still takes part in a step.

    Args:
        free_bytes: what a cache may take; default: what the GPU has free. None is returned without one.
    """
    if free_bytes is None:
        if model.device.type != "cuda":
            return None
        free_bytes = torch.cuda.mem_get_info()[0]
    sizes = []
    for tokens in (2048, 4096):  # two, because a sliding window's layers do not grow
        cache = make_cache(point.cache, model, point.batch, tokens)
        fill(cache, model, point.batch, tokens)
        sizes.append(cache_bytes(cache))
    per_token = (sizes[1] - sizes[0]) / 2048
    del cache
    for part in PARTS:
        context = int(part * free_bytes / per_token)
        if fits(point, model, context):
            return context
    return 0


def fits(point: Point, model: PreTrainedModel, context: int) -> bool:
    """Whether two steps run with a cache that `context` tokens of each row fill."""
    clean_up()
    try:
        cache = make_cache(point.cache, model, point.batch, context)
        fill(cache, model, point.batch, context - 2)
        ids = torch.ones((point.batch, context - 1), dtype=torch.int64, device=model.device)
        _run(model, ids, cache, 2, compile_for(point.cache, model))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host had no memory left."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "out of memory" in text or "can't allocate memory" in text
    )


def clean_up() -> None:
    """Give back what a point took: compiled graphs and their pools, and freed memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
