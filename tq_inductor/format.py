"""`KVFormat`: the one description of how keys and values lie in a cache's bytes.

The reference implementation, the kernels and the documentation take every size and offset from
here. A page of `page_size` tokens of one KV head is four planes, one after the other:

    key rows | value rows | key scales | value scales

A *row* is the codes of one token. Key rows are token-major. Packed value rows are interleaved by
16 tokens (byte `j` of tokens 16i..16i+15 lies contiguous), because 8-bit tensor-core operands have
no transposing load. A cache of contiguous memory is one page per batch row.

Codes of `bits` in {2, 3, 4} are sign and magnitude (the sign is the highest bit; the magnitude
indexes the codebook); codes of 8 bits are fp8 e4m3. With D the head dimension, a row is:

| bits | bytes  | byte j holds                                                                   |
|------|--------|--------------------------------------------------------------------------------|
| 8    | D      | dim j                                                                          |
| 4    | D/2    | dims j, j + D/2 (low bits first)                                               |
| 3    | 3D/8   | j < D/4: magnitudes of dims j, j + D/4, j + D/2, j + 3D/4; then D/8 bytes with |
|      |        | the signs of dims j, j + D/8, ..., j + 7D/8                                     |
| 2    | D/4    | dims j, j + D/4, j + D/2, j + 3D/4                                             |
| 16   | 2D     | the bf16 or fp16 value itself                                                  |
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch

from .errors import FormatError

PACKED_BITS = (2, 3, 4, 8)
LOSSLESS = {"bf16": torch.bfloat16, "fp16": torch.float16}
VLLM_ALIASES = {
    "turboquant_k8v4": "k8v4",
    "turboquant_4bit_nc": "k4v4",
    "turboquant_k3v4_nc": "k3v4",
    "turboquant_3bit_nc": "k3v3",
}
PAGE_ALIGNMENT = 16  # tokens; the interleave of value rows, and 16-byte alignment of every plane
SCALE_DTYPE = torch.bfloat16  # fp32's range in two bytes: fp16 overflows past 65504
MAX_HEAD_DIM = 1024


def format_names() -> list[str]:
    """All canonical names, e.g. `["k2v2", ..., "k8v8", "bf16", "fp16"]`."""
    return [f"k{k}v{v}" for k in PACKED_BITS for v in PACKED_BITS] + list(LOSSLESS)


def row_bytes(bits: int, head_dim: int) -> int:
    """Bytes of the codes of one token of one head."""
    return head_dim * bits // 8


@dataclass(frozen=True)
class Plane:
    """One plane of a page of one KV head: `nbytes` bytes from `offset`."""

    name: str
    offset: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class KVFormat:
    """How one token of one KV head is stored.

    Args:
        name: `k{bits}v{bits}` with bits in 2, 3, 4, 8 (8 is fp8 e4m3 with a scale per token and
            head), `"bf16"` or `"fp16"` (lossless), or one of vLLM's preset names.
        head_dim: dimension of a key; a multiple of 8 for packed formats.
        v_head_dim: dimension of a value; that of the key unless given.

    Raises:
        FormatError: unknown name, or a head dimension that the format cannot hold.
    """

    name: str
    head_dim: int = 128
    v_head_dim: int = 0

    def __post_init__(self) -> None:
        name = VLLM_ALIASES.get(str(self.name), self.name)
        if str(name) not in LOSSLESS and not re.fullmatch(r"k[2348]v[2348]", str(name)):
            known = format_names() + list(VLLM_ALIASES)
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise FormatError(
                f"unknown kv_format {self.name!r}.{hint} Allowed: k{{bits}}v{{bits}} with bits in "
                f"2, 3, 4, 8, or 'bf16', 'fp16', or one of {', '.join(VLLM_ALIASES)}."
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.head_dim)
        for label, dim in (("head_dim", self.head_dim), ("v_head_dim", self.v_head_dim)):
            if not 1 <= dim <= MAX_HEAD_DIM or (dim % 8 and not self.is_lossless):
                raise FormatError(
                    f"{label}={dim} cannot be stored as {name}: packed formats take multiples of "
                    f"8 from 8 to {MAX_HEAD_DIM}, 'bf16' and 'fp16' any up to {MAX_HEAD_DIM}."
                )

    @property
    def is_lossless(self) -> bool:
        """Whether values are kept as they are (bf16 or fp16), without rotation, codes or scales."""
        return self.name in LOSSLESS

    @property
    def dtype(self) -> torch.dtype:
        """Element type of a lossless format's rows, else uint8."""
        return LOSSLESS.get(self.name, torch.uint8)

    @property
    def k_bits(self) -> int:
        """Bits per key element, scales not counted."""
        return 16 if self.is_lossless else int(self.name[1])

    @property
    def v_bits(self) -> int:
        """Bits per value element, scales not counted."""
        return 16 if self.is_lossless else int(self.name[3])

    @property
    def k_row_bytes(self) -> int:
        """Bytes of one token's key codes."""
        return row_bytes(self.k_bits, self.head_dim)

    @property
    def v_row_bytes(self) -> int:
        """Bytes of one token's value codes."""
        return row_bytes(self.v_bits, self.v_head_dim)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale of one key or one value."""
        return 0 if self.is_lossless else SCALE_DTYPE.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token of one KV head: key, value and their scales."""
        return self.k_row_bytes + self.v_row_bytes + 2 * self.scale_bytes

    @property
    def bits_per_value(self) -> float:
        """Bits per stored element, scales included."""
        return 8 * self.slot_bytes / (self.head_dim + self.v_head_dim)

    @property
    def compression(self) -> float:
        """How many times smaller than a 16-bit cache."""
        return 16 / self.bits_per_value

    def planes(self, page_size: int) -> tuple[Plane, ...]:
        """The planes of one page of one KV head, in the order in which they lie.

        Args:
            page_size: tokens per page, a multiple of `PAGE_ALIGNMENT`.
        """
        if page_size % PAGE_ALIGNMENT:
            raise FormatError(
                f"page_size={page_size} is not a multiple of {PAGE_ALIGNMENT}: value rows are "
                f"interleaved by {PAGE_ALIGNMENT} tokens. Round it up."
            )
        planes, offset = [], 0
        for name, row in (
            ("k_rows", self.k_row_bytes),
            ("v_rows", self.v_row_bytes),
            ("k_scales", self.scale_bytes),
            ("v_scales", self.scale_bytes),
        ):
            planes.append(Plane(name, offset, page_size * row, row))
            offset += page_size * row
        return tuple(planes)

    def page_size(self, page_bytes: int) -> int:
        """Tokens in a page of `page_bytes` bytes."""
        return page_bytes // self.slot_bytes

    def cache_bytes(self, batch_size: int, num_kv_heads: int, max_len: int) -> int:
        """Bytes of one layer's cache for `max_len` tokens (rounded up to `PAGE_ALIGNMENT`)."""
        return batch_size * num_kv_heads * round_up(max_len) * self.slot_bytes

    def describe(self) -> str:
        """One line for people: bytes per token and head, bits per value, compression."""
        kind = "lossless" if self.is_lossless else f"keys {self.k_bits}-bit, values {self.v_bits}-bit"
        dims = f"head_dim {self.head_dim}"
        if self.v_head_dim != self.head_dim:
            dims += f"/{self.v_head_dim}"
        return (
            f"{self.name} ({kind}, {dims}): {self.slot_bytes} bytes per token and KV head, "
            f"{self.bits_per_value:.3f} bits per value, {self.compression:.2f}x smaller than 16-bit"
        )


def round_up(tokens: int) -> int:
    """`tokens` rounded up to a whole number of 16-token value groups."""
    return -(-tokens // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def format_table(head_dims: tuple[int, ...] = (64, 128, 256)) -> str:
    """The Markdown table of `docs/cache_format.md`: bytes per token and KV head, by head_dim."""
    header = "| format | " + " | ".join(f"D={d}" for d in head_dims) + " | bits/value (D=128) |"
    rule = "|---|" + "---|" * (len(head_dims) + 1)
    rows = []
    for name in ("k8v8", "k8v4", "k4v4", "k4v3", "k4v2", "k3v4", "k3v3", "k3v2", "k2v2", "bf16"):
        cells = []
        for dim in head_dims:
            fmt = KVFormat(name, dim)
            cells.append(f"{fmt.slot_bytes} ({fmt.compression:.2f}x)")
        bits = KVFormat(name, 128).bits_per_value
        rows.append(f"| {name} | " + " | ".join(cells) + f" | {bits:.3f} |")
    return "\n".join([header, rule, *rows])
