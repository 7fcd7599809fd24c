"""Attention of one query row over the exact tokens of its KV head, by one warp.

The programs of `decode_warp` share the rows of their KV head before they read packed tokens; a program for
each would make others wait for its place. `decode_reduce` has the kernel for other GPUs, and joins what
either leaves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def lanes_of(dim: int):
    """Lanes take 8 values of a key (or value) each, 16 bytes."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [1, 1], [1, 0])


@gluon.jit
def locate_exact(i, first_recent, low, high, SINKS: gl.constexpr, RECENT: gl.constexpr):
    """Of the exact tokens with index `i`: slot, and which exist within `low` .. `high` - 1."""
    PERIOD: gl.constexpr = RECENT if RECENT > 0 else 1
    position = gl.where(i < SINKS, i, first_recent + i - SINKS)
    slot = gl.where(i < SINKS, i, SINKS + (position - SINKS) % PERIOD)
    return slot, (i < SINKS + RECENT) & (position >= low) & (position < high)


@gluon.jit
def attend_exact(
    q_ptr, seq_lens_ptr, exact_ptr, exact_from_ptr, bounds_ptr, partial_ptr, log_ptr, lens_stride,
    from_stride, q_stride_b, q_stride_h, q_stride_t, q_stride_d, bounds_stride_b, bounds_stride_t, row,
    rows, q_len, max_len, splits, scale, HEADS: gl.constexpr, HAS_BOUNDS: gl.constexpr,
    SINKS: gl.constexpr, RECENT: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr,
):  # fmt: skip
    """The partial of one of the `rows` query rows of this KV head, not rotated; it has `splits` others."""
    LOG2_E: gl.constexpr = 1.4426950408889634
    KEYS: gl.constexpr = lanes_of(K_DIM)
    VALUES: gl.constexpr = lanes_of(V_DIM)
    WIDTH: gl.constexpr = K_DIM + V_DIM
    # 64 values a lane.
    TOKENS: gl.constexpr = 2048 // (K_DIM if K_DIM > V_DIM else V_DIM)
    k_dim = gl.arange(0, K_DIM, layout=gl.SliceLayout(0, KEYS))
    v_dim = gl.arange(0, V_DIM, layout=gl.SliceLayout(0, VALUES))
    k_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, KEYS))
    v_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, VALUES))

    kv_head, batch = gl.program_id(1).to(gl.int64), gl.program_id(2).to(gl.int64)
    group, token = batch * gl.num_programs(1) + kv_head, row // HEADS
    q_ptr += batch * q_stride_b + (kv_head * HEADS + row % HEADS) * q_stride_h + token * q_stride_t
    q = gl.load(q_ptr + k_dim * q_stride_d).to(gl.float32) * (scale * LOG2_E)
    exact_ptr += group * ((SINKS + RECENT) * WIDTH)
    seq_len = gl.load(seq_lens_ptr + batch * lens_stride)
    low, high = 0, gl.minimum(seq_len, max_len).to(gl.int32)
    if HAS_BOUNDS:
        bounds_ptr += batch * bounds_stride_b + token * bounds_stride_t
        low, high = gl.load(bounds_ptr), gl.minimum(gl.load(bounds_ptr + 1), high)
    else:
        high = gl.minimum((seq_len - q_len + token + 1).to(gl.int32), high)
    first_recent = gl.maximum(gl.load(exact_from_ptr + batch * from_stride), seq_len - RECENT)
    first_recent = gl.maximum(gl.minimum(first_recent, max_len), SINKS).to(gl.int32)

    out = gl.zeros([V_DIM], gl.float32, gl.SliceLayout(0, VALUES))
    peak, total = float("-inf"), 0.0
    for start in range(0, SINKS + RECENT, TOKENS):
        slot, exists = locate_exact(start + k_token, first_recent, low, high, SINKS, RECENT)
        mask = exists[:, None] & (k_dim >= 0)[None, :]
        k = gl.load(exact_ptr + slot[:, None] * WIDTH + k_dim[None, :], mask=mask, other=0.0)
        slot, seen = locate_exact(start + v_token, first_recent, low, high, SINKS, RECENT)
        mask = seen[:, None] & (v_dim >= 0)[None, :]
        v = gl.load(exact_ptr + K_DIM + slot[:, None] * WIDTH + v_dim[None, :], mask=mask, other=0.0)
        scores = gl.sum(k.to(gl.float32) * q[None, :], axis=1)
        scores = gl.where(exists, scores, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(scores, axis=0))
        origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights, decay = gl.exp2(scores - origin), gl.exp2(peak - origin)
        total = total * decay + gl.sum(weights, axis=0)
        weights = gl.convert_layout(weights, gl.SliceLayout(1, VALUES))
        out = out * decay + gl.sum(v.to(gl.float32) * weights[:, None], axis=0)
        peak = new_peak
    part = (group * rows + row) * (splits + 1) + splits
    gl.store(partial_ptr + part * V_DIM + v_dim, out / gl.where(total == 0.0, 1.0, total))
    gl.store(log_ptr + part, peak + gl.log2(total))
