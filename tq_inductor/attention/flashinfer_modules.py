"""FlashInfer's modules: one per kernel, dtype, head size, window and softcap, compiled when first needed.

That takes minutes, so `auto` takes only what is built, and who asks for FlashInfer by name is told before.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger("tq_inductor.attention")

CORE_MINUTES = {"fa2": 5, "fa3": 20}  # that one core compiles a module of batches


@dataclass(frozen=True)
class Module:
    """A module, by what it is compiled for.

    Attributes:
        dtype, kv_dtype: of q and the result, of k and v.
        batch: for sequences that are planned, not for a single one.
    """

    kernel: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    window: bool
    softcap: bool
    batch: bool

    @property
    def name(self) -> str:
        """FlashInfer's name of it, also that of its file."""
        from flashinfer import jit

        dtypes, sizes = (self.dtype, self.kv_dtype, self.dtype), (self.head_dim, self.v_head_dim)
        flags = (0, self.window, self.softcap, False)  # no encoding of positions, scores in float32
        if self.batch:
            return jit.get_batch_prefill_uri(self.kernel, *dtypes, torch.int32, *sizes, *flags)  # type: ignore[no-any-return]
        return jit.get_single_prefill_uri(self.kernel, *dtypes, *sizes, *flags)  # type: ignore[no-any-return]

    def is_built(self) -> bool:
        """Whether a library of this name comes with the package or lies in its cache."""
        return any((folder / self.name / f"{self.name}.so").is_file() for folder in folders())

    def cost(self) -> str:
        """How long it is compiled, in words."""
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        minutes = math.ceil(CORE_MINUTES[self.kernel] / jobs)
        return f"about {minutes} min with {jobs} processes"


def folders() -> tuple[Path, Path]:
    """Where modules lie that came with the package, and those compiled here."""
    from flashinfer.jit import env

    return env.FLASHINFER_AOT_DIR, env.FLASHINFER_JIT_DIR


def built() -> list[str]:
    """The names of all attention modules that are built."""
    return sorted({path.stem for folder in folders() for path in folder.glob("*prefill*/*prefill*.so")})


@functools.cache
def announce(module: Module) -> None:
    """Say, once, that a call has to wait until a module is compiled."""
    if not module.is_built():
        log.warning("flashinfer: compiling %s (%s), kept in %s", module.name, module.cost(), folders()[1])
