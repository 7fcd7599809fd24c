"""Train the demo model: a small byte-level Qwen2 decoder for Python source.

    python examples/train_stdlib_model.py

It learns from the standard library's sources (see `tq_inductor.corpus`), is scored on modules it
never saw, and is stored with its model card. One H100 or H200 GPU trains it in minutes; a CPU is
only good for a trial with a few steps and a short context.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tq_inductor.corpus import held_out_text, training_files, training_text

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "tq_inductor" / "demo_model"
CONTEXT = 4096
PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.02  # share of the run
LOG_EVERY = 10  # steps; reading the loss waits for the GPU
PRINT_EVERY = 200  # steps, where the output is a file and shows no progress bar
CHECKPOINT_EVERY = 500  # steps
CONSOLE = Console()


@dataclass
class RunState:
    """How far a run has come: what a checkpoint holds besides tensors."""

    step: int = 0
    seconds: float = 0.0
    """Time spent in steps, the first step of each process (compilation) left out."""
    bits: float = math.nan
    """Bits per byte of the last training batch that was looked at."""


def build_model() -> Qwen2ForCausalLM:
    """A freshly initialised model in float32: 5.3 million parameters, one token per byte."""
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


def build_optimizer(model: Qwen2ForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves biases and norm weights alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def next_byte_loss(model: Qwen2ForCausalLM, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of each byte given those before it in its window.

    windows: uint8 [batch, length]; the first byte of a window is context only.
    """
    ids = windows.long()
    # With the mask given as "none" the attention is plainly causal, so the flash kernel serves it.
    output = model(ids[:, :-1], attention_mask={"full_attention": None}, use_cache=False)
    return F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to zero; `progress` is the share of the run done."""
    if progress < WARMUP:
        return PEAK_LEARNING_RATE * (progress + 1e-3) / (WARMUP + 1e-3)
    phase = min(1.0, (progress - WARMUP) / (1 - WARMUP))
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * phase))


def sample_windows(text: Tensor, batch: int, context: int, generator: torch.Generator) -> Tensor:
    """Windows of text at random places, uint8 [batch, context + 1]; `text` is uint8 [bytes]."""
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator, device=text.device)
    return text[starts + torch.arange(context + 1, device=text.device)]


def train(model: Qwen2ForCausalLM, text: Tensor, options: argparse.Namespace) -> tuple[RunState, float]:
    """Train in place until `--steps` or `--max-minutes` is used up, whichever comes first.

    The learning rate follows the larger share of the two limits that is used up, so a run cut
    short by the clock still ends at zero. Returns the final state and the seconds that compilation
    (the first step) took.
    """
    optimizer = build_optimizer(model)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    state = RunState()
    if options.checkpoint and options.checkpoint.exists():
        state = load_checkpoint(options.checkpoint, model, optimizer, generator)
        CONSOLE.print(f"resuming at step {state.step} from {options.checkpoint}")
    step_loss: Callable[..., Tensor] = next_byte_loss
    if options.compile:
        step_loss = torch.compile(next_byte_loss, fullgraph=True)

    first_step, compile_seconds = state.step, 0.0
    time_limit = 60 * options.max_minutes
    recent_step, recent_seconds = state.step, state.seconds
    last_tick = time.perf_counter()
    columns = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE) as bar:
        task = bar.add_task("", total=1.0, step=state.step, figures="compiling")
        while True:
            # Compilation counts against the limit, but the schedule starts after it.
            progress = max(
                state.step / options.steps, state.seconds / max(1.0, time_limit - compile_seconds)
            )
            bar.update(task, completed=min(1.0, progress), step=state.step)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress)
            windows = sample_windows(text, options.batch_size, options.context, generator)
            with torch.autocast(options.device, dtype=torch.bfloat16):
                loss = step_loss(model, windows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            log = state.step == first_step or (state.step + 1) % LOG_EVERY == 0
            if log:
                state.bits = loss.item() / math.log(2)
            now = time.perf_counter()
            if state.step == first_step:
                compile_seconds = now - last_tick
            else:
                state.seconds += now - last_tick
            last_tick = now
            state.step += 1

            if log and state.seconds > recent_seconds:
                speed = (state.step - recent_step) * options.batch_size * options.context
                speed /= state.seconds - recent_seconds
                recent_step, recent_seconds = state.step, state.seconds
                nats = state.bits * math.log(2)
                figures = f"loss {nats:.4f}  {state.bits:.4f} bits/byte  {speed:,.0f} tokens/s"
                bar.update(task, figures=figures)
                if not CONSOLE.is_terminal and state.step % PRINT_EVERY == 0:
                    CONSOLE.print(f"step {state.step}  {progress:.1%}  {figures}")
            if options.checkpoint and state.step % CHECKPOINT_EVERY == 0:
                save_checkpoint(options.checkpoint, model, optimizer, generator, state)
    if options.checkpoint:
        save_checkpoint(options.checkpoint, model, optimizer, generator, state)
    return state, compile_seconds


def save_checkpoint(
    path: Path,
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    state: RunState,
) -> None:
    """Write everything that a run needs to go on; an interruption leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "state": asdict(state),
        },
        unfinished,
    )
    os.replace(unfinished, path)


def load_checkpoint(
    path: Path,
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> RunState:
    """Restore what `save_checkpoint` wrote."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    return RunState(**saved["state"])


@torch.no_grad()
def bits_per_byte(model: Qwen2ForCausalLM, source: bytes, context: int) -> float:
    """Mean bits to predict a byte of one file, read in non-overlapping windows.

    Each window of `context` bytes predicts the byte after each of its own, so that every byte of
    the file is scored once, except the first.
    """
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).to(model.device)
    windows = [text[i : i + context + 1] for i in range(0, len(text) - 1, context)]
    nats = sum(next_byte_loss(model, w[None], reduction="sum").item() for w in windows)
    return nats / math.log(2) / (len(text) - 1)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, its id the byte's value: byte-level BPE before its first merge."""
    vocabulary = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def store(model: Qwen2ForCausalLM, out: Path) -> None:
    """Write model and tokenizer as transformers loads them, the weights rounded to bfloat16."""
    # Set only now: a padding index would keep the embedding of byte 0, the separator of two
    # files, from learning. Nothing ends a text, so there is no end token.
    model.config.pad_token_id = 0
    model.generation_config.pad_token_id = 0
    model.to(torch.bfloat16).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)


def model_card(
    model: Qwen2ForCausalLM,
    options: argparse.Namespace,
    text: bytes,
    scores: dict[str, float],
    sizes: dict[str, int],
    state: RunState,
    compile_seconds: float,
) -> str:
    """The README.md beside the weights; `scores` and `sizes` (bytes) go by held-out module."""
    config = model.config
    theta = config.rope_parameters["rope_theta"]
    parameters = sum(p.numel() for p in model.parameters())
    overall = mean_score(scores, sizes)
    tokens = state.step * options.batch_size * options.context
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    files = len(training_files(options.stdlib))
    rows = "\n".join(f"| {name} | {sizes[name]:,} | {score:.4f} |" for name, score in scores.items())
    arguments = [f"--steps {state.step}"]
    if options.stdlib:
        arguments.append(f"--stdlib /path/to/lib/python --stdlib-version {options.stdlib_version}")
    defaults = parse_arguments([])
    for name in ("batch_size", "context", "seed"):
        if getattr(options, name) != getattr(defaults, name):
            arguments.append(f"--{name.replace('_', '-')} {getattr(options, name)}")
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [byte-level, code, python]
---

# A byte-level decoder for Python source

A small language model for demonstrations and quality tests: `Qwen2ForCausalLM` from transformers,
unchanged, reading and writing bytes (token id = byte value). It completes Python
source plausibly and is not meant to write correct programs.

## Data

The `.py` files of CPython {options.stdlib_version}'s standard library, tests included: {files:,}
files, {len(text):,} bytes, joined by a zero byte (`tq_inductor.corpus.training_text`).
Tables (character maps, HTML entities), generated files and third-party code are left out.
SHA-256 of the text: `{hashlib.sha256(text).hexdigest()}`.

Held out: the modules in the table below, {sum(sizes.values()):,} bytes. Their sources, their tests
(`test_<module>`) and any other file of the same name were not in the training text.

## Model

- {parameters:,} parameters, stored as bfloat16
- layers: {config.num_hidden_layers}, of width {config.hidden_size}
- MLP: gated SiLU of width {config.intermediate_size}
- heads: {config.num_attention_heads} query, {config.num_key_value_heads} key/value, of size
  {config.head_dim}, with biases; rotary positions, base {theta:,.0f}
- separate input and output embeddings of the 256 byte values

## Training

- {state.step:,} steps of {options.batch_size} random windows of {options.context:,} bytes:
  {tokens:,} tokens, {tokens / len(text):.1f} times the text
- AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices), gradients clipped at norm 1
- learning rate up to {PEAK_LEARNING_RATE} in the first {WARMUP:.0%}, then a cosine to zero
- float32 weights, bfloat16 autocast, seed {options.seed}
- last training batch: {state.bits:.2f} bits per byte; compare the held-out figure below to see how
  much of the training text the model knows by heart
- {device}: {state.seconds / 60:.1f} minutes of steps after {compile_seconds:.0f} s of compilation
- Python {platform.python_version()}, torch {torch.__version__}, transformers
  {transformers.__version__}

To train it again (how closely the result agrees depends on the GPU and the versions):

    python examples/train_stdlib_model.py {" ".join(arguments)}

## Held-out bits per byte

**{overall:.4f}** over all bytes of CPython {options.stdlib_version}'s held-out modules.
The stored weights compute in float32; each file is read on its own, in non-overlapping windows of
{options.context:,} bytes, and every byte of it but the first is scored once.

| module | bytes | bits per byte |
| --- | ---: | ---: |
{rows}

## Licence

The weights are under Apache-2.0. They were trained on CPython's standard library, which is
under the Python Software Foundation License Version 2.
"""


def mean_score(scores: dict[str, float], sizes: dict[str, int]) -> float:
    """Bits per byte over all scored bytes of all modules."""
    scored = sum(size - 1 for size in sizes.values())
    return sum(score * (sizes[name] - 1) for name, score in scores.items()) / scored


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--out", type=Path, default=DEFAULT_OUT, help="folder for the weights and the model card")
    add("--steps", type=int, default=2460, help="optimizer steps; four times as many overfit")
    add("--max-minutes", type=float, default=math.inf, help="end the schedule by then")
    add("--batch-size", type=int, default=32, help="windows a step")
    add("--context", type=int, default=CONTEXT, help="bytes a window")
    add("--stdlib", type=Path, help="folder of standard library sources (default: this Python's)")
    add("--stdlib-version", help="Python version of those sources, for the model card")
    add("--checkpoint", type=Path, help="file to save to now and then, and to resume from")
    add("--seed", type=int, default=0)
    add("--device", default=device, choices=("cuda", "cpu"))
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="use Inductor")
    options = parser.parse_args(arguments)
    if options.stdlib_version is None:
        options.stdlib_version = "(unknown)" if options.stdlib else platform.python_version()
    return options


def main() -> None:
    """Train, store, score what was stored, and write the card."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")

    text = training_text(options.stdlib)
    CONSOLE.print(f"training text: {len(text):,} bytes")
    model = build_model().to(options.device)
    text_tensor = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(options.device)
    state, compile_seconds = train(model, text_tensor, options)
    store(model, options.out)

    torch.set_float32_matmul_precision("highest")
    stored = Qwen2ForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    stored = stored.to(options.device).eval()
    modules = held_out_text(options.stdlib)
    scores = {name: bits_per_byte(stored, source, options.context) for name, source in modules.items()}
    sizes = {name: len(source) for name, source in modules.items()}
    for name, score in scores.items():
        CONSOLE.print(f"{name:14} {score:.4f} bits per byte")
    CONSOLE.print(f"{'held out':14} {mean_score(scores, sizes):.4f} bits per byte")
    card = model_card(stored, options, text, scores, sizes, state, compile_seconds)
    (options.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
