"""FlashInfer's plans: which processor reads which keys, laid out on the host for given lengths.

Ragged lengths lie on the device, so a plan waits for it. It is made again only if lengths have changed:
    outside of CUDA graphs   one `Plan` per kind of layer, so the layers of a model wait once a step
    in CUDA graphs           one per kind and sizes, whose buffers the graph reads, planned before

Where lengths change without a word, in a graph that is replayed or behind PyTorch's version counters, the
device finds that they are not those of the plan, and stops with an error.

The tokens after the last sequence are one more sequence, without keys.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .arguments import VarlenArguments
from .flashinfer_modules import Module, announce

WORKSPACE_BYTES = 384 << 20  # in CUDA graphs keys are always split: 1000 decoding rows, 32 heads of 128
PLAN = "tq_inductor.attention.flashinfer.plan"
NOT_PLANNED = (
    "flashinfer: a CUDA graph is captured, where lengths cannot be read, and nothing is planned: call "
    f"{PLAN}() with the arguments of varlen_attn before the capture, and before a replay with other lengths"
)
STALE = (  # at most 255 characters
    f"flashinfer: cu_seqlens are not those of the plan. In a CUDA graph, call {PLAN}() before a replay "
    "with other lengths; else a kernel wrote to them unseen, pass a copy"
)


@dataclass(frozen=True)
class Kind:
    """All that is planned for beside lengths; `page_size` None: keys are one behind the other."""

    kernel: str
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    scale: float
    causal: bool
    window_back: int | None = None
    softcap: float | None = None
    page_size: int | None = None

    @property
    def module(self) -> Module:
        """What has to be compiled."""
        window, softcap = self.window_back is not None, bool(self.softcap)
        sizes = (self.head_dim, self.v_head_dim)
        return Module(self.kernel, self.dtype, self.kv_dtype, *sizes, window, softcap, batch=True)

    def wrapper(self, **buffers: Any) -> Any:
        """FlashInfer's object for it, not planned yet."""
        import flashinfer

        announce(self.module)
        name = f"BatchPrefillWith{'Ragged' if self.page_size is None else 'Paged'}KVCacheWrapper"
        return getattr(flashinfer, name)(
            float_workspace_buffer=workspace(self.device), kv_layout="NHD", backend=self.kernel, **buffers
        )

    def plan(
        self, wrapper: Any, starts_q: torch.Tensor, starts_k: torch.Tensor, indices: torch.Tensor | None
    ) -> None:
        """Plan for lengths, where sequences start and the last ends, int32 `[sequences + 1]` on the host.

        Args:
            indices: the pages of all sequences, one behind the other, on the device; their number counts.
        """
        flags = {
            "num_qo_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim_qk": self.head_dim,
            "head_dim_vo": self.v_head_dim, "causal": self.causal, "sm_scale": self.scale,
            "window_left": -1 if self.window_back is None else self.window_back,
            "logits_soft_cap": self.softcap or 0.0, "pos_encoding_mode": "NONE",
            "q_data_type": self.dtype, "kv_data_type": self.kv_dtype,
        }  # fmt: skip
        if self.page_size is None:
            wrapper.plan(qo_indptr=starts_q, kv_indptr=starts_k, **flags)
            return
        pages = self.pages(starts_k)
        wrapper.plan(
            qo_indptr=starts_q, paged_kv_indptr=_starts(pages), paged_kv_indices=indices,
            paged_kv_last_page_len=starts_k.diff() - (pages - 1).clamp(min=0) * self.page_size,
            page_size=self.page_size, **flags,
        )  # fmt: skip

    def pages(self, starts: torch.Tensor) -> torch.Tensor:
        """How many pages each sequence has, int32 `[sequences]`."""
        size = self.page_size or 1
        return (starts.diff() + size - 1) // size


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """Where partial results lie; shared by all calls, which follow one another."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@functools.cache
def planned_rows(kind: Kind, batch: int, q_len: int, kv_len: int) -> Any:
    """FlashInfer's `run` for rows of equal lengths, planned once and never again; a page is a whole row."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("flashinfer: run this call once before a CUDA graph of it is captured")
    wrapper = kind.wrapper()
    starts = torch.arange(batch + 1, dtype=torch.int32)
    kind.plan(wrapper, starts * q_len, starts * kv_len, starts[:-1].to(kind.device))
    return wrapper.run


class Plan:
    """FlashInfer's wrapper for ragged calls of one kind, planned for the lengths that it saw last."""

    def __init__(self, kind: Kind, for_graph: bool) -> None:
        self._kind = kind
        self._for_graph = for_graph
        self._wrapper: Any = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._tensors: tuple[tuple[weakref.ref[torch.Tensor], int], ...] = ()
        self._lengths: torch.Tensor | None = None  # cu_seqlens_q and cu_seqlens_k on the host
        self._sizes: tuple[int, ...] = ()
        self._blind = False
        self._has_run = False

    @property
    def ready(self) -> bool:
        """Whether it is planned for any lengths."""
        return self._lengths is not None

    def update(self, x: VarlenArguments, read: bool = False) -> None:
        """Plan again if lengths are others; they are copied to the host if `read` or their tensors changed.

        Raises:
            ValueError: lengths that tensors of these sizes cannot have.
        """
        tensors, sizes = (x.cu_seqlens_q, x.cu_seqlens_k), sizes_of(x)
        if not read and sizes == self._sizes and self._saw(tensors):
            return
        lengths = torch.cat(tensors).cpu()  # waits for the device, and so for the copies of the last plan
        if self._lengths is None or sizes != self._sizes or not torch.equal(lengths, self._lengths):
            starts_q, starts_k = lengths.split([len(tensor) for tensor in tensors])
            _check(starts_q, starts_k, x)
            self._lengths = None
            with torch.inference_mode(False):  # or buffers could not be changed outside of it
                self._plan(starts_q, starts_k, x)
            self._lengths, self._sizes = lengths, sizes
        # In inference mode nobody counts versions.
        counted = not any(tensor.is_inference() for tensor in tensors)
        self._tensors = tuple((weakref.ref(t), t._version) for t in tensors) if counted else ()

    def run(self, x: VarlenArguments) -> torch.Tensor:
        """Attention `[Tq, H, Dv]`."""
        now = torch.cat((x.cu_seqlens_q, x.cu_seqlens_k))
        torch._assert_async((now == self._buffers["lengths"]).all(), STALE)
        if x.block_table is not None:  # pages may be others though lengths are the same
            table, places = x.block_table.reshape(-1), self._buffers["places"]
            torch.index_select(table, 0, places, out=self._buffers["indices"])
        out = self._run(x.q, x.k, x.v)
        return out.masked_fill_(self._buffers["blind"][:, None, None], 0) if self._blind else out

    def _saw(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        return bool(self._tensors) and all(
            ref() is tensor and version == tensor._version
            for (ref, version), tensor in zip(self._tensors, tensors, strict=True)
        )

    def _plan(self, starts_q: torch.Tensor, starts_k: torch.Tensor, x: VarlenArguments) -> None:
        tokens, sequences, capacity = sizes_of(x)
        lengths = torch.cat((starts_q, starts_k))
        self._put("lengths", torch.full_like(lengths, -1))  # until all is done
        starts_q = F.pad(starts_q, (0, 1), value=tokens)
        starts_k = F.pad(starts_k, (0, 1), value=int(starts_k[-1]))
        q_lens, k_lens = starts_q.diff(), starts_k.diff()
        # Queries that see no key: not all kernels give zeros.
        count = (q_lens - k_lens).clamp(min=0) if x.causal else q_lens * (k_lens == 0)
        place = torch.arange(tokens) - starts_q[:-1].repeat_interleave(q_lens)
        blind = place < count.repeat_interleave(q_lens)
        self._blind = self._for_graph or bool(blind.any())
        self._put("blind", blind)
        indices = None
        if x.block_table is not None:
            pages = self._kind.pages(starts_k)
            row = torch.arange(sequences + 1).repeat_interleave(pages)
            column = torch.arange(len(row)) - _starts(pages)[:-1].repeat_interleave(pages)
            places = F.pad(row * x.block_table.shape[1] + column, (0, capacity - len(row))).int()
            self._put("places", places)
            indices = self._put("indices", torch.zeros_like(places))[: len(row)]
        if self._wrapper is None:
            self._wrapper = self._kind.wrapper(**(self._fixed(sequences + 1) if self._for_graph else {}))
        self._kind.plan(self._wrapper, starts_q, starts_k, indices)
        if self._for_graph and not self._has_run:
            # What FlashInfer makes at its first run must not lie in a graph's memory.
            self._run(*self._zeros(x))
            self._has_run = True
        self._put("lengths", lengths)

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys = {"k": k, "v": v} if self._kind.page_size is None else {"paged_kv_cache": (k, v)}
        return self._wrapper.run(q=q, **keys)  # type: ignore[no-any-return]

    def _zeros(self, x: VarlenArguments) -> list[torch.Tensor]:
        """q, k and v; of pages the first only."""
        first = [y.shape if x.block_table is None else (1, *y.shape[1:]) for y in (x.k, x.v)]
        made = zip((x.q.shape, *first), (x.q.dtype, x.k.dtype, x.v.dtype), strict=True)
        return [torch.zeros(shape, dtype=dtype, device=self._kind.device) for shape, dtype in made]

    def _put(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values` on the device, in the buffer of this name, which a graph may read, if they fit."""
        old = self._buffers.get(name)
        if old is None or old.shape != values.shape:
            self._buffers[name] = values.to(self._kind.device, copy=True)
        else:
            old.copy_(values)
        return self._buffers[name]

    def _fixed(self, sequences: int) -> dict[str, Any]:
        """What a wrapper keeps its lengths in."""

        def empty(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self._kind.device)

        buffers = {"use_cuda_graph": True, "qo_indptr_buf": empty(sequences + 1)}
        if self._kind.page_size is None:
            return {**buffers, "kv_indptr_buf": empty(sequences + 1)}
        return {
            **buffers, "paged_kv_indptr_buf": empty(sequences + 1),
            "paged_kv_indices_buf": self._buffers["indices"],
            "paged_kv_last_page_len_buf": empty(sequences),
        }  # fmt: skip


@functools.lru_cache(maxsize=32)
def plan_of(kind: Kind) -> Plan:
    """The plan of all calls of a kind outside of CUDA graphs."""
    return Plan(kind, for_graph=False)


@functools.cache
def plans_for_graphs(kind: Kind) -> dict[tuple[int, int, int], Plan]:
    """By `sizes_of`: a kind's plans for CUDA graphs, kept because the graphs read their buffers."""
    return {}


def sizes_of(x: VarlenArguments) -> tuple[int, int, int]:
    """Query tokens, sequences, and pages that the table has room for."""
    pages = 0 if x.block_table is None else x.block_table.numel()
    return x.q.shape[0], len(x.cu_seqlens_q) - 1, pages


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where each of these starts, and the last ends, int32."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def _check(starts_q: torch.Tensor, starts_k: torch.Tensor, x: VarlenArguments) -> None:
    if len(starts_q) != len(starts_k):
        raise ValueError(f"cu_seqlens_q has {len(starts_q)} entries, cu_seqlens_k {len(starts_k)}")
    tokens = {"cu_seqlens_q": (starts_q, x.q.shape[0])}
    if x.block_table is None:
        tokens["cu_seqlens_k"] = (starts_k, x.k.shape[0])
    elif (longest := int(starts_k.diff().max())) > (room := x.block_table.shape[1] * x.k.shape[1]):
        raise ValueError(f"a sequence has {longest} keys, block_table room for {room}")
    for name, starts in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k)):
        if starts[0] != 0 or (starts.diff() < 0).any():
            raise ValueError(f"{name} {starts.tolist()}: it starts at 0 and never falls")
    for name, (starts, there) in tokens.items():
        if starts[-1] > there:
            raise ValueError(f"{name} ends at {int(starts[-1])} of {there} tokens")
