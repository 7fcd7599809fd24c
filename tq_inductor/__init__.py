"""A PyTorch 2 compiler backend that rewrites attention and keeps the KV cache in TurboQuant form."""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

__version__ = "0.1.0"

_LAZY = {
    "TurboQuantCache": "cache",
    "PackedKVCache": "storage",
    "KVFormat": "format",
    "explain": "compiler",
    "attention_backends": "attention.select",
}

# An installed package holds `kernels` and `lowering`; in a checkout they lie one folder higher, where
# they cannot be called top-level packages (transformers imports a distribution named `kernels`).
_checkout = _Path(__file__).resolve().parent.parent
if not (_checkout / "tq_inductor" / "kernels").is_dir() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

__all__ = ["KVFormat", "PackedKVCache", "TurboQuantCache", "attention_backends", "explain"]


def __getattr__(name: str) -> _Any:
    # Imported on first use: `TORCH_LOGS=tq_inductor` imports this package inside `import torch`.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_LAZY[name]}", __name__), name)
