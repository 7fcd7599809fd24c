"""Compile every kernel for seven targets, without a GPU: `python tests/kernel_compile.py`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from kernel_cases import BF16, FP16, FP32, Case
from kernel_checks import empty_beside, garbage_cache, lengths, rotations
from tq_inductor.kernels.decode import attend, decode
from tq_inductor.kernels.decode_query import store_and_rotate
from tq_inductor.kernels.decode_warp import attend_by_warps
from tq_inductor.kernels.dequantize import dequantize
from tq_inductor.kernels.store import store, store_arguments
from tq_inductor.kernels.store_prompt import store_prompt
from tq_inductor.kernels.varlen import varlen_attention

# Target -> bytes of shared memory that a block may have.
TARGETS = {
    ("cuda", 80): 163 << 10,
    ("cuda", 86): 99 << 10,
    ("cuda", 89): 99 << 10,
    ("cuda", 90): 227 << 10,
    ("cuda", 100): 227 << 10,
    ("cuda", 120): 99 << 10,
    ("hip", "gfx942"): 64 << 10,
}


def record_launches() -> list[tuple]:
    """Run every launcher on CPU tensors without launching; (kernel, arguments, options) of each."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple] = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    original, JITFunction.run = JITFunction.run, note
    try:
        for name in ("k4v4", "bf16"):
            exact = (0, 0) if name == "bf16" else (4, 32)
            case = Case(name, 128, heads=8, lens=(4096, 1), max_len=4096, exact=exact)
            fmt, cache, lens = case.format, garbage_cache(case, "cpu"), lengths(case, "cpu")
            beside = empty_beside(case)
            k = torch.zeros(2, 2, 16, 128, dtype=BF16)
            store(cache, k, k, lens, *rotations(case, "cpu"), fmt, beside)
            dequantize(cache, lens, *rotations(case, "cpu"), fmt, 4096, BF16, beside)
            q = torch.zeros(2, 8, 1, 128, dtype=BF16)
            mask = torch.ones(2, 1, 1, 4096, dtype=torch.bool)
            for attn_mask in (None, mask)[: 2 if name == "k4v4" else 1]:
                visible = (attn_mask, None, None)
                decode(q, cache, lens, *rotations(case, "cpu"), *visible, fmt, 4096, 0.1, beside)
        for name, dim, q_len in (("k4v4", 128, 1), ("k8v2", 128, 3), ("k2v8", 64, 1), ("k3v3", 128, 1)):
            case = Case(name, dim, heads=8, lens=(4096, 1), max_len=4096, exact=(4, 32))
            cache, lens = garbage_cache(case, "cpu"), lengths(case, "cpu")
            q_rows, new = (torch.zeros(2, heads, q_len, dim, dtype=BF16) for heads in (8, 2))
            rotation, fmt, beside = rotations(case, "cpu")[0], case.format, empty_beside(case)
            rows = store_and_rotate(cache, q_rows, new, new, lens, rotation, rotation, fmt, 0.1, beside)
            bounds = torch.zeros(2, q_len, 4, dtype=torch.int32)
            for visible in ((None, None), (mask, bounds)):
                attend_by_warps(
                    q_rows, q_rows, rows, cache, lens, rotation, *visible, None, fmt, 4096, 0.1, beside
                )
        for name, dim, v_dim in (("k4v4", 128, 128), ("k4v2", 64, 128)):
            case = Case(name, dim, v_dim, lens=(4096, 64), max_len=4096, exact=(4, 32))
            new_k, new_v = (torch.zeros(2, 2, 64, d, dtype=BF16) for d in (dim, v_dim))
            cache, lens, fmt = garbage_cache(case, "cpu"), lengths(case, "cpu"), case.format
            arguments = (cache, new_k, new_v, lens, *rotations(case, "cpu"), fmt, empty_beside(case))
            store_prompt(*store_arguments(*arguments), new_k, fmt)
        bounds = torch.zeros(2, 1, 4, dtype=torch.int32)
        attend(q, *torch.zeros(2, 2, 2, 4096, 128, dtype=BF16), mask, bounds, None, 0.1)
        x, starts = torch.zeros(64, 8, 128, dtype=BF16), torch.tensor([0, 64], dtype=torch.int32)
        varlen_attention(x, x[:, :2], x[:, :2], starts, starts, 64, 64, True, 0.1)
    finally:
        JITFunction.run = original
    return launches


def compile_launch(kernel, args: tuple, kwargs: dict, target: tuple) -> int:
    """Compile one recorded launch, specialised as a launch would be; its shared memory in bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    types = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.uint8: "u8"}
    types |= {torch.int32: "i32", torch.int64: "i64"}
    names = ("num_warps", "num_stages", "maxnreg")
    options = {name: kwargs[name] for name in names if name in kwargs}
    if "PDL" in kwargs:  # without a GPU to ask, launchers leave it out
        kwargs = kwargs | {"PDL": target[0] == "cuda" and target[1] >= 90}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name not in options}
    signature, constants, attributes = {}, {}, {}
    for index, (name, param) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + types[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif param.is_constexpr or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    make_source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make_source(kernel, signature, constants, attributes)
    warp = 64 if target[0] == "hip" else 32
    return triton.compile(source, target=GPUTarget(*target, warp), options=options).metadata.shared


def main() -> int:
    """Compile every kernel for every target, a line each; 1 if one failed."""
    launches = {}
    for kernel, args, kwargs in record_launches():
        variant = [str(kwargs[name]) for name in ("K_BITS", "V_BITS", "MASK", "ROTATION") if name in kwargs]
        launches[" ".join([kernel.fn.__name__, *variant])] = (kernel, args, kwargs)
    failures = 0
    for target, limit in TARGETS.items():
        for name, launch in launches.items():
            if launch[0].is_gluon() and not (target[0] == "cuda" and target[1] >= 89):
                continue  # has no conversion of fp8
            started = time.perf_counter()
            try:
                shared = compile_launch(*launch, target)
                result = "ok" if shared <= limit else f"FAILED: more than {limit} bytes"
                result = f"{shared} bytes of shared memory {result}"
            except Exception as error:
                result = f"FAILED: {type(error).__name__}: {error}"
            failures += "FAILED" in result
            print(
                f"{target[1]:>7} {name:30} {time.perf_counter() - started:5.1f} s {result}",
                flush=True,
            )
    return min(1, failures)


if __name__ == "__main__":
    sys.exit(main())
