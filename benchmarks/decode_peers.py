"""Decode attention over full 16-bit and fp8 caches by what else there is, for `bench_decode`.

FlashInfer compiles its kernels at the first call, for up to a minute each; it keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec

import torch
from evidence import replay_times

from tq_inductor import KVFormat, attention_backends

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
COLD_BYTES = 256 << 20  # of caches that are read in turn: more than the L2 cache holds
OURS = ("triton", "turboquant", "sdpa")
PAGE = 16
WORKSPACE_BYTES = 128 << 20


def time_peers(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, object]:
    """Times of one new token's attention over full caches by each peer here; why not, for the others."""
    q = torch.randn(batch, heads, 1, head_dim, dtype=torch.bfloat16, device="cuda")
    nbytes = KVFormat("bf16", head_dim).cache_bytes(batch, kv_heads, length)
    kvs = [
        torch.randn(2, batch, kv_heads, length, head_dim, dtype=torch.bfloat16, device="cuda")
        for _ in range(-(-COLD_BYTES // nbytes))
    ]
    found: dict[str, object] = {}
    for name, availability in attention_backends().items():
        if name in OURS or name == "flashinfer":
            continue
        if not availability.available:
            found[name] = "; ".join(availability.reasons)
            continue
        attend = by_name(name, head_dim**-0.5)
        found[name] = replay_times([lambda kv=kv, attend=attend: attend(q, kv[0], kv[1]) for kv in kvs])
    if find_spec("flashinfer") is None:
        return {**found, "flashinfer": "not installed"}
    query = q[:, :, 0]
    for label, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        run = flashinfer_decode(batch, length, heads, kv_heads, head_dim, dtype)
        pages = [kv.to(dtype).view(2, -1, kv_heads, PAGE, head_dim) for kv in kvs]
        calls = [lambda kv=kv, run=run: run(query, (kv[0], kv[1])) for kv in pages]
        name = f"flashinfer {metadata.version('flashinfer-python')}, {label}"
        found[name] = replay_times(calls)
    return found


def by_name(name: str, scale: float) -> Attend:
    """Attention over all keys by the attention backend `name`."""
    dense = torch.ops.tq_inductor.dense_attn
    return lambda q, k, v: dense(q, k, v, None, None, None, "equal", -1, -1, None, scale, name)


def flashinfer_decode(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Callable[..., torch.Tensor]:
    """FlashInfer's decode over pages of 16 tokens, planned for full caches of `dtype`."""
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        float_workspace_buffer=torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"),
        kv_layout="HND",
        use_tensor_cores=True,
    )
    pages = length // PAGE
    wrapper.plan(
        indptr=torch.arange(batch + 1, dtype=torch.int32) * pages,
        indices=torch.arange(batch * pages, dtype=torch.int32, device="cuda"),
        last_page_len=torch.full((batch,), PAGE, dtype=torch.int32),
        num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=PAGE,
        q_data_type=torch.bfloat16, kv_data_type=dtype,
    )  # fmt: skip
    return wrapper.run  # type: ignore[no-any-return]
