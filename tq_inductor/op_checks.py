"""What the ops refuse, before they change anything."""

from __future__ import annotations


def check_softcap(softcap: float | None) -> None:
    """A softcap is a positive number, or None.

    Raises:
        ValueError: it is not.
    """
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap}: needs a positive number, or None for none")
