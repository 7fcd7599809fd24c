"""Python's own standard library as text: what the demo model learns from, and what it never saw.

Every Python installation carries this text, so the model can be trained, and its quality
measured, without a download. A dozen modules are held out: neither their source nor their tests
are part of the training text.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

HELD_OUT_MODULES: tuple[str, ...] = (
    "calendar",
    "configparser",
    "difflib",
    "fractions",
    "graphlib",
    "heapq",
    "sched",
    "shelve",
    "shlex",
    "statistics",
    "textwrap",
    "zipapp",
)
"""Top-level modules kept out of the training text, in alphabetical order."""

SEPARATOR = b"\0"
"""One zero byte between two files; it occurs in no source file."""

# Third-party code, tables (character maps, help texts as one literal, deliberately broken test
# inputs) and files that were generated for one machine: none of it reads like Python source.
_SKIPPED_PATHS = frozenset(
    {
        "dist-packages",
        "encodings",
        "html/entities.py",
        "lib-dynload",
        "lib2to3/tests/data",
        "pydoc_data",
        "site-packages",
        "test/data",
        "test/encoded_modules",
    }
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def stdlib_root(stdlib: Path | None = None) -> Path:
    """The folder to read: `stdlib`, or the standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib") if stdlib is None else stdlib)


def training_files(stdlib: Path | None = None) -> list[Path]:
    """The training text's source files, sorted by their path relative to the standard library.

    Raises FileNotFoundError if there are none.
    """
    root = stdlib_root(stdlib)
    kept = {
        relative.as_posix(): path
        for path in root.rglob("*.py")
        if _is_training_file(relative := path.relative_to(root))
    }
    if not kept:
        raise _nothing_found(root)
    return [kept[name] for name in sorted(kept)]


def training_text(stdlib: Path | None = None) -> bytes:
    """All training files, joined by `SEPARATOR`; the same bytes for the same installation.

    Raises FileNotFoundError if there are none.
    """
    return SEPARATOR.join(path.read_bytes() for path in training_files(stdlib))


def held_out_text(stdlib: Path | None = None) -> dict[str, bytes]:
    """The source of each held-out module that this Python has, by module name.

    Raises FileNotFoundError if it has none of them.
    """
    root = stdlib_root(stdlib)
    paths = {name: root / f"{name}.py" for name in HELD_OUT_MODULES}
    texts = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    if not texts:
        raise _nothing_found(root)
    return texts


def _is_training_file(relative: Path) -> bool:
    """Whether the file at `relative` to the standard library belongs to the training text."""
    parts = relative.parts
    prefixes = {"/".join(parts[: depth + 1]) for depth in range(len(parts))}
    if prefixes & _SKIPPED_PATHS or parts[0].startswith(_SKIPPED_PREFIXES):
        return False
    # A module's tests are test_<name>.py or a folder test_<name>; namesakes elsewhere go as well.
    names = {*parts[:-1], relative.stem}
    return not any(name.removeprefix("test_") in HELD_OUT_MODULES for name in names)


def _nothing_found(root: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"no Python sources of the standard library in {root}: this installation may hold only "
        "compiled modules. Pass the Lib folder of a CPython source tree or installation as "
        "`stdlib`, for example /usr/lib/python3.12."
    )
