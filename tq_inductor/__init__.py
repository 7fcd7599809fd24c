"""A PyTorch 2 compiler backend that rewrites attention and keeps the KV cache in TurboQuant form."""

from __future__ import annotations

import sys as _sys
from importlib import import_module as _import_module
from importlib.machinery import PathFinder as _PathFinder
from importlib.util import module_from_spec as _module_from_spec
from pathlib import Path as _Path
from typing import Any as _Any

__version__ = "0.1.0"

_LAZY = {
    "TurboQuantCache": "cache",
    "PackedKVCache": "storage",
    "KVFormat": "format",
    "balance_keys": "balance",
    "explain": "compiler",
    "attention_backends": "attention.select",
}

# An installed package holds `kernels` and `lowering`; in a checkout they lie one folder higher, where
# they cannot be called top-level packages (transformers imports a distribution named `kernels`).
_checkout = _Path(__file__).resolve().parent.parent
if not (_checkout / "tq_inductor" / "kernels").is_dir() and (_checkout / "pyproject.toml").is_file():
    # Not by `__path__`: it would hold `tq_inductor.tq_inductor` too, and TORCH_LOGS walks all it holds.
    for _name in ("kernels", "lowering"):
        if _spec := _PathFinder.find_spec(f"{__name__}.{_name}", [str(_checkout)]):
            globals()[_name] = _sys.modules[_spec.name] = _module_from_spec(_spec)

# `torch.ops.tq_inductor` is there wherever torch came first, unless TORCH_LOGS imports this package before
# torch is whole; else the first of the names below brings it.
_torch = _sys.modules.get("torch")
if _torch is not None and not getattr(_torch.__spec__, "_initializing", False):
    _import_module(".ops", __name__)

__all__ = [
    *("KVFormat", "PackedKVCache", "TurboQuantCache", "attention_backends", "balance_keys", "explain"),
]


def __getattr__(name: str) -> _Any:
    # Imported on first use: `TORCH_LOGS=tq_inductor` imports this package inside `import torch`.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_module(".ops", __name__)
    return getattr(_import_module(f".{_LAZY[name]}", __name__), name)
