"""Compile every kernel for seven targets, or some, without a GPU: `kernel_compile.py [90 ...]`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from kernel_cases import BF16, FP16, FP32, Case
from kernel_inputs import block_table, empty_beside, garbage_cache, lengths, rotations
from tq_inductor.kernels import attend_wgmma, prefill_pieces
from tq_inductor.kernels.append import append_and_attend
from tq_inductor.kernels.attend_wgmma import wgmma_attend_kernel
from tq_inductor.kernels.bits import unpack_asm
from tq_inductor.kernels.decode import attend, decode
from tq_inductor.kernels.decode_query import rotate_queries, store_and_rotate
from tq_inductor.kernels.decode_warp import attend_by_warps
from tq_inductor.kernels.dequantize import dequantize
from tq_inductor.kernels.exact import exact_work
from tq_inductor.kernels.pack_mask import pack_mask
from tq_inductor.kernels.prefill_pieces import piece_kernel, tile_of
from tq_inductor.kernels.prefill_wgmma import wgmma_piece_kernel
from tq_inductor.kernels.store import store, store_arguments
from tq_inductor.kernels.store_prompt import store_prompt
from tq_inductor.kernels.varlen import varlen_attention
from triton.tools.tensor_descriptor import TensorDescriptor

# Target -> bytes of shared memory that a block may have.
TARGETS = {
    ("cuda", 80): 99 << 10,  # it has 163; but 86, 89 and 120 need as much for the same kernel
    ("cuda", 86): 99 << 10,
    ("cuda", 89): 99 << 10,
    ("cuda", 90): 227 << 10,
    ("cuda", 100): 227 << 10,
    ("cuda", 120): 99 << 10,
    ("hip", "gfx942"): 64 << 10,
}
# What Triton makes for these (TTGIR; in 3.6 PTX too) is what it makes for 80, 90 or 100, except for early
# launches, a few conversions and tensor cores: one variant of each kernel will do, the last.
ALIKE = {("cuda", 86), ("cuda", 89), ("cuda", 120)}


def record_launches() -> list[tuple]:
    """Run every launcher on CPU tensors without launching; (kernel, arguments, options) of each."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple] = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    original, JITFunction.run = JITFunction.run, note
    try:
        for name, page in (("k4v4", 0), ("bf16", 0), ("k4v4", 48), ("bf16", 16)):
            exact = (0, 0) if name == "bf16" else (4, 32)
            case = Case(name, 128, heads=8, lens=(4096, 1), max_len=4096, exact=exact, page=page)
            table, lse = block_table(case, "cpu"), torch.empty(2, 8, 1)
            fmt, cache, lens = case.format, garbage_cache(case, "cpu"), lengths(case, "cpu")
            beside = empty_beside(case)
            k = torch.zeros(2, 2, 16, 128, dtype=BF16)
            store(cache, k, k, lens, *rotations(case, "cpu"), fmt, beside, table)
            dequantize(cache, lens, *rotations(case, "cpu"), fmt, 4096, BF16, beside, table)
            q = torch.zeros(2, 8, 1, 128, dtype=BF16)
            mask = torch.ones(2, 1, 1, 4096, dtype=torch.bool)
            ways = ((None, None), (None, 50.0), (mask, None))
            for attn_mask, cap in ways if name == "k4v4" and not page else ways[:1]:
                last = (attn_mask, None, None, fmt, 4096, 0.1, beside, cap, table, lse)
                decode(q, cache, lens, *rotations(case, "cpu"), *last)
        for name, dim, v_dim in (("k4v3", 80, 64), ("k2v8", 128, 64)):
            case = Case(name, dim, v_dim, lens=(64, 3), max_len=300, exact=(4, 8))
            new = (torch.zeros(2, 2, 3, d, dtype=BF16) for d in (dim, v_dim))
            turns, fmt, lens = rotations(case, "cpu"), case.format, lengths(case, "cpu")
            store(garbage_cache(case, "cpu"), *new, lens, *turns, fmt, empty_beside(case))
        for name, dim, q_len, cap, page, exact in (
            ("k4v4", 128, 1, None, 0, (4, 32)),
            ("k4v4", 256, 1, 50.0, 0, (4, 32)),
            ("k8v2", 128, 3, None, 64, (0, 0)),
            ("k2v8", 64, 1, None, 192, (0, 130)),
            ("k3v3", 128, 1, None, 0, (4, 12)),
        ):
            case = Case(name, dim, heads=8, lens=(4096, 1), max_len=4096, exact=exact, page=page)
            cache, lens = garbage_cache(case, "cpu"), lengths(case, "cpu")
            q_rows, new = (torch.zeros(2, heads, q_len, dim, dtype=BF16) for heads in (8, 2))
            rotation, fmt, beside = rotations(case, "cpu")[0], case.format, empty_beside(case)
            table = block_table(case, "cpu")
            bounds, last = torch.zeros(2, q_len, 4, dtype=torch.int32), (fmt, 0.1, beside)
            for visible in ((None, None), (mask, bounds)) if name == "k4v4" else ((None, None),):
                work = exact_work(q_rows, 2, dim, 0.1, beside, (new, new))
                rows = rotate_queries(q_rows, rotation, 2, 0.1)
                turns = (rotation, rotation)
                store_and_rotate(cache, q_rows, new, new, lens, *turns, *last, table)
                rest = (None, fmt, 4096, *last[1:], cap, table)
                attend_by_warps(q_rows, q_rows, rows, work, cache, lens, rotation, *visible, *rest)
        for name, dim, v_dim in (("k4v4", 128, 128), ("k4v3", 64, 128), ("k8v8", 128, 64)):
            case = Case(name, dim, v_dim, lens=(4096, 64), max_len=4096, exact=(4, 32))
            new_k, new_v = (torch.zeros(2, 2, 64, d, dtype=BF16) for d in (dim, v_dim))
            cache, lens, fmt = garbage_cache(case, "cpu"), lengths(case, "cpu"), case.format
            arguments = (cache, new_k, new_v, lens, *rotations(case, "cpu"), fmt, empty_beside(case), None)
            store_prompt(*store_arguments(*arguments), new_k, fmt)
        bounds = torch.zeros(2, 129, 4, dtype=torch.int32)
        for name, dim, visible, cap, page, q_len in (
            ("k4v4", 128, (None, None), None, 0, 129),
            ("k4v4", 128, (mask, bounds), None, 0, 129),
            ("k4v4", 128, (mask, bounds), 50.0, 0, 129),
            ("k3v8", 256, (None, None), None, 0, 129),
            ("k4v4", 128, (None, None), None, 0, 33),
            ("k4v4", 128, (mask, bounds[:, :33]), 50.0, 0, 33),
            ("k3v8", 256, (None, None), None, 0, 33),
            ("k4v4", 128, (None, None), None, 64, 129),
        ):
            case = Case(name, dim, heads=8, lens=(4096, 1), max_len=4096, exact=(4, 32), page=page)
            cache, lens, turns = garbage_cache(case, "cpu"), lengths(case, "cpu"), rotations(case, "cpu")
            q_rows, new = (torch.zeros(2, heads, q_len, dim, dtype=BF16) for heads in (8, 2))
            last = (case.format, 4096, 0.1, empty_beside(case), cap, block_table(case, "cpu"), True)
            for wgmma in (False, True):
                with mock.patch.object(prefill_pieces, "has_wgmma", return_value=wgmma):
                    append_and_attend(cache, q_rows, new, new, lens, *turns, *visible, None, *last)
        bounds = torch.zeros(2, 1, 4, dtype=torch.int32)
        attend(q, *torch.zeros(2, 2, 2, 4096, 128, dtype=BF16), mask, bounds, None, 0.1)
        attend(*torch.zeros(3, 2, 8, 256, 256, dtype=BF16), None, None, None, 0.1)
        words = pack_mask(torch.ones(2, 1, 129, 4097, dtype=torch.bool))
        rows = torch.zeros(2, 129, 4, dtype=torch.int32)
        for dim, attn_mask, seen in (
            *((128, None, rows[..., :2]), (128, mask, rows), (64, mask, None)),
            *((128, words, rows), (64, words, None)),
        ):
            length = 4096 if attn_mask is mask else 4097
            q_rows, keys = (torch.zeros(2, n, size, dim, dtype=BF16) for n, size in ((8, 129), (2, length)))
            values = torch.zeros(2, 2, length, 128, dtype=BF16)
            for wgmma in (False, True):
                with mock.patch.object(attend_wgmma, "takes", return_value=wgmma):
                    attend(q_rows, keys, values, attn_mask, seen, None, 0.1)
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
    if "COPIES" in kwargs and target[0] == "hip":
        options["num_stages"] = 2
    if kernel is piece_kernel:
        dim, roomy = max(kwargs["K_DIM"], kwargs["V_DIM"]), TARGETS[target] > 99 << 10
        block_m, block_n = tile_of(dim, roomy, kwargs["MASK"] != 0)
        kwargs = kwargs | {"BLOCK_M": block_m, "BLOCK_N": block_n}
    if "K_ASM" in kwargs and not kernel.is_gluon():
        native = target[0] == "cuda" and target[1] >= 89
        asm = {f"{side}_ASM": unpack_asm(kwargs[f"{side}_BITS"]) if native else "" for side in "KV"}
        asm["V_ASM"] = "" if kwargs["V_BITS"] == 8 else asm["V_ASM"]
        kwargs = kwargs | asm
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name not in options}
    signature, constants, attributes = {}, {}, {}
    for index, (name, param) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if isinstance(value, TensorDescriptor):
            shape = [kwargs["BLOCK_N"], *value.block_shape[1:]]
            signature[name] = f"tensordesc<{types[value.base.dtype]}{shape}>"
        elif hasattr(value, "block_shape"):  # Gluon's
            signature[name] = f"tensordesc<{types[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
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


def main(names_of_targets: list[str]) -> int:
    """Compile every kernel for these targets ("90", "gfx942"), or all; a line each; 1 if one failed."""
    targets = {str(target[1]): target for target in TARGETS}
    chosen = [targets[name] for name in names_of_targets or targets]
    launches = {}
    for kernel, args, kwargs in record_launches():
        names = ("K_BITS", "V_BITS", "MASK", "ROTATION", "HAS_OWN", "PIECES", "TOKENS")
        names += ("SOFTCAP", "HAS_MEAN", "PAGE", "HAS_WHOLE")
        names += ("K_DIM",) if kwargs.keys() & {"COPIES", "HAS_OWN", "HAS_WHOLE"} else ()
        variant = [str(kwargs[name]) for name in names if kwargs.get(name) is not None]
        launches[" ".join([kernel.fn.__name__, *variant])] = (kernel, args, kwargs)
    failures = 0
    for target in chosen:
        limit = TARGETS[target]
        last = {launch[0].fn.__name__: name for name, launch in launches.items()}
        for name in last.values() if target in ALIKE else launches:
            launch = launches[name]
            if launch[0] in (wgmma_piece_kernel, wgmma_attend_kernel) and target != ("cuda", 90):
                continue
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
    sys.exit(main(sys.argv[1:]))
