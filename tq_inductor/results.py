"""Where the results of attention lie: token by token, all heads of one together.

Models merge the heads next, `out.transpose(1, 2).contiguous()`, which copies nothing then.
"""

from __future__ import annotations

import torch


def empty_result(q: torch.Tensor, v_head_dim: int) -> torch.Tensor:
    """`[B, H, q, Dv]` like q `[B, H, q, D]`, not filled."""
    batch, heads, q_len, _ = q.shape
    return q.new_empty((batch, q_len, heads, v_head_dim)).transpose(1, 2)


def as_result(out: torch.Tensor) -> torch.Tensor:
    """`out` `[B, H, q, Dv]` where results lie."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
