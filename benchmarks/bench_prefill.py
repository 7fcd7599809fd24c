"""Prefill attention that PyTorch's SDPA can only do with a dense mask, on a GPU.

    python benchmarks/bench_prefill.py [--out FOLDER] [--commit NAME]

Each case: our `attend` with bounds, SDPA with the mask and repeated KV heads (what transformers' graph
asks of Inductor), and cuDNN with the mask. Writes `prefill.json`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, replay_times, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tq_inductor import ops  # noqa: F401  (defines torch.ops.tq_inductor)

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


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
    opaque: bool = False  # the mask is an input of the graph: its extents are looked for, and it is applied

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
        return (bounds[..., :1] <= slot) & (slot < bounds[..., 1:])


CASES = (
    Case("plain causal", 1, 4096, 4096),
    Case("first chunk into a static cache", 1, 4096, 32768),
    Case("second chunk into a static cache", 1, 4096, 32768, start=4096),
    Case("left padding, half", 8, 2048, 2048, padding=1024),
    Case("left padding, half, as a mask over keys", 8, 2048, 2048, padding=1024, key_mask=True),
    Case("first chunk into a static cache, opaque mask", 1, 4096, 32768, opaque=True),
    Case("second chunk into a static cache, opaque mask", 1, 4096, 32768, start=4096, opaque=True),
    Case("sliding window of 1024", 1, 16384, 16384, window=1024),
)


@torch.compile
def extents(mask: torch.Tensor) -> torch.Tensor:
    """The bounds that the compiler computes of a mask `[B, 1, q, L]`."""
    key = torch.arange(mask.shape[-1], device=mask.device)
    first = torch.where(mask, key, mask.shape[-1]).amin(-1)
    return torch.stack((first, torch.where(mask, key + 1, 0).amax(-1)), -1)[:, 0].int()


def measure(case: Case) -> dict[str, Any]:
    """Microseconds of each way, and how far ours is from SDPA."""
    q, k, v = (
        torch.randn(case.batch, heads, n, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for heads, n in ((HEADS, case.q_len), (KV_HEADS, case.kv_len), (KV_HEADS, case.kv_len))
    )
    bounds, mask = case.bounds(), case.mask()
    keys = (torch.arange(case.kv_len, device="cuda") >= case.padding).expand(case.batch, 1, 1, -1)

    def ours() -> torch.Tensor:
        applied = mask if case.opaque else keys if case.key_mask else None
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
        ways["extents_of_the_mask"] = lambda: extents(mask)
    if case.name == "plain causal":
        ways["sdpa_is_causal"] = lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)
    for name, way in ways.items():
        row[name] = replay_times([way])
    print(row, flush=True)
    return row


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    args = parser.parse_args()
    rows = [measure(case) for case in CASES]
    what = "one prefill attention, 32/8 heads, D=128, bf16"
    write_result(
        "prefill", {"what": what, "environment": environment(args.commit), "cases": rows}, args.out
    )


if __name__ == "__main__":
    main()
