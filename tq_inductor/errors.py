"""One class per user mistake; every message says what was given, what is allowed, what to do next."""

from __future__ import annotations

from torch._dynamo.exc import ShortenTraceback


class FormatError(ValueError):
    """A KV format name or head dimension that no codec here can store."""


class CacheFullError(RuntimeError):
    """More tokens than the cache has room for. Raised before anything is written."""


class CacheMismatchError(ValueError):
    """Keys or values that do not fit the cache they are appended to. Nothing is written."""


class UnsupportedModelError(ValueError):
    """A model whose KV cache cannot be kept by `TurboQuantCache`."""


class UsageError(ValueError):
    """A command line that asks for what cannot be done."""


class CompilerError(ShortenTraceback):
    """Raised while compiling.

    Dynamo wraps most exceptions of a compiler in `BackendCompilerFailed`; this base passes through
    unwrapped, so that a caller can write `except ValueError` for a misspelt option.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionError(CompilerError, ValueError):
    """An unknown key or value in `torch.compile(..., options={...})`."""


class NoAttentionBackendError(CompilerError):
    """A named attention backend cannot run a call, or `strict` found a call left unrewritten."""
