"""Text in which something must be looked up: strings of random tokens that come again later.

Most of what predicts ordinary text is near, so it says little about the layers that find what was read long
ago (induction heads, arXiv 2209.11895). A repeated random string can be predicted in no other way.
"""

from __future__ import annotations

import torch

CUE, STRING = 4, 16  # tokens that a repetition begins with, and those to look up
STRINGS = 8  # in a window
LEAST = 6  # windows hold at least so many times what a string takes
LEAST_FOUND = 0.25  # of the tokens to look up: models that find fewer do not look up


def with_look_ups(window: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A window with strings drawn from its tokens: each somewhere in it, and all of them again at its end.

    Args:
        window: token ids `[1, n]`.
        generator: of the CPU.

    Returns:
        Token ids `[1, n]`, and bool `[n]`: where the next token is one to look up. None are in a window
        that is too short for a string.
    """
    n, size = window.shape[1], CUE + STRING
    count = min(STRINGS, n // (LEAST * size))
    ids, asked = window.clone(), torch.zeros(n, dtype=torch.bool, device=window.device)
    end = n - count * size
    for i in range(count):
        drawn = torch.randint(n, (size,), generator=generator).to(window.device)
        # Not at the beginning, where a tokenizer may have put a token that everything attends to.
        first, again = (2 * i + 1) * end // (2 * count), end + i * size
        ids[0, first : first + size] = ids[0, again : again + size] = window[0, drawn]
        asked[again + CUE - 1 : again + size - 1] = True
    return ids, asked


def found(exact: torch.Tensor, ids: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Of the places `asked` `[n]`, those where logits `[1, n, vocabulary]` have the next token first."""
    right = torch.zeros_like(asked)
    right[:-1] = exact[0, :-1].argmax(-1) == ids[0, 1:]
    return asked & right
