"""Attention of a few new tokens over a packed cache or plain K and V: split-KV flash decoding by KV head.

Three launches (two for a lossless format):

1. `rotate_kernel`: q @ rotation in float32, so that scores are taken against codes as they lie; and
   `mean_scores`, if keys have means.
2. `decode_split_kernel`: grid (splits x row blocks x blocks of value dimensions, KV heads, batch).
   A program reads a run of tiles of one KV head once for all query rows (heads of the group x new
   tokens) of its block, with two tensor-core dots a tile, and writes a normalised partial output and
   the base-2 logarithm of its sum of weights. Runs divide what is visible (`bounds`, else the
   device's length), so a cache filled to a fraction f costs f; the grid depends on static sizes only.
3. `decode_reduce`: the partials of a query row are added up and rotated back, and joined by what they leave
   out: slots past the length (keys of zeros), and tokens that are there as they came.

On a GPU that can, `decode_warp` takes the place of the first two for few rows, without a mask or with one
over keys; `prefill` and `prefill_pieces` do for many tokens, `attend_wgmma` for many over plain K and V.
`exact` and `unpacked` have what is there as it came.

With 16-bit queries the operands are float16: codes are exact in it, each rotated query row is divided
by its largest magnitude, and the weights carry the value scales, divided by the tile's largest.
Bytes: the packed rows and scales of visible slots, once per row block; partials stay in cache.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..beside import NOTHING, Beside, Chunk
from ..format import PAGE_ALIGNMENT, KVFormat
from ..results import empty_result
from . import attend_wgmma
from .bits import (
    TINY,
    early_launch,
    magnitude_words,
    operand_dtype,
    sm_count,
    whole_waves,
)
from .decode_query import rotate, rotate_queries
from .decode_reduce import reduce_splits
from .decode_rows import load_query
from .decode_tile import attend_tile, hide_in_part
from .decode_warp import attend_by_warps, takes
from .exact import Parts, exact_work
from .mean_scores import mean_scores
from .pages import table_arguments, tokens_of_page
from .prefill import attend_to_prefix, takes_prefix
from .prefill_pieces import attend_by_pieces, takes_pieces
from .scores import (
    BIT_MASK,
    KEY_MASK,
    LOG2_E,
    NO_MASK,
    expand_bounds,
    has_whole,
    mask_arguments,
)
from .unpacked import attend_unpacked

CTAS_PER_SM = 8  # more than fit: the runs are shorter, and so is the last wave
FIT_16_BIT = 3  # programs over 16-bit rows that fit on a multiprocessor: 70 KiB of shared memory


@triton.jit
def decode_split_kernel(
    q_ptr, mean_score_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, seq_lens_ptr, exact_from_ptr,
    bounds_ptr, mask_ptr, table_ptr, partial_ptr, log_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, scale_stride_b,
    scale_stride_h, lens_stride, from_stride, bounds_stride_b, bounds_stride_t, mask_stride_b,
    mask_stride_h, mask_stride_t, mask_stride_n, table_stride_b, table_stride_n, segments, q_len, own,
    max_len, splits, scale, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_LO: tl.constexpr,
    K_HI: tl.constexpr, V_LO: tl.constexpr, V_HI: tl.constexpr, OPERAND: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, V_GROUP: tl.constexpr, HEADS: tl.constexpr, HAS_LENS: tl.constexpr,
    SINKS: tl.constexpr, RECENT: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_WHOLE: tl.constexpr,
    MASK: tl.constexpr, HAS_MEAN: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr,
    COPIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DIRECT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    DV_BLOCKS: tl.constexpr = (V_DIM + BLOCK_DV - 1) // BLOCK_DV
    split = tl.program_id(0) % splits
    dv_start = tl.program_id(0) // splits % DV_BLOCKS * BLOCK_DV
    row_block = tl.program_id(0) // splits // DV_BLOCKS
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    rows = q_len * HEADS  # query rows of this KV head: token-major, its heads fastest
    ROWS: tl.constexpr = BLOCK_M // COPIES
    row = row_block * ROWS + tl.arange(0, BLOCK_M) % ROWS
    valid = row < rows
    token = row // HEADS
    head = kv_head * HEADS + row % HEADS
    filled = max_len
    if HAS_LENS:
        seq_len = tl.load(seq_lens_ptr + batch * lens_stride)
        filled = tl.minimum(seq_len - own, max_len).to(tl.int32)
    # A row sees slots low .. high - 1 (of those that the mask lets through); here, of packed tokens.
    low = tl.zeros([BLOCK_M], tl.int32)
    high = low + max_len
    if HAS_BOUNDS:
        bounds_ptr += batch * bounds_stride_b + token * bounds_stride_t
        low = tl.maximum(tl.load(bounds_ptr, mask=valid, other=0), 0)
        high = tl.minimum(tl.load(bounds_ptr + 1, mask=valid, other=0), max_len)
    elif HAS_LENS and MASK == NO_MASK:  # the queries are the last tokens
        high = tl.minimum(seq_len - q_len + token + 1, max_len)
        high = tl.maximum(high, 0).to(tl.int32)
    if HAS_LENS:
        high = tl.minimum(high, filled)
    if SINKS + RECENT > 0:
        first_recent = tl.maximum(tl.load(exact_from_ptr + batch * from_stride), seq_len - RECENT)
        low = tl.maximum(low, SINKS)
        high = tl.minimum(high, tl.minimum(first_recent, max_len).to(tl.int32))
    seen = valid & (low < high)
    begin = tl.min(tl.where(seen, low, max_len), axis=0) // BLOCK_N * BLOCK_N
    end = tl.max(tl.where(seen, high, 0), axis=0)
    run = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    first_slot = begin + split * run
    end = tl.minimum(first_slot + run, end)
    # Slots that all rows see, where nothing need be hidden.
    whole_from = tl.max(tl.where(valid, low, 0), axis=0)
    whole_to = tl.min(tl.where(valid, high, max_len), axis=0)
    if HAS_WHOLE:  # the mask lets all of these through
        whole_from = tl.maximum(whole_from, tl.max(tl.load(bounds_ptr + 2, mask=valid, other=0), axis=0))
        whole_to = tl.minimum(whole_to, tl.min(tl.load(bounds_ptr + 3, mask=valid, other=max_len), axis=0))

    # Partials are [batch, KV head, row, split]; the first block of value dimensions writes the log. With
    # DIRECT there is one split, and it is the result [batch, token, head].
    own_row = row_block * ROWS + tl.arange(0, ROWS)
    part = ((batch * tl.num_programs(1) + kv_head) * rows + own_row) * splits + split
    if DIRECT:
        part = (batch * q_len + own_row // HEADS) * tl.num_programs(1) + kv_head
        part = part * HEADS + own_row % HEADS
    dims = dv_start + tl.arange(0, BLOCK_DV)
    written = (own_row < rows)[:, None] & (dims < V_DIM)[None, :]
    partial_ptrs = partial_ptr + part[:, None] * V_DIM + dims[None, :]
    # One shape: Triton 3.9's interpreter wants it so.
    writes_log = (own_row < rows) & (dv_start == own_row * 0)
    if first_slot >= end:
        if DIRECT:
            zeros = tl.zeros([ROWS, BLOCK_DV], tl.float32)
            tl.store(partial_ptrs, zeros.to(partial_ptr.dtype.element_ty), mask=written)
        else:
            tl.store(log_ptr + part, tl.full([ROWS], float("-inf"), tl.float32), mask=writes_log)
        return

    q_ptr += batch * q_stride_b + head * q_stride_h + token.to(tl.int64) * q_stride_t
    mask_ptr += batch * mask_stride_b
    if MASK != KEY_MASK:
        mask_ptr += head * mask_stride_h + token.to(tl.int64) * mask_stride_t
    if PAGE > 0:
        table_ptr += batch * table_stride_b
        first_page = batch * 0
    else:
        first_page = batch
    k_ptr += first_page * k_stride_b + kv_head * k_stride_h
    v_ptr += first_page * v_stride_b + kv_head * v_stride_h
    k_scale_ptr += first_page * scale_stride_b + kv_head * scale_stride_h
    v_scale_ptr += first_page * scale_stride_b + kv_head * scale_stride_h

    q_peak = tl.full([BLOCK_M], 1.0, tl.float32)
    if K_BITS != 16 and tl.float16 == OPERAND:
        q_peak = tl.full([BLOCK_M], TINY, tl.float32)
        for start in range(0, K_DIM, BLOCK_D):
            q = load_query(q_ptr, q_stride_d, valid, start, q_peak, tl.float32, K_DIM, BLOCK_D)
            q_peak = tl.maximum(q_peak, tl.max(tl.abs(q), axis=1))
    inv_peak = 1.0 / q_peak
    q = load_query(q_ptr, q_stride_d, valid, 0, inv_peak, OPERAND, K_DIM, BLOCK_D)
    q_scale = q_peak * (scale * LOG2_E)
    mean_ptrs = mean_score_ptr + (batch * tl.num_programs(1) + kv_head) * segments * rows + row

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(first_slot, end, BLOCK_N):
        needed = True
        if MASK != NO_MASK and MASK != BIT_MASK and not HAS_BOUNDS:  # a tile that no row sees is not read
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            shown = hide_in_part(
                zeros, start, low, high, whole_from, whole_to, mask_ptr, mask_stride_n, valid, max_len,
                HAS_WHOLE, MASK,
            )  # fmt: skip
            needed = tl.max(tl.max(shown, axis=1), axis=0) > float("-inf")
        if needed:
            acc, total, peak = attend_tile(
                acc, total, peak, q, q_ptr, q_stride_d, valid, inv_peak, q_scale, mean_ptrs, rows,
                table_ptr, table_stride_n, k_ptr, v_ptr, k_stride_b, k_stride_n, v_stride_b, v_stride_n,
                k_scale_ptr, v_scale_ptr, scale_stride_b, start, filled, dv_start, low, high, whole_from,
                whole_to, mask_ptr, mask_stride_n, max_len, HAS_WHOLE, MASK, HAS_MEAN, SOFTCAP, K_BITS,
                V_BITS, K_LO, K_HI, V_LO, V_HI, OPERAND, K_DIM, V_DIM, V_GROUP, PAGE, COPIES, BLOCK_N,
                BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    if PDL:
        gdc_launch_dependents()
    if COPIES == 2:
        acc = tl.sum(tl.reshape(acc, [COPIES, ROWS, BLOCK_DV]), axis=0)
        total = tl.max(tl.reshape(total, [COPIES, ROWS]), axis=0)
        peak = tl.max(tl.reshape(peak, [COPIES, ROWS]), axis=0)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(partial_ptrs, out.to(partial_ptr.dtype.element_ty), mask=written)
    if not DIRECT:
        tl.store(log_ptr + part, peak + tl.log2(total), mask=writes_log)


def tile_sizes(rows: int, dim: int, dv: int, operand: tl.dtype) -> tuple[int, int, int, int, int]:
    """`(COPIES, BLOCK_M, BLOCK_N, num_warps, num_stages)` for these query rows and dims of keys and values.

    bf16 weights alone cost as much accuracy as the rounding of a bf16 result. Where there are so few rows
    that K and V are what takes the time, each row is there twice: for its weights, and for what is left.
    """
    if operand == tl.float32:  # its dots run on plain multiply-adds: small tiles
        return 1, 16, 16, 4, 3
    copies = 2 if operand == tl.bfloat16 and rows <= 32 else 1
    block_m = min(64, max(16, copies * triton.next_power_of_2(rows)))
    block_dv = min(256, triton.next_power_of_2(dv))
    num_warps = 4 if block_m * block_dv <= 8192 else 8  # accumulators fit the registers
    wide = max(dim, dv) > 128
    stages = 2 if torch.version.hip or (wide and block_m == 64) else 3  # that fit shared memory everywhere
    return copies, block_m, 32 if wide else 64, num_warps, stages


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
    """Attention of q `[B, H, q, D]` over a packed cache -> `[B, H, q, Dv]`.

    The arguments are those of `reference.decode`.
    """
    out = empty_result(q, fmt.v_head_dim)
    if out.numel() == 0:
        return out
    bounds = expand_bounds(bounds, q)
    page = tokens_of_page(cache, fmt, block_table)
    if own is None and takes(q, fmt, cache.shape[1], attn_mask, bounds, page, beside):
        with torch.cuda.device_of(q):
            work = exact_work(q, cache.shape[1], fmt.v_head_dim, scale, beside)
            queries = rotate_queries(q, k_rotation, cache.shape[1], scale)
            attend_by_warps(
                out, q, queries, work, cache, seq_lens, v_rotation, attn_mask, bounds, sinks, fmt,
                max_len, scale, beside, softcap, block_table, lse,
            )  # fmt: skip
        return out
    planes = fmt.planes(fmt.page_size(cache.shape[-1]))
    views = [cache[..., plane.offset : plane.offset + plane.nbytes] for plane in planes]
    where, visible = (block_table, page), (attn_mask, bounds, sinks, max_len, scale, softcap, lse)
    with torch.cuda.device_of(q):
        beside = NOTHING if fmt.is_lossless else beside
        unpacked = (attn_mask, bounds, max_len, scale, softcap, cache.shape[1], fmt.v_head_dim)
        parts = attend_unpacked(q, own, beside, seq_lens, *unpacked)
        own_tokens = 0 if own is None else own[0].shape[2]
        if takes_prefix(q, fmt, page):
            queries = rotate_queries(q, k_rotation, cache.shape[1], scale)
            last = (*visible, fmt, beside, own_tokens, parts)
            attend_by = attend_by_pieces if takes_pieces(q, cache.shape[1]) else attend_to_prefix
            attend_by(out, q, queries, cache, seq_lens, v_rotation, *last)
        elif fmt.is_lossless:
            k = views[0].view(fmt.dtype).unflatten(-1, (-1, fmt.head_dim))
            v = views[1].view(fmt.dtype).unflatten(-1, (-1, fmt.v_head_dim))
            last = (*where, *visible, beside, own_tokens, parts)
            _launch(out, q, None, k, v, fmt, None, seq_lens, None, *last)
        else:
            k, v = (x[:, :, None] for x in views[:2])  # the rows are found in the kernel
            scales = (views[2].view(torch.bfloat16), views[3].view(torch.bfloat16))
            rotated, means = rotate(q, k_rotation), mean_scores(q, beside.k_mean, seq_lens, scale)
            last = (*where, *visible, beside, own_tokens, parts)
            _launch(out, rotated, means, k, v, fmt, scales, seq_lens, v_rotation, *last)
    return out


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
    """Attention of q `[B, H, q, D]` over k, v `[B, Hkv, L, D]` -> `[B, H, q, Dv]`.

    The arguments are those of `reference.attend`.
    """
    out = empty_result(q, v.shape[-1])
    bounds = expand_bounds(bounds, q)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with torch.cuda.device_of(q):
        if attend_wgmma.takes(q, k, v, attn_mask, sinks, scale, softcap, lse):
            attend_wgmma.attend_by_wgmma(out, q, k, v, attn_mask, bounds, scale)
            return out
        visible = (None, 0, attn_mask, bounds, sinks, k.shape[2], scale, softcap, lse)
        _launch(out, q, None, k, v, None, None, None, None, *visible, NOTHING)
    return out


def _launch(
    out: torch.Tensor, q: torch.Tensor, scores: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor,
    fmt: KVFormat | None, scales: tuple[torch.Tensor, torch.Tensor] | None,
    seq_lens: torch.Tensor | None, v_rotation: torch.Tensor | None,
    block_table: torch.Tensor | None, page: int, attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None, sinks: torch.Tensor | None, max_len: int, scale: float,
    softcap: float | None, lse: torch.Tensor | None, beside: Beside,
    own: int = 0, parts: Parts | None = None,
) -> None:  # fmt: skip
    """Fill `out` `[B, H, q, Dv]`, and `lse` if given.

    If k and v are packed, q is rotated, `scores` are its `mean_scores` and `scales` are given. `parts` has
    the exact tokens and the `own` last ones.
    """
    batch, heads, q_len, dim = q.shape
    dv, kv_heads = out.shape[3], k.shape[1]
    if out.numel() == 0:
        return
    group = heads // kv_heads
    rows = q_len * group
    if scales:
        operand = tl.float32 if out.dtype == torch.float32 else tl.float16
    else:
        operand = operand_dtype(q.dtype, k.dtype, v.dtype)
    copies, block_m, block_n, num_warps, num_stages = tile_sizes(rows, dim, dv, operand)
    wide = operand == tl.float32
    # Up to 256 dimensions of a key at once, larger ones in pieces; values in blocks of the grid.
    largest = 64 if wide else 256
    block_d = max(16, triton.next_power_of_2(dim))
    block_d = block_d if block_d <= largest else largest // 2
    block_dv = min(largest, max(16, triton.next_power_of_2(dv)))
    programs = triton.cdiv(rows, block_m // copies) * triton.cdiv(dv, block_dv)
    groups, tiles = programs * kv_heads * batch, triton.cdiv(max_len, block_n)
    if scales:
        splits = max(1, min(tiles, CTAS_PER_SM * sm_count(q.device) // groups))
    else:
        splits = whole_waves(groups, tiles, FIT_16_BIT * sm_count(q.device))

    # Many rows need no splits, and their partials are more bytes than keys and values.
    direct = splits == 1 and seq_lens is None and sinks is None and lse is None
    partial = logs = out
    if not direct:
        partial = torch.empty((batch, kv_heads, rows, splits, dv), dtype=torch.float32, device=q.device)
        logs = torch.empty((batch, kv_heads, rows, splits), dtype=torch.float32, device=q.device)
    mask_kind, mask, mask_strides = mask_arguments(attn_mask, q, max_len)
    k_bits, v_bits = (fmt.k_bits, fmt.v_bits) if scales and fmt else (16, 16)
    k_lo, k_hi = magnitude_words(k_bits)
    v_lo, v_hi = magnitude_words(v_bits)
    k_scales, v_scales = scales or (q, q)
    lens_stride = 0 if seq_lens is None else seq_lens.expand(batch).stride(0)
    exact_from = beside.exact_from
    from_stride = 0 if exact_from is None else exact_from.expand(batch).stride(0)
    table = table_arguments(block_table, q)
    bounds_strides = (0, 0) if bounds is None else bounds.stride()[:2]
    if mask_kind != NO_MASK.value and not scales and not has_whole(bounds, mask_kind):
        num_stages = 2  # of the mask too
    decode_split_kernel[(programs * splits, kv_heads, batch)](
        q, q if scores is None else scores, k, v, k_scales, v_scales,
        q if seq_lens is None else seq_lens,
        q if exact_from is None else exact_from, q if bounds is None else bounds, mask, table[0],
        partial, logs, *q.stride(), *k.stride()[:3], *v.stride()[:3], *k_scales.stride()[:2],
        lens_stride, from_stride, *bounds_strides, *mask_strides, *table[1:], beside.segments, q_len, own,
        max_len, splits, scale, K_BITS=k_bits, V_BITS=v_bits, K_LO=k_lo, K_HI=k_hi, V_LO=v_lo, V_HI=v_hi,
        OPERAND=operand, K_DIM=dim, V_DIM=dv, V_GROUP=PAGE_ALIGNMENT if scales else 1, HEADS=group,
        HAS_LENS=seq_lens is not None, SINKS=beside.sink_tokens, RECENT=beside.recent_tokens,
        HAS_BOUNDS=bounds is not None, HAS_WHOLE=has_whole(bounds, mask_kind), MASK=mask_kind,
        HAS_MEAN=scores is not None, SOFTCAP=softcap or 0.0, PAGE=page,
        COPIES=copies, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_DV=block_dv, DIRECT=direct,
        num_warps=num_warps, num_stages=num_stages, **early_launch(q.device),
    )  # fmt: skip
    if direct:
        return
    if seq_lens is None:  # no slots are left out: nothing to hide
        attn_mask = bounds = None
    reduce_splits(
        out, partial, logs, seq_lens, v_rotation, attn_mask, bounds, sinks, group, max_len, lse, parts
    )
