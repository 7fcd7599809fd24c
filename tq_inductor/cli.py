"""The command line `tq-inductor`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from .attention.order import orders_of
from .attention.packages import version_of
from .attention.select import attention_backends
from .errors import FormatError
from .format import KVFormat

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
        print(f"  {name:12} {'yes' if availability else 'no: ' + '; '.join(availability.reasons)}")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    print(
        "\nin order of preference (docs/attention-backends.md; 'band': causal with an offset, or a window)"
    )
    for order in orders_of(capability):
        print(f"  {order.describe():44} {', '.join(order.names)}")


def kv_format_name(name: str) -> str:
    """Argument type: a KV format that exists."""
    try:
        return KVFormat(name, 64).name
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="tq-inductor", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine can run, and why not the rest")
    demo = commands.add_parser("demo", help="a small model reads held-out text from a packed cache")
    demo.add_argument("--kv-format", type=kv_format_name, default="k4v4", help="default: k4v4")
    demo.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    if args.command == "doctor":
        doctor()
        return 0
    try:
        from .demo import run_demo
    except ModuleNotFoundError as error:
        print(f"the demo needs {error.name}: pip install 'tq_inductor[cli]'", file=sys.stderr)
        return 1
    figures = run_demo(args.kv_format, args.device)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
