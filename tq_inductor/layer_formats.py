"""Which format each layer of a cache gets: one for all, one for each (see `calibrate`), or "auto".

And how many tokens it keeps as they came besides: few bits need more of them.

"auto" is for a model that nobody has measured. It knows the config only, and gives up bytes where four bits
may cost much (docs/quality.md): keys whose channels have large means, which come with a bias of k_proj, and
short heads, where a vector has few coordinates to spread its energy over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import FormatError
from .format import KVFormat

log = logging.getLogger("tq_inductor.cache")

SAFE, SMALL = "k8v4", "k4v4"
# How many of the first tokens are kept as they came, and of the last, by bits of keys and of values: as few
# as bring the demo model near the exact cache (docs/quality.md), in pieces of 16, which kernels read.
SINKS = 4
RECENT_FOR_KEYS = {2: 124, 3: 28, 4: 12}
RECENT_FOR_VALUES = {2: 60, 3: 28, 4: 12}
LEAST_HEAD_DIM = 128  # from which on keys of four bits are taken to be safe


def safe_format(config: Any, head_dims: Sequence[int | None]) -> tuple[str, str]:
    """The format that "auto" stands for, and why.

    Args:
        config: a decoder's config.
        head_dims: of its layers; None for those without attention.
    """
    smallest = min((dim for dim in head_dims if dim), default=LEAST_HEAD_DIM)
    biased = getattr(config, "attention_bias", None)
    if biased is None:
        return SAFE, "its config does not say whether keys have a bias, with which 4-bit keys may fail"
    if biased:
        return SAFE, "its keys have a bias, with which 4-bit keys may fail"
    if smallest < LEAST_HEAD_DIM:
        return SAFE, f"its head dimension is {smallest}: below {LEAST_HEAD_DIM} 4-bit keys lose more"
    return SMALL, f"its keys have no bias and its head dimension is {smallest}"


def exact_tokens(name: str, sink_tokens: int | None, recent_tokens: int | None) -> tuple[int, int]:
    """How many of the first and of the last tokens a layer of this format keeps as they came.

    None: as many as the format needs, which is none of 8 bits. Of a lossless format all are as they came.
    """
    fmt = KVFormat(name)
    if fmt.is_lossless:
        return 0, 0
    recent = max(RECENT_FOR_KEYS.get(fmt.k_bits, 0), RECENT_FOR_VALUES.get(fmt.v_bits, 0))
    sinks = SINKS if recent else 0
    return (
        sinks if sink_tokens is None else sink_tokens,
        recent if recent_tokens is None else recent_tokens,
    )


def read_policy(path: Path) -> list[str]:
    """The format of each layer, from the file that `tq-inductor calibrate` wrote.

    Raises:
        FormatError: not such a file, or a format that does not exist.
    """
    try:
        names = json.loads(path.read_text())["kv_format"]
        return [KVFormat(name).name for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f'{path} is no policy: write one with tq-inductor calibrate ("kv_format" names a format for '
            f"each layer; {error})"
        ) from error


def layer_formats(
    kv_format: str | Sequence[str], config: Any, head_dims: Sequence[int | None]
) -> list[str]:
    """The name of each layer's format.

    Args:
        kv_format: a name for all layers, one for each, or "auto" (whose choice is logged with its reason).
        config: the decoder's config.
        head_dims: of its layers; None for those without attention.

    Raises:
        FormatError: a format or head dimension that cannot be stored, or not as many names as layers.
    """
    if isinstance(kv_format, str):
        if kv_format == "auto":
            kv_format, reason = safe_format(config, head_dims)
            log.info('kv_format="auto" is %s: %s', kv_format, reason)
        kv_format = [kv_format] * len(head_dims)
    if not isinstance(kv_format, Sequence) or not all(isinstance(name, str) for name in kv_format):
        raise FormatError(
            f'kv_format={kv_format!r}: give the name of a format, such as "k4v4", or a list with one for '
            "each layer"
        )
    if len(kv_format) != len(head_dims):
        raise FormatError(
            f"kv_format names {len(kv_format)} formats, but the model has {len(head_dims)} layers: give "
            "one name for all, or one for each layer (that of a layer without full attention is not used)"
        )
    return [KVFormat(name, dim or 128).name for name, dim in zip(kv_format, head_dims, strict=True)]
