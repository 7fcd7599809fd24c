"""The command line `tq-inductor`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .argument_types import (
    BENCH_CACHES,
    SAMPLING,
    above_zero,
    at_least_zero,
    bench_cache,
    device_name,
    dtype_name,
    existing_file,
    kv_format_name,
    kv_format_or_bits,
    kv_format_or_policy,
    new_file,
    new_folder,
    new_plot,
    number,
    positive,
    text_of,
)
from .attention.order import orders_of
from .attention.packages import version_of
from .attention.select import attention_backends
from .errors import FormatError, UnsupportedModelError, UsageError

EXTRAS = ("rich", "matplotlib", "transformers", "tokenizers", "safetensors")
BENCH_MODELS = ("llama", "qwen3", "gemma3")
PACKAGES = ("fa3-fwd", "flash-attn-3", "flash-attn-4", "flash-attn", "flashinfer-python")


def doctor() -> None:
    """Print what this machine can run, and why not the rest."""
    import torch

    print(f"python {platform.python_version()}, {platform.platform()}")
    for package in ("tq_inductor", "torch", "triton", "transformers"):
        print(f"{package} {version_of(package) or 'is not installed'}")
    optional = {package: version_of(package) for package in PACKAGES}
    print(", ".join(f"{package} {version or '-'}" for package, version in optional.items()))
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gigabytes = properties.total_memory / 2**30
        print(f"cuda:{i} {properties.name}, sm{properties.major}{properties.minor}, {gigabytes:.0f} GiB")
    if not torch.cuda.is_available():
        print("no CUDA device: attention over packed caches runs the plain torch implementation")
    print("\nattention backends")
    for name, availability in attention_backends().items():
        yes = f"yes{availability.note and ': ' + availability.note}"
        print(f"  {name:12} {yes if availability else 'no: ' + '; '.join(availability.reasons)}")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    print(
        "\nin order of preference (docs/attention-backends.md; 'band': causal with an offset, or a window)"
    )
    for order in orders_of(capability):
        print(f"  {order.describe():44} {', '.join(order.names)}")


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def run_demo(args: argparse.Namespace) -> None:
    """`tq-inductor demo`."""
    from .demo import run_demo

    figures = run_demo(args.kv_format, args.device)
    if args.json:
        write_json(args.json, figures)


def run_generate(args: argparse.Namespace) -> None:
    """`tq-inductor generate`."""
    from .generate_text import generate_text

    if args.kv_format and args.cache != "turboquant":
        raise UsageError(f"--kv-format is of a packed cache: leave it out with --cache {args.cache}")
    try:
        prompt = sys.stdin.read() if args.prompt is None else args.prompt
        prompt.encode()  # a command line has surrogates for bytes that are no text
    except UnicodeError as error:
        raise UsageError("the prompt is no text in UTF-8: give one") from error
    given = {name: getattr(args, name) for name in (*SAMPLING, "prefill_chunk_size")}
    figures = generate_text(
        prompt, args.model, cache=args.cache, kv_format=args.kv_format or "k4v4", compiled=args.compile,
        device=args.device, dtype=args.dtype, seed=args.seed, max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample, **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    if args.json:
        write_json(args.json, figures)


def run_calibrate(args: argparse.Namespace) -> None:
    """`tq-inductor calibrate`."""
    from .calibrate import FORMATS, calibrate

    if args.plot:
        from .plot_policy import draw_policy  # refuses now, and not after the measurement
    policy = calibrate(
        args.text, args.model, budget=args.budget, formats=args.formats or FORMATS,
        tokens=args.tokens, device=args.device, dtype=args.dtype,
    )  # fmt: skip
    write_json(args.out, policy)
    print(f"wrote {args.out}")
    if args.plot:
        draw_policy(policy, args.plot)
        print(f"wrote {args.plot}")


def run_balance(args: argparse.Namespace) -> None:
    """`tq-inductor balance`."""
    import torch

    from .balance import balance_keys
    from .generate_text import load_checkpoint

    if args.out.exists():
        raise UsageError(f"{args.out} exists: name a folder that does not, for the changed model")
    tokenizer, model = load_checkpoint(args.model, args.dtype)
    model = model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inputs = tokenizer(args.text, return_tensors="pt")["input_ids"][:, : args.tokens]
    if not inputs.shape[1]:
        raise UsageError("the text has no tokens: give one like those that the model will read")
    exponents = balance_keys(model, inputs.to(model.device))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    scaled = sum(int(layer.count_nonzero()) for layer in exponents.values())
    channels = sum(layer.numel() for layer in exponents.values())
    print(f"scaled {scaled:,} of {channels:,} channels of keys; wrote {args.out}")


def run_bench(args: argparse.Namespace) -> None:
    """`tq-inductor bench`."""
    from .bench import grid, run_bench

    points = grid(
        args.model, args.size, args.cache, args.batch, args.context, args.new_tokens, args.prefill_tokens,
        args.largest,
    )  # fmt: skip
    run_bench(points, args.out, time_limit=args.time_limit, stop_after=args.stop_after)


def run_plot(args: argparse.Namespace) -> None:
    """`tq-inductor plot`."""
    from .plot import draw_plots

    for path in draw_plots(args.result, args.out, args.format):
        print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tq-inductor", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, says: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=says, description=says)
        found.set_defaults(run=run)
        return found

    command("doctor", lambda args: doctor(), "what this machine can run, and why not the rest")

    demo = command("demo", run_demo, "a small model reads held-out text from a packed cache")
    demo.add_argument("--kv-format", type=kv_format_name, default="k4v4", help="default: k4v4")
    demo.add_argument("--device", type=device_name, help="default: cuda if there is one")
    demo.add_argument("--json", type=new_file, metavar="FILE", help="write the figures there too")

    generate = command("generate", run_generate, "a transformers model goes on with a text")
    add = generate.add_argument
    add("model", nargs="?", help="folder or name of a checkpoint; default: the small one that ships here")
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="default: read standard input")
    prompt.add_argument("--prompt-file", dest="prompt", type=text_of, metavar="FILE")
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="default: 128")
    add("--cache", choices=("turboquant", "static", "dynamic"), default="turboquant")
    kinds = "a format, auto, or a file that `calibrate` wrote"
    add("--kv-format", type=kv_format_or_policy, help=f"of a turboquant cache: {kinds}; default: k4v4")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    add("--device", type=device_name, help="default: cuda if there is one")
    add("--dtype", type=dtype_name, default="auto", help="such as bfloat16; default: the checkpoint's")
    add("--prefill-chunk-size", type=positive, metavar="N", help="read the prompt N tokens at a time")
    seed = number(int, "a whole number from -2**63 to 2**64 - 1", lambda x: -(2**63) <= x < 2**64)
    add("--seed", type=seed, help="of the sampling")
    add("--do-sample", action="store_true", help="sample; default: always the most probable token")
    for name, (kind, says) in SAMPLING.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=says)
    add("--json", type=new_file, metavar="FILE", help="write the figures there too")

    calibrate = command("calibrate", run_calibrate, "choose a format for each layer, on your own text")
    add = calibrate.add_argument
    add("text", type=text_of, help="of the kind that the model will read")
    add("model", nargs="?", help="folder or name of a checkpoint; default: the small one that ships here")
    add("--out", type=new_file, default=Path("policy.json"), metavar="FILE", help="default: policy.json")
    add("--plot", type=new_plot, metavar="FILE", help="draw the prices of layers and formats, .svg or .png")
    add(
        "--budget", type=kv_format_or_bits, default="k4v4",
        help="take no more bytes than this format, or bits a value such as 2.6; default: k4v4",
    )  # fmt: skip
    add(
        "--formats", type=kv_format_name, nargs="+", metavar="FORMAT", help="to choose from; default: eight"
    )
    add("--tokens", type=positive, default=2048, metavar="N", help="of the text to read; default: 2048")
    add("--device", type=device_name, help="default: cuda if there is one")
    add("--dtype", type=dtype_name, default="auto", help="such as bfloat16; default: the checkpoint's")

    balance = command("balance", run_balance, "scale keys against queries, so that packing loses less")
    add = balance.add_argument
    add("text", type=text_of, help="of the kind that the model will read")
    add("model", help="folder or name of a checkpoint")
    add("--out", type=new_folder, required=True, metavar="FOLDER", help="where the changed checkpoint goes")
    add("--tokens", type=positive, default=1024, metavar="N", help="of the text to read; default: 1024")
    add("--device", type=device_name, help="default: cuda if there is one")
    add("--dtype", type=dtype_name, default="auto", help="such as bfloat16; default: the checkpoint's")

    bench = command("bench", run_bench, "speed, memory and compile time of caches, ours and transformers'")
    add = bench.add_argument
    formats = "KV formats of a TurboQuantCache such as k4v4"
    add("--out", type=new_file, default=Path("bench.json"), help="default: bench.json; run again to go on")
    add("--model", choices=BENCH_MODELS, nargs="+", help="shapes, weights random; default: all, CPU: llama")
    add("--size", choices=("full", "tiny"), help="default: full on a GPU, tiny on a CPU")
    add(
        "--cache",
        type=bench_cache,
        nargs="+",
        metavar="CACHE",
        help=f"{', '.join(BENCH_CACHES)}, or {formats}",
    )
    add("--batch", type=positive, nargs="+", metavar="B")
    add("--context", type=positive, nargs="+", metavar="N", help="tokens of the prompts")
    add("--largest", action="store_true", help="also look for the largest context that fits")
    # Of two steps before those that are measured, one compiles and one records a CUDA graph.
    at_least_3 = number(int, "a whole number of at least 3", lambda x: x >= 3)
    add("--new-tokens", type=at_least_3, default=24, metavar="N", help="per measurement; default: 24")
    add("--prefill-tokens", type=positive, default=1 << 18, metavar="N", help="of a batch, read at once")
    add("--time-limit", type=above_zero, default=600, metavar="S", help="for one point; default: 600")
    add("--stop-after", type=at_least_zero, metavar="S", help="start no new point after so many seconds")

    plot = command("plot", run_plot, "draw speed and memory over context, and tokens/s over batch")
    plot.add_argument("result", type=existing_file, help="what `bench` wrote")
    plot.add_argument("--out", type=new_folder, default=Path("."), metavar="FOLDER", help="default: here")
    plot.add_argument("--format", choices=("svg", "png"), default="svg")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        said = f"it needs {package}, which is not installed: pip install 'tq_inductor[cli]'"
    except (UsageError, FormatError, UnsupportedModelError, OSError) as error:
        said = str(error)
    else:
        return 0
    print(f"tq-inductor {args.command}: {said}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
