"""What the checks of the Triton kernels run on: caches, vectors, masks and bounds as a case says."""

from __future__ import annotations

import contextlib

import torch
from kernel_cases import Case

from tq_inductor import reference
from tq_inductor.beside import NOTHING, SEGMENT, Beside
from tq_inductor.format import round_up
from tq_inductor.rotation import rotation_matrix


@contextlib.contextmanager
def nan_filled_memory():
    """Memory from `torch.empty` starts as NaN: a place that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def random_vectors(shape: tuple[int, ...], dtype: torch.dtype, device: str, view: str) -> torch.Tensor:
    """Normal vectors `[B, H, q, D]`, in memory as `view` says: transposed, strided or dense."""
    batch, heads, tokens, dim = shape
    if view == "transposed":
        return torch.randn(batch, tokens, heads, dim).to(device, dtype).transpose(1, 2)
    if view == "strided":
        return torch.randn(batch, heads, dim, tokens).to(device, dtype).transpose(2, 3)
    return torch.randn(shape).to(device, dtype)


def garbage_cache(case: Case, device: str) -> torch.Tensor:
    """A cache of stale bytes, half of them 0x7F or 0xFF: NaN as codes of 8 or 16 bits and as scales."""
    pages, tokens = case.batch, round_up(case.max_len)
    if case.page:
        pages, tokens = 1 + case.batch * -(-case.max_len // case.page), case.page
    cache = torch.randint(0, 256, (pages, case.kv_heads, case.format.slot_bytes * tokens))
    stale = torch.where(torch.rand(cache.shape) < 0.5, 0xFF, 0x7F)
    return torch.where(torch.rand(cache.shape) < 0.5, stale, cache).to(torch.uint8).to(device)


def block_table(case: Case, device: str) -> torch.Tensor | None:
    """Pages in any order, not one entry behind the other in memory; the first page is nobody's."""
    if not case.page:
        return None
    count = -(-case.max_len // case.page)
    order = torch.randperm(case.batch * count, generator=torch.Generator().manual_seed(0)) + 1
    table = order.view(count, case.batch).T.to(torch.int32)
    if case.hole >= 0:
        table[0, case.hole] = -1
    return table.to(device)


def lengths(case: Case, device: str) -> torch.Tensor:
    """`seq_lens` of a case: 0-d for a single length."""
    lens = case.lens[0] if len(case.lens) == 1 else case.lens
    return torch.tensor(lens, dtype=torch.int64, device=device)


def empty_beside(case: Case) -> Beside:
    """What is kept beside the cache of a case, on the CPU: some mean, stale tokens, nothing exact yet."""
    if not any(case.exact):
        return NOTHING
    rows = (case.batch, case.kv_heads)
    mean = torch.randn(*rows, -(-case.max_len // SEGMENT), case.dim) * 3
    exact = torch.full((*rows, sum(case.exact), case.dim + (case.v_dim or case.dim)), float("nan"))
    exact_from = torch.zeros_like(lengths(case, "cpu"))
    return Beside(mean.to(case.dtype), exact.to(case.dtype), exact_from, case.exact[0])


def moved(beside: Beside, device: str) -> Beside:
    """A copy on a device."""
    tensors = [None if x is None else x.to(device, copy=True) for x in beside[:3]]
    return Beside(*tensors, beside.sink_tokens)


def rotations(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotations of keys and values."""
    fmt = case.format
    return rotation_matrix(fmt.head_dim, device), rotation_matrix(fmt.v_head_dim, device)


def filled_cache(case: Case, device: str) -> tuple[torch.Tensor, Beside]:
    """A cache that the reference filled with random vectors, garbage past each length; what lies beside."""
    fmt, tokens = case.format, max(case.lens)
    cache, beside = garbage_cache(case, "cpu"), empty_beside(case)
    k = torch.randn(case.batch, case.kv_heads, tokens + case.crop, fmt.head_dim)
    v = torch.randn(case.batch, case.kv_heads, tokens + case.crop, fmt.v_head_dim)
    v *= torch.rand(tokens + case.crop, 1) * 3
    if case.keys == "huge":
        k[:, :, tokens // 2] *= 8
    elif case.keys == "equal":
        k[:] = k[:, :, :1]
    elif case.keys == "heavy":
        k *= torch.randn(case.batch, case.kv_heads, tokens, 1).exp()
        v *= (2 * torch.randn(case.batch, case.kv_heads, tokens, 1)).exp()
    if any(case.exact):
        position = torch.arange(k.shape[2]).clamp(max=case.max_len - 1)
        k += beside.k_mean.float()[:, :, position // SEGMENT]
    lens, table = lengths(case, "cpu"), block_table(case, "cpu")
    for part, length in ((slice(tokens), lens), (slice(tokens, None), lens + case.crop)):
        new_k, new_v = k[:, :, part], v[:, :, part]
        if new_k.shape[2]:
            reference.store(cache, new_k, new_v, length, *rotations(case, "cpu"), fmt, beside, table)
    return cache.to(device), beside


def make_mask(case: Case) -> torch.Tensor | None:
    """The attention mask of a case, with the strides and broadcasting that models use."""
    slot = torch.arange(case.max_len)
    lens = lengths(case, "cpu").expand(case.batch).reshape(-1, 1, 1, 1)
    row = torch.arange(case.batch).reshape(-1, 1, 1, 1)
    if case.mask == "none":
        return None
    if case.mask == "bool":  # no relation to the length: slots past it are keys of zeros
        return torch.rand(case.q_len, case.max_len) < 0.3
    if case.mask == "float":
        bias = torch.randn(case.batch, case.heads, case.max_len, case.q_len).transpose(2, 3)
        return bias.masked_fill(torch.rand(bias.shape) < 0.3, float("-inf")).to(case.dtype)
    if case.mask == "row":  # one visible key in the first row, none in the second
        return (slot == 3) & (row == 0)
    padding = row * 9
    if case.mask in ("keys", "holes"):
        held = (slot < lens) & (slot >= padding)
        return held & ((torch.rand(held.shape) < 0.8) | (row == 0)) if case.mask == "holes" else held
    seen = lens - case.q_len + torch.arange(case.q_len)[:, None]  # [B, 1, q, 1]
    return (slot <= seen) & (slot >= padding)


def make_bounds(case: Case, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Bounds `[B, q, 2]` of a case: int32, the last dimension contiguous, others as they come."""
    if case.bounds == "none":
        return None
    if case.bounds == "scan":
        seen = mask[:, 0]  # [B, 1, L]
        slot = torch.arange(case.max_len)
        low, high = torch.where(seen, slot, case.max_len).amin(-1), torch.where(seen, slot + 1, 0).amax(-1)
        last = lengths(case, "cpu").expand(case.batch)[:, None] - case.q_len + 1 + torch.arange(case.q_len)
        whole = torch.where(seen.sum(-1) == high - low, high, 0)
        ends = torch.broadcast_tensors(low, torch.minimum(high, last), low, whole)
        return torch.stack(ends, -1).to(torch.int32)
    if case.bounds == "row":  # expanded over the queries, as for a key mask
        ends = torch.tensor([[5, case.max_len], [3, 40]] * case.batch, dtype=torch.int32)[: case.batch]
        return ends[:, None].expand(case.batch, case.q_len, 2)
    if case.bounds == "shared":
        return torch.tensor([[[3, 40]]], dtype=torch.int32)
    first = torch.arange(case.q_len) * 7 + torch.arange(case.batch)[:, None] * 30 - 8
    bounds = torch.stack((first, first + 45), -1).to(torch.int32)
    bounds[0, -1] = torch.tensor([case.max_len + 3, case.max_len + 9])
    return bounds


def on(device: str, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tensors on a device; None stays None."""
    return [None if x is None else x.to(device) for x in tensors]


def make_sinks(case: Case) -> torch.Tensor | None:
    """One score for each head, not one behind the other in memory."""
    return (torch.randn(case.heads, 2) * 2)[:, 0] if case.sinks else None


def exact_tokens(beside: Beside, lens: torch.Tensor, max_len: int) -> torch.Tensor:
    """Which positions of each row are exact, bool `[B or 1, max_len]`, by the words of `beside`."""
    slot, lens = torch.arange(max_len), lens.reshape(-1, 1)
    first = torch.maximum(beside.exact_from.reshape(-1, 1), lens - beside.recent_tokens)
    return (slot < lens) & ((slot < beside.sink_tokens) | (slot >= first.clamp(min=beside.sink_tokens)))
