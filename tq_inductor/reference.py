"""Store, dequantize and attend in plain torch: the specification of the packed cache.

Every kernel is tested against this file, and it is what runs on a CPU. `store`, `dequantize`, `decode`
and `attend` take the arguments of the kernels' launchers of those names; `ops` says what they mean.
Shapes: `B` batch, `H` query heads, `Hkv` KV heads, `q` new tokens, `P` pages, `L` tokens of a page, `D`
head dimension.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .beside import NOTHING, SEGMENT, Beside, Chunk
from .codec import decode_vectors, encode_vectors, pack, unpack
from .format import PAGE_ALIGNMENT, SCALE_DTYPE, KVFormat
from .reference_beside import copy_exact, exact_slots, take_means
from .reference_masks import last_tokens, visible_keys, visible_range
from .reference_pages import capacity, has_no_page, place, rows_of


def _planes(cache: torch.Tensor, fmt: KVFormat) -> dict[str, torch.Tensor]:
    """Views of `cache` `[P, Hkv, page_bytes]`: rows `[P, Hkv, L, row]`, scales `[P, Hkv, L]`.

    Packed value rows are shown as stored: `[P, Hkv, L / 16, row, 16]`.
    """
    page_size = fmt.page_size(cache.shape[-1])
    views = {}
    for plane in fmt.planes(page_size):
        data = cache[..., plane.offset : plane.offset + plane.nbytes]
        if plane.name.endswith("scales"):
            views[plane.name] = data.view(SCALE_DTYPE)
        elif fmt.is_lossless:
            views[plane.name] = data.unflatten(-1, (page_size, -1)).view(fmt.dtype)
        elif plane.name == "v_rows":
            views[plane.name] = data.unflatten(-1, (-1, plane.row_bytes, PAGE_ALIGNMENT))
        else:
            views[plane.name] = data.unflatten(-1, (page_size, -1))
    return views


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def store(
    cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    beside: Beside = NOTHING,
    block_table: torch.Tensor | None = None,
) -> None:
    """Write new tokens as the last `q` of each row's `seq_lens` tokens, in place.

    Args:
        cache: `[B, Hkv, page_bytes]` uint8, one page per batch row; with a block table `[P, Hkv, ..]`.
        k, v: `[B, Hkv, q, D]`; v may have another head dimension.
        seq_lens: `[]` or `[B]` int64, the lengths *after* the append. Tokens that would land at a
            negative position, past the end of the page or of the table, or have no page, are skipped.
        beside: written too, as `beside` says; nothing for a lossless format.
        block_table: `[B, n]` int32: token p of a row lies in page `block_table[row, p // page_size]`; -1:
            there is none.
    """
    new, page_size = k.shape[2], fmt.page_size(cache.shape[-1])
    rows, tokens, positions = _places(k, seq_lens, capacity(block_table, page_size))
    views = _planes(cache, fmt)
    new_k, new_v = k.transpose(1, 2)[rows, tokens], v.transpose(1, 2)[rows, tokens]  # [n, Hkv, D]
    if beside.exact_from is not None:
        copy_exact(beside, new_k, new_v, rows, positions, seq_lens, new)
    pages, slots = place(rows, positions, block_table, page_size)
    has_page = pages >= 0
    new_k, new_v, slots, pages = (x[has_page] for x in (new_k, new_v, slots, pages))
    if fmt.is_lossless:
        views["k_rows"][pages, :, slots] = new_k.to(fmt.dtype)
        views["v_rows"][pages, :, slots] = new_v.to(fmt.dtype)
        return
    if beside.k_mean is not None:

        def decoded(row: int, tokens: torch.Tensor) -> torch.Tensor:
            page, slot = place(torch.full_like(tokens, row), tokens, block_table, page_size)
            page, slot = page[page >= 0], slot[page >= 0]
            codes = unpack(views["k_rows"][page, :, slot], fmt.k_bits)
            scales = views["k_scales"][page, :, slot]
            return decode_vectors(codes, scales, fmt.k_bits, k_rotation).transpose(0, 1)

        take_means(beside.k_mean, k, seq_lens, decoded)
        mean = beside.k_mean[rows, :, positions // SEGMENT][has_page]
        new_k = new_k.to(torch.float32) - mean.to(torch.float32)
    codes, scales = encode_vectors(new_k, fmt.k_bits, k_rotation)
    views["k_rows"][pages, :, slots] = pack(codes, fmt.k_bits)
    views["k_scales"][pages, :, slots] = scales
    codes, scales = encode_vectors(new_v, fmt.v_bits, v_rotation)
    group, lane = slots // PAGE_ALIGNMENT, slots % PAGE_ALIGNMENT
    views["v_rows"][pages, :, group, :, lane] = pack(codes, fmt.v_bits)
    views["v_scales"][pages, :, slots] = scales


def _places(
    k: torch.Tensor, seq_lens: torch.Tensor, end: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where k `[B, Hkv, n, D]`, the last tokens of each row, lie: row, which of n, position below `end`."""
    batch, _, new, _ = k.shape
    positions = seq_lens.expand(batch)[:, None] - new + torch.arange(new)
    rows, tokens = torch.nonzero((positions >= 0) & (positions < end), as_tuple=True)
    return rows, tokens, positions[rows, tokens]


def load(
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    max_len: int,
    beside: Beside = NOTHING,
    block_table: torch.Tensor | None = None,
    own: Chunk | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `max_len` keys and values `[B, Hkv, max_len, D]` float32; zero past `seq_lens`.

    A token without a page has a key of NaN, so that a query that sees it gives NaN, and a value of zero, so
    that others do not. What `own` has is not read from the cache. See `store` for the arguments.
    """
    views = {name: rows_of(plane, block_table) for name, plane in _planes(cache, fmt).items()}
    batch = cache.shape[0] if block_table is None else block_table.shape[0]
    slot = torch.arange(max_len, device=cache.device)
    lens = seq_lens.expand(batch)[:, None]
    filled = (slot < lens)[:, None, :, None]  # [B, 1, max_len, 1]
    if fmt.is_lossless:
        k = views["k_rows"][:, :, :max_len].to(torch.float32)
        v = views["v_rows"][:, :, :max_len].to(torch.float32)
    else:
        k_rows = views["k_rows"][:, :, :max_len]
        groups = -(-max_len // PAGE_ALIGNMENT)
        v_rows = views["v_rows"][:, :, :groups].transpose(-1, -2).flatten(2, 3)[:, :, :max_len]
        k_scales, v_scales = views["k_scales"][:, :, :max_len], views["v_scales"][:, :, :max_len]
        k = decode_vectors(unpack(k_rows, fmt.k_bits), k_scales, fmt.k_bits, k_rotation)
        v = decode_vectors(unpack(v_rows, fmt.v_bits), v_scales, fmt.v_bits, v_rotation)
        if beside.k_mean is not None:
            k = k + beside.k_mean[:, :, slot // SEGMENT].to(torch.float32)
    if block_table is not None:
        missing = has_no_page(block_table, fmt.page_size(cache.shape[-1]), max_len)[:, None, :, None]
        k, v = torch.where(missing, float("nan"), k), torch.where(missing, 0.0, v)
    if beside.exact is not None and beside.exact_from is not None:
        first_recent = torch.maximum(beside.exact_from, seq_lens - beside.recent_tokens)
        is_recent = slot >= first_recent.clamp(min=beside.sink_tokens).expand(batch)[:, None]
        rows, tokens = torch.nonzero(
            (slot < lens) & ((slot < beside.sink_tokens) | is_recent), as_tuple=True
        )
        exact = beside.exact[rows, :, exact_slots(beside, tokens)].to(torch.float32)
        k[rows, :, tokens], v[rows, :, tokens] = exact.split([k.shape[-1], v.shape[-1]], -1)
    if own is not None:
        rows, tokens, slots = _places(own[0], seq_lens, max_len)
        for x, new in zip((k, v), own, strict=True):
            x[rows, :, slots] = new.transpose(1, 2)[rows, tokens].to(torch.float32)
    return torch.where(filled, k, 0.0), torch.where(filled, v, 0.0)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention `[B, H, q, Dv]`: `attention_and_lse` without the latter."""
    return attention_and_lse(q, k, v, visible, scale, bias, sinks, softcap)[0]


def attention_and_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, in the dtype of its inputs (float64 for an oracle).

    Args:
        q: `[B, H, q, D]`; k, v: `[B, Hkv, L, D]`; query head h reads KV head h * Hkv / H.
        visible: bool, broadcastable to `[B, H, q, L]`. A row that sees nothing gives zeros.
        bias: added to the scaled scores, broadcastable likewise.
        sinks: `[H]`, a score per head that takes part in the softmax and has no value.
        softcap: scaled scores s become `softcap * tanh(s / softcap)`, before the bias.

    Returns:
        `[B, H, q, Dv]`, and the natural logarithm of the softmax's denominator `[B, H, q]`, sinks included;
        -inf where that is 0.
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    grouped = q.unflatten(1, groups).flatten(2, 3)  # [B, Hkv, group * q, D]: no head is copied
    scores = (grouped @ k.transpose(-1, -2) * scale).view(*q.shape[:-1], k.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    peak = scores.amax(-1, keepdim=True)
    weights = torch.where(peak.isneginf(), 0.0, (scores - peak).exp())
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.clamp(min=torch.finfo(q.dtype).tiny))[..., : k.shape[2]]
    out = weights.unflatten(1, groups).flatten(2, 3) @ v
    return out.view(*q.shape[:-1], v.shape[-1]), (peak + total.log()).squeeze(-1)


def poison_overfull(x: torch.Tensor, seq_lens: torch.Tensor, max_len: int) -> torch.Tensor:
    """`x` `[B, ...]` with NaN in rows that hold more than `max_len` tokens: the rest was dropped."""
    overfull = (seq_lens.expand(x.shape[0]) > max_len).reshape(-1, *[1] * (x.dim() - 1))
    return x.masked_fill(overfull, float("nan"))


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def dequantize(
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    fmt: KVFormat,
    max_len: int,
    dtype: torch.dtype,
    beside: Beside = NOTHING,
    block_table: torch.Tensor | None = None,
    own: Chunk | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[B, Hkv, max_len, D]` of `dtype`; zero past `seq_lens`, NaN if overfull."""
    filled = min(max(seq_lens.reshape(-1).tolist(), default=0), max_len)
    outputs = []
    for x in load(cache, seq_lens, k_rotation, v_rotation, fmt, filled, beside, block_table, own):
        padded = F.pad(x.to(dtype), (0, 0, 0, max_len - filled))
        outputs.append(poison_overfull(padded, seq_lens, max_len))
    return outputs[0], outputs[1]


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    k_rotation: torch.Tensor,
    v_rotation: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    fmt: KVFormat,
    max_len: int,
    scale: float,
    beside: Beside = NOTHING,
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    own: Chunk | None = None,
) -> torch.Tensor:
    """Attention of q `[B, H, q, D]` over a packed cache -> `[B, H, q, Dv]`; NaN in overfull rows.

    `lse` `[B, H, q]` float32 is filled, if given, with `attention_and_lse`'s logarithm. `own`: the last
    tokens of each row as they came, which are then not read from the cache.
    """
    if attn_mask is None and bounds is None:
        bounds = last_tokens(seq_lens, q.shape[0], q.shape[2])
    visible, bias = visible_keys(attn_mask, bounds, max_len)
    end = visible_range(visible).stop  # read no slot that nothing sees
    k, v = load(cache, seq_lens, k_rotation, v_rotation, fmt, end, beside, block_table, own)
    bias = None if bias is None else bias[..., :end]
    out, log = attention_and_lse(q.float(), k, v, visible[..., :end], scale, bias, sinks, softcap)
    if lse is not None:
        lse.copy_(poison_overfull(log, seq_lens, max_len))
    return poison_overfull(out, seq_lens, max_len).to(q.dtype)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q `[B, H, q, D]` over the keys and values `[B, Hkv, L, D]` that something sees.

    `lse` is filled as by `decode`.
    """
    visible, bias = visible_keys(attn_mask, bounds, k.shape[2])
    seen = visible_range(visible)
    visible, k, v = visible[..., seen], k[:, :, seen], v[:, :, seen]
    bias = None if bias is None else bias[..., seen].masked_fill(~visible, float("-inf"))
    if sinks is None and softcap is None and lse is None:
        mask = visible if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    inputs = (q.float(), k.float(), v.float())
    out, log = attention_and_lse(*inputs, visible, scale, bias, sinks, softcap)
    if lse is not None:
        lse.copy_(log)
    return out.to(q.dtype)
