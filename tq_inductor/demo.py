"""The demo: a small trained model reads a held-out text from a packed cache, then goes on writing.

The text is read in chunks, so that every chunk but the first attends to what the cache decodes to, and to
itself; a one-pass prefill would attend to the raw keys and values only and hide the cache's error.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from .cache import TurboQuantCache
from .compiler import explain
from .corpus import held_out_text
from .format import KVFormat

MODEL = Path(__file__).parent / "demo_model"
TEXT = "configparser"  # a held-out module of the standard library
CHUNK = 128  # bytes of the first chunk; also tokens: the model reads bytes
TEXT_BYTES = 25 * CHUNK
MAX_LEN = 4096
NEW_TOKENS = 240


@dataclass(frozen=True)
class Reading:
    """What reading the text with one kind of cache gave."""

    name: str
    cache_bytes: int
    bits_per_byte: float
    seconds: float


def load_demo_model(device: str) -> PreTrainedModel:
    """The byte-level model that ships with the project: bf16, or float32 on a CPU (which is faster)."""
    transformers_logging.disable_progress_bar()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Qwen2ForCausalLM.from_pretrained(MODEL, dtype=dtype)
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()


@torch.no_grad()
def read_in_chunks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: Cache,
    progress: Progress,
    label: str,
    step: int = CHUNK,
) -> float:
    """Bits per byte of `ids` `[1, n]`, `step` at once after a first chunk that is not counted.

    n is a multiple of `CHUNK`, and that of `step`. The last `CHUNK` bytes are not read; only the first of
    them is predicted.
    """
    starts = [0, *range(CHUNK, ids.shape[1] - CHUNK + 1, step)]
    task = progress.add_task(label, total=len(starts) - 1)
    total = 0.0
    for start, end in pairwise(starts):
        logits = model(ids[:, start:end], past_key_values=cache).logits
        targets = ids[:, start + 1 : end + 1]
        loss = F.cross_entropy(logits[0].float(), targets[0], reduction="sum")
        total += loss.item() if start else 0.0
        progress.advance(task)
    return total / math.log(2) / (ids.shape[1] - 2 * CHUNK)


def run_demo(kv_format: str = "k4v4", device: str | None = None) -> dict[str, Any]:
    """Read, generate, and print the rewrite report, memory, quality and speed; returns the figures."""
    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    model = load_demo_model(device)
    config = model.config
    console.print(f"[bold]tq_inductor demo[/] on {where}, torch {torch.__version__}")
    console.print(KVFormat(kv_format, config.head_dim).describe())
    text = held_out_text()[TEXT][:TEXT_BYTES]
    ids = torch.tensor(list(text), device=device)[None]

    cache = TurboQuantCache(config, MAX_LEN, kv_format=kv_format)
    with torch.no_grad():
        model(ids[:, :CHUNK], past_key_values=cache)
        report = explain(model, ids[:, CHUNK : CHUNK + 1], past_key_values=cache)
    console.print("\nWhat the compiler does with a decode step:")
    console.print(str(report), highlight=False, soft_wrap=True)

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    readings = []
    with Progress(*columns, console=console, transient=True) as progress:
        for name in ("bf16", kv_format):
            # Buffers for one row, made now: the compiled graphs find them where they will stay.
            cache = TurboQuantCache(
                config, MAX_LEN, kv_format=name, max_batch_size=1, device=device, dtype=model.dtype
            )
            if name == kv_format:
                model.compile(backend="turboquant")
            start = time.perf_counter()
            bits = read_in_chunks(model, ids, cache, progress, f"reading, {name} cache")
            readings.append(Reading(name, cache.nbytes // MAX_LEN, bits, time.perf_counter() - start))
        progress.add_task("compiling the decode step", total=None)
        prompt = ids[:, : int(cache.get_seq_length()) + 1]
        options = {"past_key_values": cache, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
        torch.manual_seed(0)
        warm = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, **options)
        progress.add_task("generating", total=None)
        start = time.perf_counter()
        attention_mask = torch.ones_like(warm)
        out = model.generate(warm, attention_mask=attention_mask, max_new_tokens=NEW_TOKENS, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        per_token = (time.perf_counter() - start) / (out.shape[1] - warm.shape[1])

    table = Table("KV cache", "bytes per token", "bits per byte of held-out text", "reading, s")
    for reading in readings:
        row = (f"{reading.cache_bytes:,}", f"{reading.bits_per_byte:.4f}", f"{reading.seconds:.1f}")
        table.add_row(reading.name, *row)
    console.print(f"\n{len(text):,} bytes of {TEXT}.py, which the model has never seen, {CHUNK} at a time:")
    console.print(table)
    ratio = readings[0].cache_bytes / readings[1].cache_bytes
    console.print(f"{ratio:.2f}x less memory; {per_token * 1000:.1f} ms per generated token. It wrote:\n")
    console.print(bytes(out[0, prompt.shape[1] :].tolist()).decode(errors="replace"), markup=False)
    return {
        "device": where,
        "text": f"{TEXT}.py, {len(text)} bytes in chunks of {CHUNK}",
        "attention_calls": [len(report.rewritten), len(report.rows)],
        "readings": [asdict(reading) for reading in readings],
        "milliseconds_per_generated_token": round(per_token * 1000, 2),
    }
