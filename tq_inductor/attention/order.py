"""The one table of preference: which attention backends `auto` tries, in which order.

The first row that fits a call's GPU, phase, mask and head size. `turboquant` stands first everywhere: it
refuses what is not read from a packed cache, as the others refuse packed bytes. What is not in a row is
used when it is asked for by name only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .call import AttentionCall

FULL, CAUSAL, BAND, DENSE = "full", "causal", "band", "dense"
PADDED, PADDED_CAUSAL = "padded", "padded causal"
LAST = (
    "sdpa",
    "triton",
    "fa4",
    "fa3",
    "fa2",
    "flex",
    "flashinfer",
)  # from the second on for sinks and softcap


@dataclass(frozen=True)
class Order:
    """One row; what it leaves empty fits everything.

    Attributes:
        majors: major compute capabilities.
        phase: "prefill" or "decode".
        masks: see `mask_kind`.
        widest_head: the largest head_dim.
        fewest_queries: the least q_len.
        most_keys: the most tokens of all rows of the batch together.
        widest_window: the most keys that a query sees.
        first: backends that come before PyTorch's choice, best first.
    """

    majors: tuple[int, ...] = ()
    phase: str = ""
    masks: tuple[str, ...] = ()
    widest_head: int | None = None
    fewest_queries: int = 0
    most_keys: int | None = None
    widest_window: int | None = None
    first: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All backends that are tried."""
        return tuple(dict.fromkeys(("turboquant", *self.first, *LAST)))

    def describe(self) -> str:
        """What it is for, in words."""
        limits = [f"{self.phase or 'anything'} {'/'.join(self.masks)}".rstrip()]
        limits += [f"head_dim<={self.widest_head}"] if self.widest_head else []
        limits += [f"q_len>={self.fewest_queries}"] if self.fewest_queries else []
        limits += [f"batch_size*kv_len<={self.most_keys}"] if self.most_keys else []
        limits += [f"window<={self.widest_window}"] if self.widest_window else []
        return ", ".join(limits)

    def fits(self, call: AttentionCall) -> bool:
        """Whether this row is for a call."""
        major = call.capability[0] if call.capability and call.device == "cuda" else None
        return (
            (not self.majors or major in self.majors)
            and self.phase in ("", call.phase)
            and (not self.masks or mask_kind(call) in self.masks)
            and (self.widest_head is None or (call.head_dim or 0) <= self.widest_head)
            and (call.q_len or 0) >= self.fewest_queries
            and (self.most_keys is None or keys_of(call) <= self.most_keys)
            and (self.widest_window is None or window_of(call) <= self.widest_window)
        )


# SM90: measured on an H200, benchmarks/results/backends.json. FlashAttention 3 and 4 lead where scores are
# hidden, cuDNN (PyTorch's own choice there) where few are; FlashAttention 4 is slow for short queries, and
# does not split keys. Our kernels are ahead of torch's FlashAttention 2, of FlashAttention 4 in narrow
# windows (their tiles are smaller), and of cuDNN for one query and few keys.
# FlexAttention and FlashInfer's kernels are compiled for seconds to minutes at their first call: the former
# comes when nothing else can; the latter, never the best, after it, and only if that is done already.
# Padding (padding.json): ours, but for encoders with larger heads, where FlashAttention 3 over ragged
# sequences wins although tokens are counted, gathered and scattered.
# Other GPUs: not measured. What is native there by its documentation, PyTorch's choice where it has a flag.
ORDERS = (
    Order((9,), "decode", (FULL,), widest_head=128, most_keys=8192, first=("triton", "cudnn")),
    Order((9,), "decode", (FULL,), widest_head=128, first=("cudnn",)),
    Order((9,), "decode", (FULL,), first=("fa3", "triton")),
    Order((9,), "decode", (BAND,), first=("fa3", "triton", "torch_flash")),
    Order((9,), "prefill", (FULL,), widest_head=64),
    Order((9,), "prefill", (FULL,), first=("fa3",)),
    Order((9,), "prefill", (CAUSAL,), widest_head=128, fewest_queries=1024, first=("fa3", "fa4")),
    Order((9,), "prefill", (CAUSAL,), fewest_queries=1024, first=("fa4", "fa3")),
    Order((9,), "prefill", (CAUSAL,), first=("fa3",)),
    Order((9,), "prefill", (BAND,), widest_head=64, widest_window=256, first=("triton",)),
    Order((9,), "prefill", (BAND,), first=("fa3", "fa4", "triton", "torch_flash")),
    Order((9,), "prefill", (PADDED,), widest_head=64, first=("triton",)),
    Order((9,), "prefill", (PADDED,), first=("fa3", "triton")),
    Order((9,), "prefill", (PADDED_CAUSAL,), first=("triton",)),
    Order((10, 11), "prefill", (BAND,), first=("fa4", "torch_flash", "triton")),
    Order((8, 12), "prefill", (BAND,), first=("fa2", "torch_flash", "triton")),
    Order((), "decode", (FULL,)),
    Order(first=("triton",)),
)


def mask_kind(call: AttentionCall) -> str:
    """ "full"; "causal" with as many queries as keys, for which SDPA has a flag; "band": else what an
    alignment and a window say; "padded" or "padded causal": full or causal, and a mask over keys; "dense":
    more than that."""
    if call.padding:
        return PADDED if call.padding == "full" else PADDED_CAUSAL
    if not call.plain:
        return DENSE
    if call.window == (None, None):
        return FULL
    return CAUSAL if call.alignment == "equal" and call.window == (None, 0) else BAND


def keys_of(call: AttentionCall) -> float:
    """The tokens of all rows of the batch; infinity if they are not known."""
    if call.batch_size is None or call.kv_len is None:
        return math.inf
    return call.batch_size * call.kv_len


def window_of(call: AttentionCall) -> float:
    """The most keys that a query sees by a window; infinity without one."""
    back, ahead = call.window
    return math.inf if back is None or ahead is None else back + ahead + 1


def orders_of(capability: tuple[int, int] | None) -> list[Order]:
    """The rows for a GPU, or for none."""
    return [order for order in ORDERS if not order.majors or (capability and capability[0] in order.majors)]


def order_for(call: AttentionCall) -> tuple[str, ...]:
    """The names of the first row that fits."""
    return next(order.names for order in ORDERS if order.fits(call))
