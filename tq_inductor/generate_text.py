"""`tq-inductor generate`: a transformers model goes on with a text, with a cache of your choice.

The text goes to standard output as it comes, the figures to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    TextStreamer,
)
from transformers.utils import logging as transformers_logging

from .cache import TurboQuantCache
from .clock import Clock, cache_bytes
from .errors import UsageError

DEMO_MODEL = Path(__file__).parent / "demo_model"


def make_cache(kind: str, model: PreTrainedModel, max_len: int, kv_format: str | Sequence[str]) -> Cache:
    """A cache for `max_len` tokens; `kind` is "turboquant", "static" or "dynamic" (which just grows)."""
    config = model.config
    if kind == "turboquant":
        made_for = {"max_batch_size": 1, "dtype": model.dtype, "device": model.device}
        return TurboQuantCache(config, max_len, kv_format=kv_format, **made_for)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=max_len)
    return DynamicCache(config=config)


def generate_text(
    prompt: str,
    model: str | Path | None = None,
    *,
    cache: str = "turboquant",
    kv_format: str | Sequence[str] = "k4v4",
    compiled: bool | None = None,
    device: str | None = None,
    dtype: str = "auto",
    seed: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Print what `model` writes after `prompt`, and how fast; returns the figures.

    Args:
        prompt: any text but an empty one.
        model: folder or name of a checkpoint; None for the model that ships with this package.
        cache: see `make_cache`.
        kv_format: of a "turboquant" cache; see `TurboQuantCache`.
        compiled: with this package's backend, and CUDA graphs on a GPU; default: on a GPU only.
        device, dtype: as torch names them; default: CUDA if there is one, and the checkpoint's dtype.
        seed: of the sampling.
        options: of `generate` (`max_new_tokens` among them).

    Raises:
        UsageError: no such model, or an empty prompt.
        FormatError, UnsupportedModelError: as `TurboQuantCache`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    compiled = on_gpu if compiled is None else compiled
    transformers_logging.disable_progress_bar()
    if not prompt:
        raise UsageError("the prompt is empty: give at least a character")
    tokenizer, network = load_checkpoint(model or DEMO_MODEL, dtype)
    network = network.to(device).eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if network.generation_config.pad_token_id is None:  # one row is never padded; `generate` would warn
        network.generation_config.pad_token_id = network.generation_config.eos_token_id
    if compiled:
        network.compile(backend="turboquant", mode="reduce-overhead" if on_gpu else "default")
    max_len = prompt_tokens + options["max_new_tokens"]
    kept = make_cache(cache, network, max_len, kv_format)
    if seed is not None:
        torch.manual_seed(seed)
    clock = Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    # `generate` would compile the model for a static cache by itself, asked or not.
    network.generate(**inputs, past_key_values=kept, streamer=clock, disable_compile=True, **options)
    figures = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(clock.times) - 1,
        "first_token_s": clock.first_token_s,
        "median_step_s": clock.median_step_s,
        "cache": f"{cache}, {_named(kv_format)}" if cache == "turboquant" else cache,
        "cache_bytes": cache_bytes(kept),
    }
    print(_summary(figures, compiled), file=sys.stderr)
    return figures


def _named(kv_format: str | Sequence[str]) -> str:
    return kv_format if isinstance(kv_format, str) else "/".join(kv_format)


def load_checkpoint(name: str | Path, dtype: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model of a folder or name; UsageError if there are none."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return AutoTokenizer.from_pretrained(name), model
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load a model and its tokenizer from {str(name)!r}: {error} Give a folder that "
            f"save_pretrained() wrote, such as the one that ships with this package: {DEMO_MODEL}"
        ) from error


def _summary(figures: dict[str, Any], compiled: bool) -> str:
    """The figures, for people."""
    step = figures["median_step_s"]
    then = f", then {1 / step:.1f} tokens/s ({step * 1e3:.2f} ms a token, median)" if step else ""
    return (
        f"{figures['prompt_tokens']} tokens read, {figures['new_tokens']} written; time to first token "
        f"{figures['first_token_s']:.2f} s{' with compilation' if compiled else ''}{then}\n"
        f"cache ({figures['cache']}): {figures['cache_bytes']:,} bytes"
    )
