"""Split-KV attention over a packed cache for few query rows: one warp a program, no exchange.

For NVIDIA GPUs that convert fp8 (sm_89 on); `decode` has the kernel for all others. A program is one
warp: it attends a run of 64-token tiles of one KV head for up to 8 or 16 query rows. Its lanes copy a
tile's bytes to shared memory, each exactly those that it reads back, unpack them to float16 in the
registers that the tensor cores take them from, and keep scores, weights and sums there too. Nothing
waits for another warp, so the warps of an SM hide each other's latencies.

Keys and values are the first operand (`S^T = K q^T`, `O^T = V^T P^T`), for which lane 4r + c holds rows
r and r + 8 and, of every 8 places along the sum, places 2c and 2c + 1. Those places may be any dims or
tokens as long as both operands agree, so a lane takes 2, 4, .. contiguous bytes at once: place
8i + 2c + e is byte (c * BYTES + 2i + e) of 4 * BYTES, `place_byte`. The weights leave the first product
with a token per row, and enter the second with a token per place: `movmatrix` transposes 8 x 8 blocks.

Queries come rotated, divided by their largest magnitude, in float16; a weight is
2**15 * exp2(score - peak) times the value's scale over the largest scale so far, at most 2**15, so
that float16 loses nothing before 2**-39 of the largest.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..beside import NOTHING, Beside
from ..format import KVFormat
from .bits import TINY, codes_per_byte, early_launch, lookup_words, sm_count, unpack_asm
from .decode_query import Queries
from .decode_reduce import reduce_splits
from .exact import TRANSPOSE, ExactWork, attend_to_exact, first_recent_of
from .pages import table_arguments, tokens_of_page
from .scores import KEY_MASK, LOG2_E, has_whole, is_key_mask, mask_arguments
from .segments import MEAN_OF
from .unpacked import attend_unpacked
from .warp_hadamard import hadamard
from .warp_means import MOST_SEGMENTS, load_means, score_means
from .warp_operands import load_rows
from .warp_share import REGISTERS, share
from .warp_tiles import (
    copy_keys,
    copy_values,
    find_page,
    is_paired,
    key_words,
    load_queries,
    operands,
    place_byte,
    place_of_row,
    read_scales,
    tile_pointers,
    value_layout,
    words_of_row,
    written_bytes,
)

TILE = gl.constexpr(64)  # tokens: 16 for each of the 4 lanes of a row of an operand
MOST_TILES = (MOST_SEGMENTS - 1) * MEAN_OF.value // TILE.value + 1  # a run starts anywhere in a segment
MOST_ROWS = 64  # more: one pass of `decode`'s kernel over the bytes is faster than several of this one
WEIGHT_BITS = gl.constexpr(15.0)

# `$1`, in a register: lane masks below and above never meet, but the assembler does not know, and so
# does not keep the value in a uniform register, from which it would be copied before every lookup.
OPAQUE = gl.constexpr(
    "{ .reg .b32 a, b; mov.u32 a, %lanemask_lt; mov.u32 b, %lanemask_gt;"
    " and.b32 a, a, b; xor.b32 $0, $1, a; }"
)
WAIT = gl.constexpr("griddepcontrol.wait; // $0")
LAUNCH_NEXT = gl.constexpr("griddepcontrol.launch_dependents; // $0")


@gluon.jit
def attend_tile(
    acc, total, peak, largest, mean_score, q, q_scale, tables, shared, ptrs, left, sees, mask, has_page,
    start, end,
    PAGE: gl.constexpr, SOFTCAP: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr,
    K_ASM: gl.constexpr, V_ASM: gl.constexpr, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    K_PLANE: gl.constexpr, V_DIM: gl.constexpr, HAS_MASK: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """One tile of slots from `start`, online softmax in base 2; `ptrs` and `left` are of the next tile.

    If it has no page, a query that sees a token of it gives NaN. `mean_score` is that of the segment's mean
    of keys, which peaks have and `s` does not: added to each score it would be 64 additions a row.
    """
    FIRST: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    TOKENS: gl.constexpr = gl.SliceLayout(1, MMA)
    K_CODES: gl.constexpr = codes_per_byte(K_BITS)
    V_CODES: gl.constexpr = codes_per_byte(V_BITS)
    V_PIECES: gl.constexpr = V_DIM // V_CODES // 16
    N: gl.constexpr = total.shape[0]
    async_copy.wait_group(1)
    s = ()
    for m in gl.static_range(4):
        words, signs = key_words(shared, m, K_ROW, K_BITS)
        k = operands(words, signs, tables[0], K_ASM, K_BITS, is_paired(K_CODES), FIRST)
        x = gl.zeros([16, N], gl.float32, MMA)
        for t in gl.static_range(2 if is_paired(K_CODES) else K_CODES):
            x = mma_v2(k[t], q[t], x)
        s += (x,)
    k_scale, v_scale = read_scales(shared[2], TOKENS), read_scales(shared[3], TOKENS)
    copy_keys(shared, ptrs, left, K_ROW)
    s = gl.permute(gl.join(gl.join(s[0], s[1]), gl.join(s[2], s[3])), [3, 2, 0, 1])
    s = gl.convert_layout(gl.reshape(s, [TILE, N]), MMA, assert_trivial=True) * k_scale[:, None]
    if SOFTCAP != 0:  # of the whole score in base 2: from here on the factor is one
        s = s * q_scale[None, :] + mean_score[None, :]
        s = (1.0 - 2.0 / (1.0 + gl.exp2(s * (2.0 / SOFTCAP)))) * (SOFTCAP * LOG2_E)
        q_scale = gl.full([N], 1.0, gl.float32, gl.SliceLayout(0, MMA))
        mean_score = gl.zeros([N], gl.float32, gl.SliceLayout(0, MMA))

    low, high, filled, whole_from, whole_to = sees
    if PAGE > 0:
        s += gl.where(has_page, 0.0, float("nan"))
        filled, whole_to = gl.where(has_page, filled, start), gl.where(has_page, whole_to, start)
    if (start < whole_from) | (start + TILE > whole_to):
        here = start + place_byte(gl.arange(0, TILE, layout=TOKENS), 16)
        inside = (here[:, None] >= low[None, :]) & (here[:, None] < high[None, :])
        if HAS_MASK:
            let_through = gl.load(mask[0] + here.to(gl.int64) * mask[1], mask=here < end, other=0) != 0
            inside = inside & let_through[:, None]
        s = gl.where(inside, s, float("-inf"))
        v_scale = gl.where(here < gl.minimum(filled, end), v_scale, 0.0)
    new_peak = gl.maximum(peak, gl.max(s, axis=0) * q_scale + mean_score)
    origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = gl.exp2(peak - origin)
    shift = origin - mean_score - WEIGHT_BITS
    weights = gl.exp2(s * q_scale[None, :] - shift[None, :])
    total = total * decay + gl.sum(weights, axis=0)
    peak = new_peak
    new_largest = gl.maximum(largest, gl.max(gl.abs(v_scale), axis=0))
    unit = 1.0 / new_largest
    decay = (decay * (largest * unit))[None, :]
    largest = new_largest
    p = (weights * (v_scale * unit)[:, None]).to(gl.float16)
    p = gl.inline_asm_elementwise(TRANSPOSE, "=r,r", [p], gl.float16, True, 2)
    p = gl.permute(gl.reshape(p, [8, 8, N // 8, 8]), [0, 3, 2, 1])  # [block, token, column, row]
    p = gl.convert_layout(gl.reshape(p, [TILE, N]), SECOND, assert_trivial=True)
    if V_BITS == 8:
        written = written_bytes(filled - start)
    async_copy.wait_group(1)
    new_acc = ()
    for m in gl.static_range(V_PIECES):
        words = shared[1].index(m).load(value_layout())
        if V_BITS == 8:
            words &= written
        signs = words
        if V_BITS == 3:  # of dims 16m.. at bits m // (V_DIM / 128) + 2t
            signs = shared[1].index(V_PIECES + m % (V_DIM // 128)).load(value_layout())
            signs = (signs.to(gl.uint32) >> (m // (V_DIM // 128))).to(gl.int32)
            signs = gl.permute(gl.reshape(signs, [4, 2, 8, 4]), [1, 2, 0, 3])
        words = gl.permute(gl.reshape(words, [4, 2, 8, 4]), [1, 2, 0, 3])
        v = operands(words, signs if V_BITS == 3 else words, tables[1], V_ASM, V_BITS, False, FIRST)
        for t in gl.static_range(V_CODES):
            new_acc += (mma_v2(v[t], p, acc[m * V_CODES + t] * decay),)
    copy_values(shared[1], ptrs[1], left, V_ROW)
    return new_acc, total, peak, largest


@gluon.jit
def warp_split_kernel(
    q_ptr, q_scale_ptr, mean_ptr, cache_ptr, seq_lens_ptr, exact_from_ptr, bounds_ptr, mask_ptr,
    table_ptr, partial_ptr, log_ptr, table_stride_b, table_stride_n, cache_stride_b, cache_stride_h,
    lens_stride, from_stride, bounds_stride_b, bounds_stride_t, mask_stride_b, mask_stride_n,
    v_rows_offset, k_scales_offset, v_scales_offset, rows, segments, q_len, max_len, splits, raw_q_ptr,
    k_ptr, v_ptr, exact_ptr, exact_out_ptr, exact_log_ptr, q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, scale, exact_runs,
    HAS_NEW: gl.constexpr, TOKENS: gl.constexpr, K_BITS: gl.constexpr,
    V_BITS: gl.constexpr, K_LO: gl.constexpr, V_LO: gl.constexpr, K_ASM: gl.constexpr,
    V_ASM: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr, HEADS: gl.constexpr,
    SINKS: gl.constexpr, RECENT: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_MASK: gl.constexpr,
    HAS_MEAN: gl.constexpr, SOFTCAP: gl.constexpr, PAGE: gl.constexpr, N: gl.constexpr,
    SCALE_BUFFERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    K_ROW: gl.constexpr = K_DIM * K_BITS // 8  # bytes
    V_ROW: gl.constexpr = V_DIM * V_BITS // 8
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    K_PLANE: gl.constexpr = K_DIM // codes_per_byte(K_BITS)  # without signs, if these are separate
    V_PLANE: gl.constexpr = V_DIM // codes_per_byte(V_BITS)
    K_PLACE: gl.constexpr = place_of_row(K_ROW)
    K_WORDS: gl.constexpr = words_of_row(4 * K_PLACE)  # of a row of a piece in shared memory
    # Swizzled: of 8 lanes that read 16 bytes, two have neighbouring rows and four distant ones.
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    # Of keys of 3 bits and 128 dims they read a word each: four lanes the same 16 bytes, of eight rows.
    SWIZZLED_KEYS: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0]) if K_BITS == 3 else SWIZZLED
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])

    if TOKENS > 0:  # the runs over exact tokens, first in the last dimension, are the first to start
        kv_head, batch, run = gl.program_id(0).to(gl.int64), gl.program_id(1).to(gl.int64), gl.program_id(2)
        group = batch * gl.num_programs(0) + kv_head
        if run < exact_runs:
            attend_to_exact(
                run, batch, kv_head, group, raw_q_ptr, k_ptr, v_ptr, exact_ptr, exact_out_ptr,
                exact_log_ptr, exact_from_ptr, seq_lens_ptr, bounds_ptr, mask_ptr, q_stride_b, q_stride_h,
                q_stride_t, q_stride_d, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h,
                v_stride_t, lens_stride, from_stride, bounds_stride_b, bounds_stride_t, mask_stride_b,
                mask_stride_n, rows, q_len, max_len, scale, HAS_NEW, HAS_BOUNDS, HAS_MASK, SOFTCAP, SINKS,
                RECENT, K_DIM, V_DIM, HEADS, TOKENS,
            )  # fmt: skip
            return
        run -= exact_runs
    else:
        run, kv_head, batch = gl.program_id(0), gl.program_id(1).to(gl.int64), gl.program_id(2).to(gl.int64)
        group = batch * gl.num_programs(1) + kv_head
    split = run % splits

    # A query row sees slots low .. high - 1.
    row = run // splits * N + gl.arange(0, N, layout=COLUMNS)
    valid = row < rows
    token = row // HEADS
    seq_len = gl.load(seq_lens_ptr + batch * lens_stride)
    if HAS_BOUNDS:
        bounds_ptr += batch * bounds_stride_b + token * bounds_stride_t
        low = gl.maximum(gl.load(bounds_ptr, mask=valid, other=0), 0)
        high = gl.minimum(gl.load(bounds_ptr + 1, mask=valid, other=0), max_len)
    else:
        low = token * 0
        high = gl.minimum(seq_len - q_len + token + 1, max_len).to(gl.int32)
    filled = gl.minimum(seq_len, max_len).to(gl.int32)
    high = gl.minimum(high, filled)
    seen = valid & (low < high)
    WHOLE: gl.constexpr = TILE if PAGE > 0 else 16  # a tile is in one page
    begin = gl.min(gl.where(seen, low, max_len), axis=0)
    if HAS_MEAN:  # and in one segment; where such an alignment shows, the loop has 40 instructions more
        begin -= begin % TILE
    begin = begin // WHOLE * WHOLE
    end = gl.max(gl.where(seen, high, 0), axis=0)
    share = gl.cdiv(gl.cdiv(end - begin, TILE), splits) * TILE
    first = begin + split * share
    end = gl.minimum(first + share, end)

    part = (group * rows + row) * splits + split
    # Until it waits, a program that started early may read what the launch before does not write: not
    # the runs of 16 tokens (scales are read through the first-level cache) that have new ones.
    if PDL and (first >= end) | (end > (seq_len - q_len) // 16 * 16):
        gl.inline_asm_elementwise(WAIT, "=r", [], gl.int32, False, 1)
    if first >= end:
        gl.store(log_ptr + part, gl.full([N], float("-inf"), gl.float32, COLUMNS), mask=valid)
        return

    offsets = (v_rows_offset, k_scales_offset, v_scales_offset)
    cache_ptr += kv_head * cache_stride_h
    if PAGE > 0:
        table_ptr += batch * table_stride_b
        table = (table_ptr, table_stride_n, cache_ptr, cache_stride_b)
        page, slot, left, has_page = find_page(table, first, end, PAGE)
        ptrs = tile_pointers(page, offsets, slot, K_ROW, V_ROW)
    else:
        page, left, has_page = cache_ptr + batch * cache_stride_b, end - first, True
        ptrs = tile_pointers(page, offsets, first, K_ROW, V_ROW)
    keys = gl.allocate_shared_memory(gl.int32, [4, 4 * K_PLACE // K_WORDS, K_WORDS], SWIZZLED_KEYS)
    values = gl.allocate_shared_memory(gl.int32, [V_ROW // 16, 8, 32], SWIZZLED)
    k_scales = gl.allocate_shared_memory(gl.bfloat16, [SCALE_BUFFERS, 4, 8, 2], PLAIN).index(0)
    v_scales = gl.allocate_shared_memory(gl.bfloat16, [4, 8, 2], PLAIN)
    shared = (keys, values, k_scales, v_scales)
    copy_keys(shared, ptrs, left, K_ROW)
    copy_values(values, ptrs[1], left, V_ROW)
    # All that a run needs is on its way before any of it is waited for.
    if HAS_MEAN:
        mean_ptr += group * segments * K_DIM
        raw_q_ptr += batch * q_stride_b + kv_head * HEADS * q_stride_h
        strides = (q_stride_h, q_stride_t, q_stride_d)
        raw_q = load_rows(raw_q_ptr, run // splits * N, rows, *strides, N, K_DIM, HEADS)
        means = load_means(mean_ptr, first // MEAN_OF, end, K_DIM)
    if SINKS + RECENT > 0:
        exact_from = gl.load(exact_from_ptr + batch * from_stride, cache_modifier=".cg")
    if PDL:
        gl.inline_asm_elementwise(WAIT, "=r", [], gl.int32, False, 1)
    q_scale = gl.load(q_scale_ptr + group * rows + row, mask=valid, other=1.0)
    q_ptr += group * rows * K_DIM
    PARTS: gl.constexpr = 2 if K_BITS == 3 else 1
    q = load_queries(q_ptr, run // splits * N, rows, K_DIM, N, K_PLANE, PARTS, SECOND)

    if SINKS + RECENT > 0:  # exact tokens are hidden in the tiles rather than left out of the range
        first_recent = first_recent_of(exact_from, seq_len, q_len if HAS_NEW else 0, RECENT)
        low = gl.maximum(low, SINKS)
        high = gl.minimum(high, gl.minimum(first_recent, max_len).to(gl.int32))
    # Tiles between these need no mask: every row sees all of them.
    whole_from = gl.max(gl.where(valid, low, 0), axis=0)
    whole_to = gl.min(gl.where(valid, high, filled), axis=0)
    if HAS_MASK:
        whole_from = gl.maximum(whole_from, gl.max(gl.load(bounds_ptr + 2, mask=valid, other=0), axis=0))
        whole_to = gl.minimum(whole_to, gl.min(gl.load(bounds_ptr + 3, mask=valid, other=filled), axis=0))

    k_table = gl.inline_asm_elementwise(OPAQUE, "=r,r", [gl.to_tensor(K_LO)], gl.int32, False, 1)
    v_table = k_table
    if V_LO != K_LO:
        v_table = gl.inline_asm_elementwise(OPAQUE, "=r,r", [gl.to_tensor(V_LO)], gl.int32, False, 1)

    tables, sees = (k_table, v_table), (low, high, filled, whole_from, whole_to)
    mask = (mask_ptr + batch * mask_stride_b, mask_stride_n)
    mean_score = gl.zeros([N], gl.float32, COLUMNS)
    if HAS_MEAN:
        scores = score_means(means, mean_ptr, raw_q, first // MEAN_OF, end, scale, K_DIM, N, MMA)

    # [16 values, row] each: of 16 byte columns, of each code of a byte.
    acc = (gl.zeros([16, N], gl.float32, MMA),) * (V_DIM // 16)
    total = gl.zeros([N], gl.float32, COLUMNS)
    peak = gl.full([N], float("-inf"), gl.float32, COLUMNS)
    largest = TINY  # value scale so far
    for start in range(first, end, TILE):
        here_has_page, left = has_page, end - start - TILE
        if PAGE > 0:
            page, slot, left, has_page = find_page(table, start + TILE, end, PAGE)
            ptrs = tile_pointers(page, offsets, slot, K_ROW, V_ROW)
        else:
            ptrs = tile_pointers(page, offsets, start + TILE, K_ROW, V_ROW)
        if HAS_MEAN:
            mean_score = scores.index(start // MEAN_OF - first // MEAN_OF).load(COLUMNS)
        acc, total, peak, largest = attend_tile(
            acc, total, peak, largest, mean_score, q, q_scale, tables, shared, ptrs, left, sees, mask,
            here_has_page, start, end, PAGE, SOFTCAP, K_BITS, V_BITS, K_ASM, V_ASM, K_ROW, V_ROW, K_PLANE,
            V_DIM, HAS_MASK, MMA,
        )  # fmt: skip
    async_copy.wait_group(0)
    if PDL:
        gl.inline_asm_elementwise(LAUNCH_NEXT, "=r", [], gl.int32, False, 1)

    gl.store(log_ptr + part, peak + gl.log2(total) - WEIGHT_BITS, mask=valid)
    scale = (largest / gl.where(total == 0.0, 1.0, total))[None, :]
    value = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))[:, None]
    out_ptr = partial_ptr + part[None, :] * V_DIM + value
    CODES: gl.constexpr = codes_per_byte(V_BITS)
    acc = hadamard(acc, V_DIM // 16)
    for m in gl.static_range(V_PLANE // 16):
        for t in gl.static_range(CODES):
            x = acc[m * CODES + t] * scale
            gl.store(out_ptr + (t * V_PLANE + m * 16), x, mask=valid[None, :] & (value >= 0))


def takes(
    q: torch.Tensor, fmt: KVFormat, kv_heads: int, attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None, page: int, beside: Beside,
) -> bool:  # fmt: skip
    """Whether this kernel attends for q `[B, H, q, D]`: without a mask, or with one over keys.

    Over pages of `page` tokens; 0: no pages.
    """
    return (
        (attn_mask is None or (has_whole(bounds, KEY_MASK.value) and is_key_mask(attn_mask)))
        and page % TILE.value == 0
        and not fmt.is_lossless
        and {fmt.head_dim, fmt.v_head_dim} <= {64, 128, 256}
        # Of these the signs are half a piece.
        and (3, 64) not in ((fmt.k_bits, fmt.head_dim), (fmt.v_bits, fmt.v_head_dim))
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] * q.shape[1] // kv_heads <= MOST_ROWS
        and (beside.k_mean is None or beside.k_mean.dtype == q.dtype)
        and q.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(q.device) >= (8, 9)  # has the conversion from fp8
    )


def warp_split(
    queries: Queries,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    q_len: int,
    fmt: KVFormat,
    max_len: int,
    sms: int,
    work: ExactWork,
    beside: Beside = NOTHING,
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial outputs [B, Hkv, row, split, Dv], Hadamard-transformed, and logarithms of their weights.

    The arguments are `reference.decode`'s; `sms` multiprocessors share the work.
    """
    q, factors = queries
    batch, kv_heads, rows, dim = q.shape
    dv = fmt.v_head_dim
    columns = 8 if rows <= 8 or max(dim, dv) > 128 else 16
    blocks = triton.cdiv(rows, columns)
    groups, tiles = batch * kv_heads * blocks, triton.cdiv(max_len, TILE.value)
    others = batch * kv_heads * work.runs
    key_row = dim * fmt.k_bits // 8
    longest, shared = tiles, TILE.value * (fmt.slot_bytes - key_row + place_of_row(key_row))
    if beside.k_mean is not None:  # whose scores have room for so many
        longest = MOST_TILES
        shared += MOST_SEGMENTS * columns * 4
    splits, spare = share(groups, tiles, others, longest, shared, sms, q.device)
    partial = torch.empty((batch, kv_heads, rows, splits, dv), dtype=torch.float32, device=q.device)
    logs = torch.empty((batch, kv_heads, rows, splits), dtype=torch.float32, device=q.device)
    offsets = [plane.offset for plane in fmt.planes(fmt.page_size(cache.shape[-1]))[1:]]
    k_asm = unpack_asm(fmt.k_bits, is_paired(codes_per_byte(fmt.k_bits)))
    exact_from, table = beside.exact_from, table_arguments(block_table, seq_lens)
    _, mask, (mask_stride_b, _, _, mask_stride_n) = mask_arguments(attn_mask, q, max_len)
    grid = (splits * blocks, kv_heads, batch)
    if work.runs:
        grid = (kv_heads, batch, work.runs + splits * blocks)
    warp_split_kernel[grid](
        q, factors, q if beside.k_mean is None else beside.k_mean, cache, seq_lens,
        seq_lens if exact_from is None else exact_from, q if bounds is None else bounds, mask, table[0],
        partial, logs, *table[1:], *cache.stride()[:2], seq_lens.expand(batch).stride(0),
        0 if exact_from is None else exact_from.expand(batch).stride(0),
        *((0, 0) if bounds is None else bounds.stride()[:2]), mask_stride_b, mask_stride_n, *offsets, rows,
        beside.segments, q_len, max_len, splits, *work.arguments, **work.constants,
        K_BITS=fmt.k_bits, V_BITS=fmt.v_bits, K_LO=lookup_words(fmt.k_bits)[0],
        V_LO=lookup_words(fmt.v_bits)[0], K_ASM=k_asm, V_ASM=unpack_asm(fmt.v_bits),
        K_DIM=dim, V_DIM=dv, HEADS=rows // q_len, SINKS=beside.sink_tokens, RECENT=beside.recent_tokens,
        HAS_BOUNDS=bounds is not None, HAS_MASK=attn_mask is not None, HAS_MEAN=beside.k_mean is not None,
        SOFTCAP=softcap or 0.0, PAGE=tokens_of_page(cache, fmt, block_table), N=columns,
        SCALE_BUFFERS=1 + spare // (2 * TILE.value), num_warps=1, maxnreg=REGISTERS,
        **early_launch(q.device),
    )  # fmt: skip
    return partial, logs


def attend_by_warps(
    out: torch.Tensor,
    q: torch.Tensor,
    queries: Queries,
    work: ExactWork,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    v_rotation: torch.Tensor,
    attn_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    sinks: torch.Tensor | None,
    fmt: KVFormat,
    max_len: int,
    scale: float,
    beside: Beside,
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Fill `out` `[B, H, q, Dv]`, and `lse` if given, for q `[B, H, q, D]`, which `queries` are rotated.

    `work` is `exact_work`'s of q. `bounds` has a row for each row of the batch and each query.
    """
    heads, kv_heads, dv = q.shape[1], cache.shape[1], fmt.v_head_dim
    parts = work.parts
    if parts is None:
        visible = (attn_mask, bounds, max_len, scale, softcap)
        parts = attend_unpacked(q, None, beside, seq_lens, *visible, kv_heads, dv)
    partial, logs = warp_split(
        queries, cache, seq_lens, attn_mask, bounds, q.shape[2], fmt, max_len, sm_count(out.device), work,
        beside, softcap, block_table,
    )  # fmt: skip
    reduce_splits(
        out, partial, logs, seq_lens, v_rotation, attn_mask, bounds, sinks, heads // kv_heads, max_len, lse,
        parts, transformed=True,
    )  # fmt: skip
