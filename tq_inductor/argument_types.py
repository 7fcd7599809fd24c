"""What arguments of the command line may be: types for argparse, which say what was given and allowed."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from .errors import FormatError
from .format import KVFormat
from .layer_formats import read_policy

BENCH_CACHES = ("dynamic", "quantized", "static-inductor", "static")


def kv_format_name(name: str) -> str:
    """Argument type: a KV format that exists."""
    try:
        return KVFormat(name, 64).name
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def kv_format_or_bits(text: str) -> str | float:
    """Argument type: a KV format that exists, or a positive number."""
    try:
        bits = float(text)
    except ValueError:
        return kv_format_name(text)
    if not 0 < bits < math.inf:
        raise argparse.ArgumentTypeError(f"{text} bits a value (needs a positive number)")
    return bits


def kv_format_or_policy(text: str) -> str | list[str]:
    """Argument type: a KV format, "auto", or the formats of a policy file."""
    try:
        if text.endswith(".json"):
            return read_policy(existing_file(text))
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text if text == "auto" else kv_format_name(text)


def bench_cache(name: str) -> str:
    """Argument type: a cache that `bench` knows."""
    try:
        return name if name in BENCH_CACHES else kv_format_name(name)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} Or one of {', '.join(BENCH_CACHES)}.") from None


def number(
    kind: type[int] | type[float], said: str, allowed: Callable[[float], bool]
) -> Callable[[str], float]:
    """Argument type: a number that is `said` to be what is `allowed`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which is in no range
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {said}")
        return value

    return parse


positive = number(int, "a whole number of at least 1", lambda x: x >= 1)
above_zero = number(float, "a number above 0", lambda x: 0 < x < math.inf)
at_least_zero = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
probability = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
# Options of transformers' `generate`, by its names.
SAMPLING = {
    "temperature": (above_zero, "divides the logits"),
    "top_k": (
        number(int, "a whole number of at least 0", lambda x: x >= 0),
        "sample among so many tokens; 0: among all",
    ),
    "top_p": (probability, "sample among the fewest tokens that have this probability together"),
    "min_p": (
        probability,
        "sample among tokens at least this probable, relative to the most probable",
    ),
    "repetition_penalty": (above_zero, "above 1: repeat less"),
}


def device_name(text: str) -> str:
    """Argument type: a device of this machine."""
    import torch

    try:
        device = torch.device(text)
        known = device.type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{text!r} is no device to run on: cpu, cuda, cuda:1, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"this machine has {torch.cuda.device_count()} CUDA devices")
    return text


def dtype_name(text: str) -> str:
    """Argument type: a dtype of weights, by its name in torch, or "auto"."""
    import torch

    dtype = getattr(torch, text, None)
    if text != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype: auto, bfloat16, float16, float32, ...")
    return text


def existing_file(text: str) -> Path:
    """Argument type: a file that can be read."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)


def text_of(name: str) -> str:
    """Argument type: what a text file holds."""
    try:
        return existing_file(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no text in UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {name!r}: {error.strerror}") from None


def new_path(text: str) -> Path:
    """Argument type: what can be written; folders that are missing are made when it is."""
    path = Path(text)
    folder = next((folder for folder in path.absolute().parents if folder.exists()), path)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"cannot write {text!r}: {str(folder)!r} is no folder that can be written to"
        )
    return path


def new_folder(text: str) -> Path:
    """Argument type: a folder that can be written to."""
    if new_path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file: name a folder")
    return Path(text)


def new_file(text: str) -> Path:
    """Argument type: a file that can be written, or replaced."""
    if new_path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: name a file in it")
    return Path(text)


def new_plot(text: str) -> Path:
    """Argument type: a figure that can be written, or replaced."""
    path = new_file(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .svg nor in .png")
    return path
