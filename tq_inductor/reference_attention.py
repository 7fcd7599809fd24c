"""What the ops `dense_attn` and `varlen_attn` compute, in plain torch; it runs on a CPU."""

from __future__ import annotations

import torch

from .attention.arguments import DenseArguments
from .attention.call import Window
from .reference import attention
from .reference_masks import visible_keys


def visible_window(q_len: int, kv_len: int, alignment: str, window: Window) -> torch.Tensor:
    """Which keys each query sees, bool `[q_len, kv_len]`: see `AttentionCall`."""
    back, ahead = window
    place = torch.arange(q_len)[:, None] + (kv_len - q_len if alignment == "bottom-right" else 0)
    keys = torch.arange(kv_len)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool)
    if back is not None:
        visible = visible & (keys >= place - back)
    return visible if ahead is None else visible & (keys <= place + ahead)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def dense_attention(x: DenseArguments) -> torch.Tensor:
    """What every attention backend computes for the op `dense_attn`: `[B, Lq, H, Dv]`."""
    q_len, kv_len = x.q.shape[2], x.k.shape[2]
    visible, bias = visible_keys(x.attn_mask, None, kv_len)
    visible = visible & visible_window(q_len, kv_len, x.alignment, x.window)
    if x.alibi_slopes is not None:
        keys = torch.arange(kv_len, dtype=torch.float32)  # the same for all keys of a query: left out
        bias = x.alibi_slopes.float().view(1, -1, 1, 1) * keys
    q, k, v = (y.float() for y in (x.q, x.k, x.v))
    out = attention(q, k, v, visible, x.scale, bias, x.sinks, x.softcap)
    return out.to(x.q.dtype).transpose(1, 2)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """Ragged attention: q `[Tq, H, D]`, k `[Tk, Hkv, D]`, v `[Tk, Hkv, Dv]` -> `[Tq, H, Dv]`."""
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        q_len, k_len = rows.stop - rows.start, keys.stop - keys.start
        if not q_len or not k_len:
            continue
        seen = torch.arange(q_len)[:, None] + k_len - q_len if is_causal else torch.tensor(k_len)
        visible = torch.arange(k_len) <= seen
        new_q, new_k, new_v = (
            x.transpose(0, 1)[None].to(torch.float32) for x in (q[rows], k[keys], v[keys])
        )
        out[rows] = attention(new_q, new_k, new_v, visible, scale)[0].transpose(0, 1).to(q.dtype)
    return out
