"""Attention of padded batches, half of the tokens padding, on a GPU.

    python benchmarks/bench_padding.py [--out FOLDER] [--commit NAME] [--backends NAME ...]

Each case is the attention of a few layers that share a mask, written as transformers writes it: key and
value heads repeated, a bool mask made of `attention_mask`. The default is what Inductor makes of it (its
masked SDPA); the others are our compiler's, by attention backend: `triton` reads from the first to the last
visible key, the rest take ragged sequences (gathering, scattering and counting tokens included). Writes
`padding.json`, from which the row for padding in `tq_inductor/attention/order.py` follows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, installed, replay_times, write_result
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tq_inductor.attention.select import attention_backends
from tq_inductor.compiler import turboquant

LAYERS = 4
WAYS = ("triton", "torch_flash", "fa3", "fa4", "fa2")
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A batch of rows of 1 to `length` tokens, half as many as there is room for; `side` says where not."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    side: str
    even: bool = False  # all rows are half as long as there is room for

    def shown(self, device: str) -> torch.Tensor:
        """bool `[B, L]`: `attention_mask`."""
        if self.even or self.batch == 1:
            lengths = torch.full((self.batch,), self.length // 2)
        else:
            lengths = torch.linspace(1, self.length, self.batch).round().long()
        place = torch.arange(self.length)
        place = place.flip(0) if self.side == "left" else place
        return (place < lengths[:, None]).to(device)

    def layers(self, device: str, dtype: torch.dtype) -> list[Layer]:
        """q, k and v of each layer, as linear layers leave them."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return [
            tuple(
                torch.randn(self.batch, self.length, n, self.head_dim, device=device, dtype=dtype)
                .transpose(1, 2)
                for n in heads
            )
            for _ in range(LAYERS)
        ]  # fmt: skip


CASES = (
    Case("BERT, right padding", 32, 512, 16, 16, 64, causal=False, side="right"),
    Case("BERT, right padding, rows alike", 32, 512, 16, 16, 64, causal=False, side="right", even=True),
    Case("encoder, D=128, right padding", 8, 2048, 16, 16, 128, causal=False, side="right"),
    Case("Llama, left padding", 8, 2048, 32, 8, 128, causal=True, side="left"),
    Case("Llama, left padding, rows alike", 8, 2048, 32, 8, 128, causal=True, side="left", even=True),
    Case("Llama, right padding", 8, 2048, 32, 8, 128, causal=True, side="right"),
)


def attention(shown: torch.Tensor, layers: Sequence[Layer], causal: bool) -> list[torch.Tensor]:
    """`[B, L, H, D]` of each layer."""
    mask = shown[:, None, None, :]
    length = shown.shape[1]
    if causal:
        place = torch.arange(length, device=shown.device)
        mask = mask & (place[None, None, None, :] <= place[None, None, :, None])
    mask = mask.expand(-1, 1, length, length)
    results = []
    for q, k, v in layers:
        batch, heads, _, dim = q.shape
        group = heads // k.shape[1]
        if group > 1:
            k, v = (
                x[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, heads, length, dim)
                for x in (k, v)
            )
        results.append(sdpa(q, k, v, attn_mask=mask).transpose(1, 2).contiguous())
    return results


def ways(names: Sequence[str]) -> dict[str, Callable[..., list[torch.Tensor]]]:
    """Name -> `attention`, compiled; says why not others."""
    found: dict[str, Callable[..., list[torch.Tensor]]] = {"default": torch.compile(attention)}
    available = attention_backends()
    for name in names:
        if not available[name]:
            print(f"not {name}: {'; '.join(available[name].reasons)}")
            continue
        found[name] = torch.compile(attention, backend=turboquant, options={"attention": name})
    return found


def difference(out: torch.Tensor, expected: torch.Tensor, where: torch.Tensor) -> float:
    """The largest, over the queries `[B, L]` of `where`."""
    apart = (out - expected).float().abs().amax((2, 3))
    return round(torch.where(where, apart, 0.0).max().item(), 5)  # of NaN too, where nothing is seen


def measure(case: Case, names: Sequence[str], device: str) -> dict[str, Any]:
    """Microseconds of one layer each way, and the largest differences from SDPA in float32."""
    print(case, flush=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shown, layers = case.shown(device), case.layers(device, dtype)
    wide = tuple(x.float() for x in layers[0])
    expected = attention(shown, [wide], case.causal)[0].to(dtype)
    # Queries that see a key: the kernels of PyTorch differ in what the others get.
    seeing = shown.cumsum(1) > 0 if case.causal else shown.any(1, keepdim=True).expand_as(shown)
    row: dict[str, Any] = {**asdict(case), "layers": LAYERS}
    for name, way in ways(names).items():
        torch._dynamo.reset()
        out = way(shown, layers, case.causal)[0]
        row[name] = {
            "on_real_tokens": difference(out, expected, shown),
            "on_all_that_see_a_key": difference(out, expected, seeing),
        }
        if device == "cuda":
            times = replay_times([lambda way=way: way(shown, layers, case.causal)])
            row[name] |= {key: round(value / LAYERS, 2) for key, value in times.items()}
            row[name]["faster_than_default"] = round(
                row["default"]["median_us"] / row[name]["median_us"], 2
            )
        print(f"    {name:12} {row[name]}", flush=True)
    return row


@torch.no_grad()
def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--backends", nargs="*", default=WAYS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measure(case, args.backends, device) for case in CASES]
    what = "the attention of one layer of a padded batch, bf16, CUDA graphs, microseconds"
    about = environment(args.commit) | installed("fa3-fwd", "flash-attn", "flash-attn-4")
    write_result("padding", {"what": what, "environment": about, "cases": rows}, args.out)


if __name__ == "__main__":
    main()
