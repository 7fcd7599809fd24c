"""Prefill attention that PyTorch's SDPA can only do with a dense mask, and over a packed prefix, on a GPU.

    python benchmarks/bench_prefill.py [--out FOLDER] [--commit NAME]

Each case: our `attend` with bounds, SDPA with the mask and repeated KV heads (what transformers' graph
asks of Inductor), and cuDNN with the mask. Each continuation: new tokens over a packed prefix, by
`tq_append_attend`, over the same in 16 bits, and dequantized first. Writes `prefill.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, replay_times, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tq_inductor import PackedKVCache

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PREFIX, NEW_TOKENS = 28_672, (17, 128, 512, 4096)
OPS = torch.ops.tq_inductor


@dataclass(frozen=True)
class Case:
    """Queries are tokens `start ..` of `kv_len` slots; the first `padding` of each row are padding."""

    name: str
    batch: int
    q_len: int
    kv_len: int
    start: int = 0
    padding: int = 0
    window: int = 0
    key_mask: bool = False  # padding is also given as a mask over keys, as the compiler does
    documents: int = 0  # of so many tokens, one behind the other: a query sees its own only
    shown: float = 1.0  # part of what is left that a query sees, anywhere
    opaque: bool = False  # the mask is an input of the graph: it is packed, and its extents are looked for

    def bounds(self) -> torch.Tensor:
        """int32 `[B, q, 2]`."""
        end = self.start + 1 + torch.arange(self.q_len)
        first = torch.full_like(end, self.padding)
        if self.window:
            first = torch.maximum(first, end - self.window)
        return torch.stack((first, end), -1).expand(self.batch, -1, -1).to("cuda", torch.int32)

    def mask(self) -> torch.Tensor:
        """bool `[B, 1, q, L]`."""
        slot = torch.arange(self.kv_len, device="cuda")
        bounds = self.bounds()[:, None]
        mask = (bounds[..., :1] <= slot) & (slot < bounds[..., 1:])
        if self.documents:
            token = self.start + torch.arange(self.q_len, device="cuda")[:, None]
            mask &= slot // self.documents == token // self.documents
        return mask & (torch.rand(mask.shape, device="cuda") < self.shown) if self.shown < 1 else mask


CASES = (
    Case("plain causal", 1, 4096, 4096),
    Case("first chunk into a static cache", 1, 4096, 32768),
    Case("second chunk into a static cache", 1, 4096, 32768, start=4096),
    Case("left padding, half", 8, 2048, 2048, padding=1024),
    Case("left padding, half, as a mask over keys", 8, 2048, 2048, padding=1024, key_mask=True),
    Case("first chunk into a static cache, opaque mask", 1, 4096, 32768, opaque=True),
    Case("second chunk into a static cache, opaque mask", 1, 4096, 32768, start=4096, opaque=True),
    Case("a chunk into slots of an odd number, opaque mask", 8, 1024, 8217, start=4096, opaque=True),
    Case("documents of 512 tokens, opaque mask", 1, 8192, 8192, documents=512, opaque=True),
    Case("half of what came before, anywhere, opaque mask", 1, 4096, 4096, shown=0.5, opaque=True),
    Case("sliding window of 1024", 1, 16384, 16384, window=1024),
)


@torch.compile
def extents(mask: torch.Tensor) -> torch.Tensor:
    """The bounds `[B, q, 4]` that the compiler computes of a mask `[B, 1, q, L]`."""
    key = torch.arange(mask.shape[-1], device=mask.device)
    first = torch.where(mask, key, mask.shape[-1]).amin(-1)
    end = torch.where(mask, key + 1, 0).amax(-1)
    whole = torch.where(mask.sum(-1) == end - first, end, 0)
    return torch.stack((first, end, first, whole), -1)[:, 0].int()


def measure(case: Case) -> dict[str, Any]:
    """Microseconds of each way, and how far ours is from SDPA."""
    q, k, v = (
        torch.randn(case.batch, heads, n, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for heads, n in ((HEADS, case.q_len), (KV_HEADS, case.kv_len), (KV_HEADS, case.kv_len))
    )
    bounds, mask = case.bounds(), case.mask()
    applied = None
    if case.opaque:
        applied, bounds = OPS.pack_mask(mask), extents(mask)
    if case.key_mask:
        whole = bounds.new_tensor([case.padding, case.kv_len]).expand_as(bounds)
        bounds = torch.cat((bounds, whole), -1)
        applied = (torch.arange(case.kv_len, device="cuda") >= case.padding).expand(case.batch, 1, 1, -1)

    def ours() -> torch.Tensor:
        return torch.ops.tq_inductor.attend(q, k, v, applied, bounds, None, HEAD_DIM**-0.5, "triton")  # type: ignore[no-any-return]

    def dense() -> torch.Tensor:
        group = HEADS // KV_HEADS
        return sdpa(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask)

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    real = mask.any(-1, keepdim=True)
    error = ((ours() - dense()).masked_fill(~real, 0).abs().max()).item()
    row: dict[str, Any] = {**case.__dict__, "largest_difference": round(error, 5)}
    ways = {"attend": ours, "sdpa_with_mask": dense, "cudnn_with_mask": cudnn}
    if case.opaque:  # once for all layers
        ways["of_the_mask"] = lambda: (OPS.pack_mask(mask), extents(mask))
    if case.name == "plain causal":
        ways["sdpa_is_causal"] = lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)
    for name, way in ways.items():
        try:
            row[name] = replay_times([way])
        except RuntimeError as error:
            if name != "cudnn_with_mask":  # which does not take every size
                raise
            row[name] = {"error": str(error).splitlines()[0]}
    print(row, flush=True)
    return row


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory that a call holds beyond what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def measure_continuation(new: int, kv_format: str = "k4v4") -> dict[str, Any]:
    """Microseconds and peak memory of `new` tokens over a packed prefix of `PREFIX`, storing included."""
    q, k, v = (
        torch.randn(1, heads, n, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for heads, n in ((HEADS, new), (KV_HEADS, PREFIX + new), (KV_HEADS, PREFIX + new))
    )
    cache = PackedKVCache(1, KV_HEADS, HEAD_DIM, PREFIX + new, kv_format=kv_format)
    cache.append(k[:, :, :PREFIX], v[:, :, :PREFIX])
    own = tuple(x[:, :, PREFIX:].clone() for x in (k, v))
    cache.append(*own)
    places = (cache.seq_length, cache.k_rotation, cache.v_rotation)
    visible = (None, None, None, kv_format, PREFIX + new, HEAD_DIM**-0.5)
    ends = PREFIX + 1 + torch.arange(new, device="cuda")
    bounds = torch.stack((torch.zeros_like(ends), ends), -1)[None].int()

    def packed() -> torch.Tensor:
        return OPS.tq_append_attend(  # type: ignore[no-any-return]
            cache.packed, q, *own, *places, *visible, *cache._beside, own=True
        )

    def over(backend: str, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if backend == "triton":
            return OPS.attend(q, keys, values, None, bounds, None, HEAD_DIM**-0.5, backend)  # type: ignore[no-any-return]
        plain = (None, None, None, "bottom-right", -1, 0, None)
        return OPS.dense_attn(q, keys, values, *plain, HEAD_DIM**-0.5, backend)  # type: ignore[no-any-return]

    def dequantized(backend: str) -> torch.Tensor:
        OPS.tq_store(cache.packed, *own, *places, kv_format, *cache._beside)
        return over(backend, *cache.read(PREFIX + new, own))

    error = (packed() - over("triton", *cache.read(PREFIX + new, own))).abs().max().item()
    row: dict[str, Any] = {"new_tokens": new, "prefix": PREFIX, "format": kv_format}
    row["largest_difference"] = round(error, 5)
    ways = {
        "append_attend": packed,
        "attend_16_bit": lambda: over("triton", k, v),
        "flash_16_bit": lambda: over("torch_flash", k, v),
        "dequantize_and_flash": lambda: dequantized("torch_flash"),
    }
    for name, way in ways.items():
        row[name] = {**replay_times([way]), "peak_bytes": peak_bytes(way)}
    print(row, flush=True)
    return row


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    rows = [measure(case) for case in CASES]
    continuations = [measure_continuation(new) for new in NEW_TOKENS]
    what = "one prefill attention, 32/8 heads, D=128, bf16"
    result = {"what": what, "environment": environment(args.commit), "cases": rows}
    write_result("prefill", {**result, "continuations": continuations}, args.out)


if __name__ == "__main__":
    main()
