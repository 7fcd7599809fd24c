"""Every attention backend on every call that it says it can run, on a GPU, beside PyTorch's own choice.

    python benchmarks/bench_backends.py [--out FOLDER] [--commit NAME] [--without NAME ...] [--cases WORD]

Each result is checked against attention in float64 (float32 where that is too large). The default is
`scaled_dot_product_attention` as models call it: with native GQA, and a mask where there is no flag.
Writes `backends.json`, from which the order in `tq_inductor/attention/order.py` follows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from evidence import RESULTS, environment, installed, replay_times, write_result
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tq_inductor import ops  # noqa: F401  (defines torch.ops.tq_inductor)
from tq_inductor.attention.call import AttentionCall
from tq_inductor.attention.select import BACKENDS, select

OPS = torch.ops.tq_inductor
PACKAGES = ("fa3-fwd", "flash-attn", "flash-attn-3", "flash-attn-4", "flashinfer-python")
SMALL = 1 << 22  # scores of one head for which the oracle computes in float64


@dataclass(frozen=True)
class Case:
    """One call; `back` and `ahead` limit what a query sees around its place, None: no limit."""

    name: str
    batch: int
    q_len: int
    kv_len: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    back: int | None = None
    ahead: int | None = 0  # causal
    ragged: tuple[int, ...] = ()  # lengths; then batch, q_len and kv_len say the sums
    cached: bool = False

    def call(self) -> AttentionCall:
        """The facts on which the choice depends, as the compiler finds them."""
        window = (self.back, self.ahead)
        plain = window == (None, None)
        equal = plain or self.q_len == self.kv_len
        flag = window == (None, 0) and equal
        cuda = torch.cuda.is_available()
        return AttentionCall(
            self.batch, self.q_len, self.kv_len, self.heads, self.kv_heads, self.head_dim, self.head_dim,
            torch.bfloat16, "cuda", torch.cuda.get_device_capability() if cuda else (9, 0),
            mask="none" if plain or flag else "bool", is_causal=flag, cached=self.cached,
            alignment="equal" if equal else "bottom-right", window=window, varlen=bool(self.ragged),
            interval=not (plain or flag), visible=self.name,
        )  # fmt: skip


RAGGED = (2048, 1, 700, 1300, 0, 33, 2000, 1024)
CASES = (
    Case("prefill", 1, 4096, 4096),
    Case("prefill", 4, 2048, 2048),
    Case("prefill, 2 KV heads", 1, 4096, 4096, 16, 2),
    Case("prefill, MHA, D=64", 4, 2048, 2048, 16, 16, 64),
    Case("prefill, D=256", 1, 4096, 4096, 16, 4, 256),
    Case("prefill, short", 8, 256, 256),
    Case("prefill, window 1024", 1, 8192, 8192, back=1023),
    Case("continuation", 1, 1024, 8192, cached=True),
    Case("continuation", 2, 128, 4096, cached=True),
    Case("continuation, D=64", 4, 512, 2048, 32, 8, 64, cached=True),
    Case("decode", 1, 1, 2048, cached=True, ahead=None),
    Case("decode", 1, 1, 8192, cached=True, ahead=None),
    Case("decode", 1, 1, 32768, cached=True, ahead=None),
    Case("decode", 4, 1, 4096, cached=True, ahead=None),
    Case("decode", 8, 1, 8192, cached=True, ahead=None),
    Case("decode", 32, 1, 4096, cached=True, ahead=None),
    Case("decode, MHA, D=64", 16, 1, 2048, 16, 16, 64, cached=True, ahead=None),
    Case("decode, D=256", 8, 1, 4096, 16, 4, 256, cached=True, ahead=None),
    Case("decode of 4 tokens", 4, 4, 8192, cached=True),
    Case("encoder", 32, 512, 512, 12, 12, 64, ahead=None),
    Case("encoder, image", 16, 1024, 1024, 16, 16, 64, ahead=None),
    Case("encoder, D=128", 8, 1024, 1024, 16, 16, 128, ahead=None),
    Case("encoder, local window", 8, 2048, 2048, 12, 12, 64, back=64, ahead=64),
    Case("cross-attention", 8, 256, 1500, 20, 20, 64, ahead=None),
    Case("cross-attention, D=128", 4, 1024, 2048, 16, 16, 128, ahead=None),
    Case("cross-attention, decode", 8, 1, 1500, 20, 20, 64, ahead=None, cached=True),
    Case("ragged prefill", 8, sum(RAGGED), sum(RAGGED), ragged=RAGGED),
    Case("ragged encoder", 8, sum(RAGGED), sum(RAGGED), 16, 16, 64, ahead=None, ragged=RAGGED),
)


def visible(case: Case, q_len: int, kv_len: int, device: str) -> torch.Tensor:
    """bool `[q_len, kv_len]`, aligned bottom-right."""
    place = torch.arange(q_len, device=device)[:, None] + kv_len - q_len
    key = torch.arange(kv_len, device=device)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if case.back is not None:
        seen &= key >= place - case.back
    if case.ahead is not None:
        seen &= key <= place + case.ahead
    return seen


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention of one head `[Lq, D]`; zeros where nothing is seen."""
    wide = torch.float64 if seen.numel() <= SMALL else torch.float32
    q, k, v = (x.to(wide) for x in (q, k, v))
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def error(case: Case, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> float:
    """The largest difference from the oracle, over the first and last head of the first and last row."""
    q, k, v = tensors
    group = case.heads // case.kv_heads
    worst = 0.0
    for head in {0, case.heads - 1}:
        if case.ragged:
            ends = torch.tensor(case.ragged).cumsum(0).tolist()
            rows = [(0, slice(end - n, end)) for end, n in zip(ends, case.ragged, strict=True)]
            pick = [(x[s, h] for x, h in ((q, head), (k, head // group), (v, head // group), (out, head)))
                    for _, s in rows]  # fmt: skip
        else:
            pick = [(x[b, h] for x, h in ((q, head), (k, head // group), (v, head // group), (out, head)))
                    for b in {0, case.batch - 1}]  # fmt: skip
        for parts in pick:
            one_q, one_k, one_v, one_out = parts
            if not len(one_q):
                continue
            expected = oracle(one_q, one_k, one_v, visible(case, len(one_q), len(one_k), str(q.device)))
            worst = max(worst, (one_out.to(expected.dtype) - expected).abs().max().item())
    return worst


def inputs(case: Case, device: str) -> list[torch.Tensor]:
    """q, k and v; of ragged cases `[tokens, heads, D]`. Keys of a cache lie head by head."""
    shapes = ((case.q_len, case.heads), (case.kv_len, case.kv_heads), (case.kv_len, case.kv_heads))
    tensors = []
    for i, (n, heads) in enumerate(shapes):
        options = {"dtype": torch.bfloat16, "device": device}
        if case.ragged:
            tensors.append(torch.randn(n, heads, case.head_dim, **options))
        elif case.cached and i:
            tensors.append(torch.randn(case.batch, heads, n, case.head_dim, **options))
        else:
            tensors.append(torch.randn(case.batch, n, heads, case.head_dim, **options).transpose(1, 2))
    return tensors


def ways(case: Case, tensors: list[torch.Tensor], without: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Name -> the call, for PyTorch's default and each backend that can run it; says why not others."""
    q, k, v = tensors
    device, scale, call = str(q.device), case.head_dim**-0.5, case.call()
    back, ahead = (-1 if side is None else side for side in (case.back, case.ahead))
    found: dict[str, Callable[[], Any]] = {}
    if case.ragged:
        lengths = torch.tensor([0, *case.ragged], device=device)
        starts, longest = lengths.cumsum(0).int(), max(case.ragged)
        args = (q, k, v, starts, starts, longest, longest, case.ahead == 0, scale)
        found["triton"] = lambda: OPS.varlen_attn(*args, "triton")
        dense = [torch.zeros(case.batch, h, longest, case.head_dim, dtype=q.dtype, device=device)
                 for h in (case.heads, case.kv_heads, case.kv_heads)]  # fmt: skip
        keys = torch.arange(longest, device=device) < lengths[1:, None]
        mask = keys[:, None, None] & visible(case, longest, longest, device)
        found["default"] = lambda: sdpa(*dense, attn_mask=mask, scale=scale, enable_gqa=True)
    elif call.mask == "none":
        found["default"] = lambda: sdpa(q, k, v, is_causal=call.is_causal, scale=scale, enable_gqa=True)
    else:
        mask = visible(case, case.q_len, case.kv_len, device)
        found["default"] = lambda: sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if not case.ragged:
        end = torch.arange(case.q_len, device=device) + case.kv_len - case.q_len
        first = torch.zeros_like(end) if case.back is None else (end - case.back).clamp(min=0)
        last = torch.full_like(end, case.kv_len) if case.ahead is None else end + 1 + case.ahead
        bounds = torch.stack((first, last), -1)[None].int()
        found["triton"] = lambda: OPS.attend(q, k, v, None, bounds, None, scale, "triton")
    for backend in BACKENDS:
        run = backend.varlen if case.ragged else backend.attend
        if run is None or backend.name in without:
            continue
        if reasons := backend.why_not(call) or backend.broken():
            print(f"    not {backend.name}: {'; '.join(reasons)}")
        elif case.ragged:
            found[backend.name] = lambda name=backend.name: OPS.varlen_attn(*args, name)
        else:
            how = (call.alignment, back, ahead, None, scale)
            found[backend.name] = lambda name=backend.name, how=how: OPS.dense_attn(
                q, k, v, None, None, None, *how, name
            )
    return found


def measure(case: Case, without: Sequence[str], device: str) -> dict[str, Any]:
    """Microseconds and largest error of each way; what `auto` takes."""
    print(case, flush=True)
    tensors = inputs(case, device)
    row: dict[str, Any] = {**asdict(case), "auto": "" if case.ragged else select(case.call()).backend}
    for name, way in ways(case, tensors, without).items():
        begin = time.perf_counter()
        try:
            out = way()
            wrong = None if name == "default" and case.ragged else round(error(case, tensors, out), 5)
            first = time.perf_counter() - begin
            row[name] = {**(replay_times([way]) if device == "cuda" else {}), "error": wrong}
        except Exception as failure:  # a backend that says it can and does not is a finding of its own
            row[name] = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
            first = time.perf_counter() - begin
            if device == "cuda":
                torch.cuda.synchronize()
        print(f"    {name:12} {row[name]} (first call {first:.2f} s)", flush=True)
    return row


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="backends")
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--cases", default="", help="only those with this in their name")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"cudnn": torch.backends.cudnn.version(), **installed(*PACKAGES)}
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.cases in case.name:
            rows.append(measure(case, args.without, device))
            what = "one attention call, bf16, CUDA graphs, microseconds"
            write_result(
                args.name,
                {"what": what, "environment": environment(args.commit) | versions, "cases": rows},
                args.out,
            )


if __name__ == "__main__":
    main()
