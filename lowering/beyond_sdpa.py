"""Attention that SDPA has no arguments for, in SDPA's terms: sinks (gpt-oss) and softcap (gemma2).

    cap * tanh(scale * q @ k.T / cap) + mask, with the sinks as a last column -> softmax -> ...

The graph stays as it is until a backend that takes these replaces `SDPANode.node`; what leads up to it is
then dead.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .find_calls import SDPANode, value_of
from .head_axes import grouped_heads
from .left_alone import LeftAloneError
from .score_steps import Add, Scale, Squash
from .softmax_attention import SoftmaxAttention, read_attention, softmaxes
from .writes import Writes


def is_beyond_sdpa(found: SoftmaxAttention) -> bool:
    """Whether it has sinks or a softcap."""
    squashed = any(isinstance(step, Squash) for step in found.scores.steps)
    return found.scores.sinks is not None or squashed


def find_calls_beyond_sdpa(graph: fx.Graph) -> Iterator[SDPANode]:
    """The calls with sinks or a softcap of one graph, in order."""
    writes = Writes(graph)
    for softmax in softmaxes(graph):
        try:
            found = read_attention(softmax, writes)
            if is_beyond_sdpa(found):
                yield call_beyond_sdpa(found)
        except LeftAloneError:
            continue


def call_beyond_sdpa(found: SoftmaxAttention) -> SDPANode:
    """The call, its `attn_mask` the float one that is added to the scores.

    Raises:
        LeftAloneError: the scores are made in any other way than these models make them.
    """
    what = "attention sinks" if found.scores.sinks is not None else "softcap"
    scale, squashed, cap, mask = 1.0, False, 1.0, None
    for step in found.scores.steps:
        if isinstance(step, Scale) and mask is None:
            scale, cap = (scale, cap * step.factor) if squashed else (scale * step.factor, cap)
        elif isinstance(step, Squash) and not squashed and mask is None:
            squashed = True
        elif isinstance(step, Add) and mask is None and step.factor == 1:
            mask = step.bias
        else:
            raise LeftAloneError(f"{what}: the scores are more than scaled, capped and masked once")
    if cap <= 0:
        raise LeftAloneError(f"softcap={cap} (needs a positive number)")
    if scale <= 0:
        raise LeftAloneError(f"scale={scale * cap} (needs a positive number)")
    operands = (found.scores.query, found.scores.key, found.value)
    q, k, v = (operand.node for operand in operands)
    reordered = found.result_dims is not None or any(operand.dims is not None for operand in operands)
    if reordered or not value_of(q).dim() == value_of(k).dim() == value_of(v).dim() == 4:
        raise LeftAloneError(f"{what}: q, k and v are not [B, H, n, d]")
    if mask is not None and value_of(mask).dtype != value_of(q).dtype:
        raise LeftAloneError(f"{what}: a mask of {value_of(mask).dtype}")
    return SDPANode(
        found.product, q, k, v,
        attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale * cap,
        enable_gqa=grouped_heads(q, k, v), sinks=found.scores.sinks, softcap=cap if squashed else None,
    )  # fmt: skip
