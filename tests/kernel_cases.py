"""The shapes and values with which kernels are tested: `kernel_checks` says how.

Lists that end in `INTERPRETED` are for a CPU, those that end in `GPU` are longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tq_inductor.format import KVFormat, format_names

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One set of shapes. `lens` are the tokens in each row, one of them: a 0-d `seq_lens`.

    mask: none, bool, left (left padding, past the length too), float, row (an almost empty one), keys (left
        padding, over keys), holes (the same, with gaps in all rows but the first).
    bounds: none, window (past the end too; one query sees nothing), row (the same for all queries), shared
        (by the rows of the batch too), scan (from the first to the last key of the mask, causal, and where
        it has no gap).
    keys: random, huge (one key is eight times as long), equal (one key at all places), heavy (norms of keys
        and values over some orders of magnitude).
    exact: sink and recent tokens kept as they came; with any, keys have a mean too.
    crop: tokens that were appended after the others, and taken back.
    page: tokens of a page, where there is a block table.
    hole: which page of the first row is missing.
    small_pieces: the workspace of a long chunk has as little room as can be.
    sms: how many multiprocessors share the work of `decode_warp`, for longer runs; 0: those of the GPU.
    """

    fmt: str = "k4v4"
    dim: int = 128
    v_dim: int = 0
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 1
    lens: tuple[int, ...] = (129, 1)
    max_len: int = 150
    mask: str = "none"
    dtype: torch.dtype = BF16
    bounds: str = "none"
    sinks: bool = False
    keys: str = "random"
    exact: tuple[int, int] = (0, 0)
    crop: int = 0
    softcap: float | None = None
    page: int = 0
    hole: int = -1
    small_pieces: bool = False
    sms: int = 0

    def __str__(self) -> str:
        dims = f"{self.dim}" + (f"x{self.v_dim}" if self.v_dim else "")
        lens = ",".join(map(str, self.lens))
        return (
            f"{self.fmt}-d{dims}-h{self.heads}:{self.kv_heads}-q{self.q_len}-len{lens}of{self.max_len}"
            f"-{self.mask}-{str(self.dtype)[6:]}"
            + (f"-{self.bounds}" if self.bounds != "none" else "")
            + ("-sinks" if self.sinks else "")
            + (f"-{self.keys}" if self.keys != "random" else "")
            + (f"-exact{self.exact[0]}+{self.exact[1]}" if any(self.exact) else "")
            + (f"-crop{self.crop}" if self.crop else "")
            + (f"-softcap{self.softcap}" if self.softcap else "")
            + (f"-page{self.page}" if self.page else "")
            + (f"-hole{self.hole}" if self.hole >= 0 else "")
            + ("-small" if self.small_pieces else "")
            + (f"-sms{self.sms}" if self.sms else "")
        )

    @property
    def format(self) -> KVFormat:
        return KVFormat(self.fmt, self.dim, self.v_dim or self.dim)

    @property
    def batch(self) -> int:
        return max(2, len(self.lens))


# The interpreter's bfloat16 truncates, and its bfloat16 dots are wrong: float16 and float32 there.
STORE_INTERPRETED = [
    # Segments that a few tokens start, that a chunk starts with enough and with too few of its own.
    Case("k4v3", 16, q_len=3, lens=(257, 513), max_len=600, dtype=FP32, exact=(2, 4)),
    Case("k2v2", 16, q_len=16, lens=(272, 16), max_len=300, dtype=FP16, exact=(2, 4), page=48, hole=5),
    Case("k3v2", 24, q_len=40, lens=(266, 520), max_len=518, dtype=FP32, exact=(2, 4)),
    Case("k4v4", 16, q_len=300, lens=(300, 530), max_len=530, dtype=FP16, exact=(2, 4)),
    Case("k4v3", 80, 64, q_len=20, lens=(33, 5), max_len=40, dtype=FP16),
    Case("k3v2", 8, 24, q_len=17, lens=(17,), max_len=17, dtype=FP32),
    Case("k4v3", 80, 64, q_len=20, lens=(33, 20), max_len=40, dtype=FP16, exact=(4, 8)),
    Case("k3v2", 8, 24, q_len=17, lens=(17,), max_len=17, dtype=FP32, exact=(0, 30)),
    Case("k2v4", 64, 32, q_len=3, lens=(150, 2), dtype=FP32, exact=(3, 2)),
    Case("k4v4", 64, q_len=1, lens=(9, 4), dtype=FP16, exact=(5, 0)),
    Case("k8v8", 64, 112, q_len=3, lens=(150, 2), dtype=FP32),
    Case("k2v4", 64, kv_heads=1, q_len=1, lens=(129, 1), dtype=FP32),
    Case("bf16", 20, 12, q_len=5, lens=(9, 3), max_len=16, dtype=BF16),
    Case("k4v3", 80, 64, q_len=40, lens=(53, 5), max_len=60, dtype=FP16, page=16, hole=2),
    Case("k3v2", 16, q_len=20, lens=(50, 20), max_len=48, dtype=FP32, exact=(4, 8), page=48, hole=0),
    Case("bf16", 20, 12, q_len=5, lens=(37, 3), max_len=40, dtype=BF16, page=32, hole=1),
]
DEQUANTIZE_INTERPRETED = [
    Case("k4v3", 16, 24, lens=(600, 257), max_len=610, dtype=FP32, exact=(2, 4)),
    Case("k3v4", 24, lens=(513, 90), max_len=520, dtype=FP16, exact=(2, 4), page=48, hole=5),
    Case("k4v3", 80, 64, lens=(33, 0), max_len=50, dtype=FP32),
    Case("k3v2", 24, 8, lens=(17,), max_len=33, dtype=FP16),
    Case("k8v4", 16, 160, lens=(1, 35), max_len=36, dtype=FP32),
    Case("fp16", 20, 12, lens=(9, 40), max_len=40, dtype=FP16),
    Case("k2v3", 16, lens=(20, 50), max_len=40, dtype=FP32),  # the second row is overfull
    Case("k2v3", 16, lens=(20, 50), max_len=40, dtype=FP32, exact=(3, 5)),
    Case("k4v4", 24, 40, lens=(70, 2), max_len=90, dtype=FP16, exact=(4, 8), crop=3),
    Case("fp16", 16, lens=(20, 50), max_len=40, dtype=FP16),
    Case("k4v3", 80, 64, lens=(53, 0), max_len=60, dtype=FP32, page=16, hole=1),
    Case("k2v3", 16, lens=(90, 20), max_len=96, dtype=FP32, exact=(3, 5), crop=2, page=48, hole=0),
    Case("fp16", 20, 12, lens=(33, 80), max_len=70, dtype=FP16, page=32, hole=0),
    Case("k4v4", 24, 40, q_len=33, lens=(40, 20), max_len=50, dtype=FP16, exact=(4, 8)),
    Case("k2v3", 16, q_len=17, lens=(20, 50), max_len=40, dtype=FP32),  # the second row is overfull
    Case("k4v2", 32, 128, lens=(131, 60), max_len=200, dtype=FP16),
    Case("k3v4", 256, 64, lens=(70, 3), max_len=90, dtype=FP32, exact=(4, 8)),
    Case("k2v8", 512, 256, lens=(70, 3), max_len=80, dtype=FP32),
    Case("k8v3", 96, 512, lens=(65, 3), max_len=80, dtype=FP32, page=16, hole=2),
    Case("k4v8", 128, 64, kv_heads=1, lens=(150, 70), max_len=140, dtype=FP32, page=48, hole=0),
]
DECODE_INTERPRETED = [
    Case("k4v4", 16, heads=6, q_len=3, lens=(600, 257), max_len=610, dtype=FP16, exact=(2, 4)),
    Case("k3v2", 80, lens=(513, 90), max_len=520, dtype=FP32, exact=(2, 4), softcap=3.0, page=48, hole=5),
    Case("k4v4", 80, heads=7, kv_heads=1, lens=(129, 1), dtype=FP16),
    Case("k3v2", 64, 80, q_len=5, lens=(3, 70), max_len=80, dtype=FP16),
    Case("k8v3", 576, 512, heads=3, kv_heads=1, lens=(33, 0), max_len=40, mask="float", dtype=FP16),
    Case("k2v8", 16, q_len=3, lens=(40,), max_len=150, mask="left", dtype=FP16),
    Case("k4v8", 24, 8, q_len=2, lens=(50,), max_len=60, mask="bool", dtype=FP32),
    Case("k4v4", 80, q_len=4, lens=(40, 2), max_len=50, dtype=FP32),
    Case("k4v4", 16, heads=6, q_len=2, lens=(50, 20), max_len=40, dtype=FP32),  # the first is overfull
    Case("fp16", 48, 64, q_len=2, lens=(129, 1), dtype=FP16),
    Case("bf16", 20, lens=(60,), max_len=150, mask="row", dtype=FP32),
    Case("k4v4", 16, q_len=3, lens=(100, 40), bounds="window", sinks=True, dtype=FP16),
    Case("k3v4", 32, 16, q_len=2, lens=(140, 140), mask="bool", bounds="row", dtype=FP32),
    Case("k3v4", 16, q_len=2, lens=(100, 90), bounds="shared", dtype=FP16),
    Case("k4v4", 80, heads=7, kv_heads=1, lens=(129, 1), dtype=FP16, exact=(4, 32)),
    Case("k3v2", 64, 80, q_len=5, lens=(20, 70), max_len=80, dtype=FP32, exact=(0, 3), crop=2),
    Case("k8v3", 576, 512, heads=3, kv_heads=1, lens=(33, 0), mask="float", dtype=FP16, exact=(2, 130)),
    Case("k4v4", 16, q_len=3, lens=(90, 40), bounds="window", sinks=True, dtype=FP32, exact=(9, 7), crop=4),
    Case("k4v8", 24, 8, q_len=2, lens=(50,), max_len=60, mask="bool", dtype=FP32, exact=(60, 0)),
    Case("k2v2", 16, q_len=2, lens=(90, 33), mask="left", dtype=FP32, exact=(4, 16), crop=9),
    Case("k4v4", 16, heads=6, q_len=2, lens=(50, 20), max_len=40, dtype=FP32, exact=(4, 8)),  # overfull
    Case("k4v4", 32, q_len=2, lens=(70, 99), mask="bool", bounds="row", dtype=FP32, exact=(1, 20), crop=30),
    Case("k4v4", 16, q_len=2, lens=(140, 90), mask="keys", bounds="scan", dtype=FP32),
    Case("k2v3", 16, lens=(140, 90), mask="holes", bounds="scan", dtype=FP16, exact=(2, 20)),
    Case("k4v4", 16, lens=(140, 90), mask="holes", bounds="scan", dtype=FP32, softcap=3.0, page=32, hole=1),
    Case("k4v4", 80, q_len=2, lens=(140, 9), mask="bool", sinks=True, dtype=FP16, softcap=3.0),
    Case(
        "k3v2", 16, q_len=3, lens=(90, 40), bounds="window", dtype=FP32, exact=(9, 7), crop=4, softcap=2.0
    ),
    Case("fp16", 48, q_len=2, lens=(129, 1), mask="left", dtype=FP32, softcap=5.0),
    Case("k4v4", 80, heads=7, kv_heads=1, lens=(129, 1), dtype=FP16, page=16),
    Case("k3v2", 64, 80, q_len=5, lens=(3, 70), max_len=80, dtype=FP16, page=48),
    Case("k8v8", 16, q_len=2, lens=(140, 140), dtype=FP32, mask="bool", bounds="row", page=64, hole=1),
    Case("k4v4", 16, q_len=3, lens=(100, 90), bounds="window", sinks=True, dtype=FP32, page=32, hole=0),
    Case(
        "k2v2", 16, q_len=2, lens=(90, 33), mask="left", dtype=FP32, exact=(4, 16), crop=9, page=16, hole=5
    ),
    Case("fp16", 48, 64, q_len=2, lens=(129, 1), dtype=FP16, page=80),
    Case("bf16", 20, q_len=2, lens=(60, 170), mask="float", dtype=FP32, page=16, hole=1),  # overfull
    Case("k4v3", 64, 128, 1, 1, q_len=18, lens=(129, 20), mask="bool", dtype=FP16, exact=(4, 8)),
]
ATTEND_INTERPRETED = [
    Case("", 20, 36, q_len=3, max_len=200, bounds="row", dtype=FP32),
    Case("", 64, q_len=4, max_len=300, bounds="window", sinks=True, dtype=FP16),
    Case("", 16, q_len=2, max_len=100, bounds="shared", dtype=FP16),
    Case("", 80, 16, heads=7, kv_heads=1, q_len=2, max_len=200, mask="bool", bounds="row", dtype=FP32),
    Case("", 16, q_len=1, max_len=90, mask="float", dtype=FP32),
    Case("", 16, q_len=2, lens=(200, 90), max_len=200, mask="holes", bounds="scan", dtype=FP32),
    Case("", 24, 40, heads=6, q_len=20, max_len=60, bounds="window", dtype=FP16),  # one split
    Case("", 24, q_len=2, max_len=90, mask="float", bounds="row", sinks=True, dtype=FP32, softcap=2.0),
    Case(
        "",
        16,
        heads=2,
        kv_heads=1,
        q_len=40,
        lens=(90, 41),
        max_len=99,
        mask="left",
        bounds="scan",
        dtype=FP32,
    ),
    Case("", 16, heads=2, kv_heads=1, q_len=5, max_len=150, mask="bool", bounds="row", dtype=FP16),
]

_DTYPES = (BF16, FP16, FP32)
_PAIRS = [name for name in format_names() if name.startswith("k")]
PROMPT_GPU = [  # `store_prompt`; groups of 16 that others share, before the row and past the page too
    *(
        Case(name, dim, v_dim, q_len=q, lens=lens, max_len=lens[0], exact=exact, dtype=dtype)
        for name, dim, v_dim in (
            ("k4v4", 128, 128),
            ("k3v2", 128, 128),
            ("k4v3", 64, 128),
            ("k2v4", 128, 64),
            ("k8v4", 128, 128),
            ("k3v8", 128, 64),
            ("k8v8", 64, 128),
        )
        for q, lens, exact, dtype in (
            (64, (64, 1000, 71), (0, 0), BF16),
            (200, (333, 170, 340, 200), (4, 32), FP16),
            (1500, (1500, 2000, 1496), (300, 9), BF16),
        )
    ),
    Case("k4v4", q_len=70, lens=(80,), max_len=80, exact=(0, 5)),
    Case("k4v4", q_len=4096, kv_heads=8, lens=(4096, 4100, 5000), max_len=5000, exact=(4, 0)),
]
STORE_GPU = [
    *STORE_INTERPRETED,
    *PROMPT_GPU,
    *(Case(name, 128, q_len=q, lens=(300, 17, 1), max_len=320) for name in _PAIRS for q in (1, 33)),
    *(Case("k4v4", dim, q_len=40, lens=(90, 7), dtype=FP32) for dim in (16, 96, 192, 256, 576, 1024)),
    *(Case("k3v3", dim, 64, q_len=40, lens=(90, 7)) for dim in (80, 112, 512)),
    *(Case(name, 128, q_len=9, dtype=dtype) for name in ("bf16", "fp16") for dtype in _DTYPES),
    *(Case("k4v4", 128, q_len=q, lens=(q, q, 2000), max_len=2000, exact=(4, 32)) for q in (1, 16, 1500)),
    *(
        Case(name, 128, q_len=q, lens=(1000, 17, 1), max_len=1000, page=page, hole=0)
        for name in ("k4v4", "k3v3", "k8v8", "bf16")
        for q, page in ((1, 16), (300, 64), (300, 144))
    ),
]
DEQUANTIZE_GPU = [
    *DEQUANTIZE_INTERPRETED,
    *(Case(name, 128, lens=(300, 17, 0), max_len=320) for name in _PAIRS[::3]),
    *(Case("k4v4", dim, 128, lens=(90, 7), dtype=FP32) for dim in (16, 96, 192, 576, 1024)),
    *(Case(name, 80, 64, dtype=dtype) for name in ("k3v2", "bf16") for dtype in _DTYPES),
    Case("k4v4", 128, lens=(300, 17, 0), max_len=320, exact=(4, 32), crop=5),
    *(
        Case(name, dim, lens=(1500, 64, 129), max_len=1600, exact=(4, 32), dtype=dtype)
        for name, dim in (("k3v8", 32), ("k4v3", 64), ("k8v2", 256), ("k4v8", 512), ("k3v4", 96))
        for dtype in _DTYPES
    ),
    *(
        Case(name, 128, lens=(300, 17, 0), max_len=320, page=page, hole=1)
        for name in ("k4v4", "k3v2", "k8v8", "bf16")
        for page in (16, 64, 144)
    ),
]
DECODE_GPU = [
    *DECODE_INTERPRETED,
    *(Case(name, 128, heads=8, lens=(1030, 1), max_len=1500) for name in format_names()),
    *(Case(name, 64, heads=14, lens=(1030, 129), max_len=1500) for name in ("k4v4", "k3v3", "bf16")),
    *(Case("k4v4", dim, q_len=3, lens=(400, 33), max_len=450) for dim in (80, 96, 112, 192, 256)),
    *(Case(name, 512, 256, max_len=150) for name in ("k8v4", "bf16")),
    *(Case(name, 576, 512, 71, 1, lens=(129,), max_len=200) for name in ("k4v4", "bf16")),
    Case("k4v4", 1024, lens=(129, 40)),
    *(
        Case(name, 128, heads=14, q_len=q, lens=(900, 60), max_len=1000, mask=mask, dtype=dtype)
        for name, dtype in (("k4v4", BF16), ("k3v3", FP16), ("k4v4", FP32), ("bf16", BF16))
        for q, mask in ((1, "bool"), (5, "left"), (3, "float"), (1, "row"), (70, "none"), (70, "bool"))
    ),
    Case("fp16", 128, q_len=2, dtype=FP32),
    Case("bf16", 128, q_len=2, dtype=FP16),
    Case("bf16", 100, 36, q_len=2),
    Case("k4v4", 128, heads=32, kv_heads=8, lens=(70000, 3), max_len=70001),
    # Few rows and no mask: `decode_warp`.
    *(  # the scores of a run's means are several products; the longest run is shorter than the row
        Case(name, dim, heads=heads, lens=(20000, 5001), max_len=20480, exact=(4, 32), sms=1, **kinds)
        for name, dim, heads, kinds in (
            ("k4v4", 128, 8, {}),
            ("k8v8", 64, 8, {"softcap": 50.0}),
            ("k3v3", 128, 24, {"bounds": "window"}),
            ("k2v2", 128, 8, {"page": 64}),
        )
    ),
    *(
        Case(name, 128, heads=8, lens=(3000, 129, 1), max_len=3008, keys=keys, dtype=dtype)
        for name in ("k4v4", "k8v8", "k2v2")
        for keys, dtype in (("huge", BF16), ("equal", FP16), ("heavy", BF16))
    ),
    *(
        Case(name, dim, v_dim, 8, 2, q, lens=(700, 129, 1), max_len=720, bounds=b, sinks=b == "row")
        for name, dim, v_dim, q, b in (
            ("k4v4", 64, 128, 1, "none"),
            ("k8v8", 128, 256, 2, "window"),
            ("k2v2", 64, 64, 4, "window"),
            ("k8v4", 256, 64, 3, "row"),
            ("k4v8", 64, 64, 8, "none"),
            ("k4v2", 128, 128, 16, "none"),
            ("k8v8", 256, 256, 5, "window"),
            ("k2v8", 64, 64, 1, "row"),
            ("k8v2", 128, 128, 9, "window"),
            ("k4v4", 128, 128, 1, "shared"),
            ("k4v4", 256, 256, 1, "none"),
            ("k3v3", 128, 256, 3, "window"),
            ("k3v2", 256, 64, 1, "row"),
            ("k4v3", 64, 128, 9, "none"),
        )
    ),
    Case("k2v2", 256, heads=14, lens=(300, 400), max_len=310),  # the second row is overfull
    *(
        Case(
            name,
            128,
            heads=8,
            q_len=q,
            lens=(900, 129, 33),
            max_len=1000,
            mask=mask,
            bounds="scan",
            exact=exact,
        )
        for name, exact in (("k4v4", (0, 0)), ("k8v2", (4, 32)), ("k4v4", (4, 0)))
        for q in (1, 4, 40)
        for mask in ("keys", "holes")
    ),
    *(
        Case(
            name,
            dim,
            heads=8,
            q_len=q,
            lens=(900, 129, 1),
            max_len=1000,
            bounds=b,
            sinks=b == "row",
            exact=exact,
            crop=crop,
        )
        for name, dim in (("k4v4", 128), ("k8v8", 64), ("k2v2", 256), ("k3v3", 128), ("k4v4", 80))
        for q, b, exact, crop in (
            (1, "none", (4, 32), 0),
            (5, "row", (4, 128), 3),
            (2, "window", (0, 16), 20),
            (1, "row", (300, 1), 0),
            (1, "none", (0, 16), 20),
        )
    ),
    *(
        Case(
            "k4v4",
            128,
            heads=14,
            q_len=q,
            lens=(900, 60),
            max_len=1000,
            mask=mask,
            dtype=dtype,
            exact=(4, 32),
        )
        for dtype in (BF16, FP32)
        for q, mask in ((1, "bool"), (5, "left"), (3, "float"), (1, "row"), (70, "none"))
    ),
    *(
        Case(name, 128, heads=14, q_len=4, lens=(900, 60), max_len=1000, mask=mask, bounds=b, sinks=True)
        for name in ("k4v4", "k8v4", "k2v2", "bf16")
        for mask, b in (("none", "window"), ("bool", "row"), ("none", "none"))
    ),
    *(
        Case(
            name,
            dim,
            heads=8,
            q_len=q,
            lens=(900, 129, 1),
            max_len=1000,
            mask=mask,
            bounds=b,
            sinks=b == "row",
            keys=keys,
            exact=exact,
            softcap=cap,
        )
        for name, dim in (
            ("k4v4", 128),
            ("k8v8", 64),
            ("k2v2", 256),
            ("k3v3", 128),
            ("k4v4", 80),
            ("bf16", 256),
        )
        for q, mask, b, keys, exact, cap in (
            (1, "none", "none", "random", (0, 0), 50.0),
            (5, "none", "window", "huge", (0, 0), 2.0),
            (2, "bool", "row", "random", (0, 0), 5.0),
            (3, "none", "row", "heavy", (4, 32), 30.0),
        )
        if name != "bf16" or exact == (0, 0)
    ),
    *(
        Case(
            name,
            dim,
            heads=8,
            q_len=q,
            lens=(900, 129, 1),
            max_len=1000,
            mask=mask,
            bounds=b,
            page=page,
            hole=hole,
            exact=exact,
        )
        for name, dim in (
            ("k4v4", 128),
            ("k8v8", 64),
            ("k2v2", 256),
            ("k3v3", 128),
            ("k4v4", 80),
            ("bf16", 128),
        )
        for page in (16, 48, 64, 256)
        for q, mask, b, hole, exact in (
            (1, "none", "none", -1, (0, 0)),
            (4, "none", "window", 0, (0, 0)),
            (2, "none", "row", -1, (4, 32)),
            (2, "bool", "row", 1, (0, 0)),
        )
        if name != "bf16" or exact == (0, 0)
    ),
]
# Exact tokens alone: masks are over keys, and dims powers of two. In the interpreter, `unpacked`'s.
EXACT_INTERPRETED = [
    Case("k4v4", 64, heads=14, lens=(90, 1), dtype=FP16, exact=(4, 32)),
    Case("k3v2", 16, 64, heads=7, kv_heads=1, q_len=16, lens=(129, 16), dtype=FP16, exact=(4, 8)),
    Case("k4v4", 32, q_len=5, lens=(40, 3), bounds="window", dtype=FP16, exact=(9, 7), crop=3),
    Case("k4v4", 16, q_len=2, lens=(70, 8), mask="keys", bounds="scan", dtype=FP16, exact=(4, 20)),
    Case("k2v2", 16, lens=(70, 50), mask="holes", bounds="scan", dtype=FP16, exact=(4, 40), softcap=2.0),
    Case("k4v8", 16, q_len=2, lens=(50,), dtype=FP16, exact=(60, 0), crop=9),
    Case("k4v4", 16, q_len=3, lens=(100, 40), bounds="row", dtype=FP16, exact=(0, 17)),
    Case("k4v4", 16, q_len=3, lens=(100, 40), dtype=FP32, exact=(1, 5)),
    Case("k4v4", 16, q_len=3, lens=(140, 40), dtype=FP16, exact=(100, 170)),
    Case("k4v4", 16, q_len=3, lens=(100, 33), dtype=FP16, exact=(4, 32), page=64, hole=0),
]
EXACT_GPU = [
    *EXACT_INTERPRETED,
    *(
        Case("k4v4", dim, v_dim, heads, 2, q, (900, 129, 1), 1000, mask, dtype, b, exact=exact, softcap=cap)
        for dim, v_dim, dtype in ((128, 128, BF16), (64, 256, BF16), (256, 64, FP16))
        for heads, q, mask, b, exact, cap in (
            (8, 1, "none", "none", (4, 32), None),
            (14, 16, "none", "window", (4, 8), None),
            (8, 4, "holes", "scan", (4, 128), 20.0),
            (2, 5, "none", "row", (0, 250), None),
        )
    ),
    # As many tokens as new ones or fewer, in few and in all slots; one row, 7, 8, 14 and 64.
    *(
        Case("k4v4", dim, v_dim, heads, 2, q, lens, 150, dtype=dtype, exact=exact)
        for dim, v_dim, dtype in ((128, 128, BF16), (64, 64, FP16), (128, 256, FP16), (256, 256, BF16))
        for heads, q, lens, exact in (
            (2, 1, (1, 30), (4, 12)),
            (8, 2, (2, 37), (4, 32)),
            (14, 1, (3, 150), (0, 16)),
            (14, 2, (90, 5), (2, 3)),
            (8, 8, (8, 12), (4, 32)),
            (8, 16, (17, 140), (5, 7)),
        )
    ),
    *(
        Case("k8v4", dim, heads=14, q_len=q, lens=(140, 37), mask=mask, bounds="scan", exact=(4, 32))
        for dim in (64, 128, 256)
        for q, mask in ((1, "keys"), (3, "keys"), (4, "holes"))
    ),
    Case("k4v4", 128, heads=8, lens=(90, 33), exact=(0, 16), crop=20),  # none of them is there any more
    Case("k4v4", 128, heads=8, q_len=6, lens=(50,), exact=(60, 0), crop=9),
    Case("k4v4", 128, heads=8, q_len=3, lens=(100, 33), exact=(4, 32), page=64, hole=0),
    Case("k4v4", 128, heads=8, q_len=3, lens=(170, 33), exact=(4, 32), softcap=2.0),  # overfull
    Case("k4v4", 256, heads=8, q_len=3, lens=(150, 33), exact=(4, 290)),  # `unpacked`'s
]
APPEND_INTERPRETED = [
    Case("k4v4", 16, q_len=3, lens=(514, 257), max_len=600, dtype=FP16, exact=(2, 4)),
    Case("k3v2", 16, q_len=2, lens=(40, 2), max_len=50, dtype=FP16, exact=(2, 9)),
    Case("k4v4", 16, q_len=2, lens=(40, 2), max_len=50, dtype=FP16, exact=(2, 9), softcap=2.0),
    Case("k4v4", 16, q_len=2, lens=(49, 2), max_len=50, dtype=FP16, exact=(2, 9), page=16, hole=0),
]
APPEND_GPU = [
    *APPEND_INTERPRETED,
    *(
        Case(name, dim, heads=heads, q_len=q_len, lens=lens, max_len=2100, exact=exact)
        for name, dim, exact in (
            ("k4v4", 128, (4, 32)),
            ("k3v3", 128, (0, 0)),
            ("k8v2", 64, (0, 70)),
            ("k4v8", 256, (5, 0)),
        )
        for heads, q_len, lens in ((8, 1, (2000, 1, 65)), (14, 5, (2100, 5)), (2, 16, (3000, 17)))
    ),
    Case("bf16", heads=8, lens=(2000, 1), max_len=2100),
    Case("k4v4", 128, heads=8, lens=(2000, 1, 65), max_len=2100, softcap=3.0),
    Case("k3v4", 256, heads=8, q_len=3, lens=(2000, 5, 65), max_len=2100, exact=(4, 32), softcap=20.0),
    *(
        Case(
            name, 128, heads=8, q_len=q, lens=(2000, 5, 65), max_len=2100, exact=exact, page=page, hole=hole
        )
        for name, exact in (("k4v4", (4, 32)), ("k8v8", (0, 0)), ("k3v3", (0, 0)), ("bf16", (0, 0)))
        for q, page, hole in ((1, 64, -1), (1, 128, 3), (5, 64, 0), (1, 16, 2), (3, 48, -1))
    ),
]
# A chunk of a prompt: more than `DECODE_TOKENS` queries, their own keys and values as they came.
PREFILL_INTERPRETED = [
    Case("k4v4", 64, heads=2, q_len=20, lens=(530, 290), max_len=600, dtype=FP16, exact=(2, 4)),
    Case(
        "k4v4",
        64,
        heads=2,
        kv_heads=1,
        q_len=18,
        lens=(530,),
        max_len=600,
        dtype=FP16,
        exact=(2, 4),
        softcap=3.0,
    ),
    Case("k4v4", 64, heads=4, kv_heads=1, q_len=17, lens=(129, 17), dtype=FP16),  # the second: no prefix
    Case(
        "k3v2",
        128,
        64,
        heads=1,
        kv_heads=1,
        q_len=33,
        lens=(130, 66),
        bounds="window",
        sinks=True,
        dtype=FP16,
    ),
    Case(
        "k2v8", 64, 128, heads=2, kv_heads=1, q_len=17, lens=(81,), mask="left", dtype=FP16, exact=(4, 30)
    ),
    Case("k8v3", 64, heads=2, kv_heads=1, q_len=17, lens=(33, 50), mask="float", dtype=FP16, exact=(3, 0)),
    Case("k4v4", 256, heads=1, kv_heads=1, q_len=18, lens=(97, 10), dtype=FP16),  # the second: not all fit
    Case(
        "k4v4", 80, 64, heads=2, kv_heads=1, q_len=17, lens=(33, 70), dtype=FP16, exact=(4, 32), sinks=True
    ),
    Case("k3v3", 80, heads=1, kv_heads=1, q_len=33, lens=(49, 40), mask="bool", bounds="row", dtype=FP32),
    Case(
        "k4v2", 512, heads=1, kv_heads=1, q_len=17, lens=(40, 20), max_len=50, bounds="shared", dtype=FP16
    ),
    Case(
        "k4v4", 64, heads=1, kv_heads=1, q_len=20, lens=(50, 30), max_len=40, dtype=FP16
    ),  # the first is overfull
    Case("fp16", 24, 40, heads=2, q_len=17, lens=(50, 30), dtype=FP32),
    Case(
        "k4v4", 64, heads=2, q_len=17, lens=(150, 60), mask="holes", bounds="scan", dtype=FP16, softcap=3.0
    ),
    Case("k4v4", 64, heads=2, q_len=17, lens=(90, 99), dtype=FP16, exact=(4, 40), softcap=2.0),
    Case("k4v4", 64, heads=2, q_len=17, lens=(90, 99), dtype=FP16, exact=(2, 9), page=64, hole=0),
    Case(
        "k3v3", 80, heads=2, q_len=18, lens=(70, 81), dtype=FP16, mask="keys", page=32, hole=2, softcap=2.0
    ),
    Case("bf16", 24, heads=2, q_len=17, lens=(50, 30), dtype=FP32, bounds="window", page=16, softcap=5.0),
]
CHUNK_FORMATS = (("k4v4", 128, BF16), ("k3v2", 64, FP16), ("k8v8", 256, BF16))
CHUNK_MASKS = (
    (17, "bool", "none"),
    (129, "left", "none"),
    (65, "float", "row"),
    (300, "none", "window"),
)


def masked_chunks(formats: tuple[tuple, ...], masks: tuple[tuple, ...]) -> list[Case]:
    """Chunks of formats (name, D, dtype), each with (queries, mask, bounds)."""
    return [
        Case(name, dim, heads=14, q_len=q, lens=(900, 330), max_len=1000, mask=mask, bounds=b, sinks=True,
             dtype=dtype)
        for name, dim, dtype in formats
        for q, mask, b in masks
    ]  # fmt: skip


# Of few rows, too: `check_pieces` sends them all to `prefill_pieces`.
PIECES_INTERPRETED = [
    replace(case, dtype=FP16, small_pieces=True)
    for case in (
        Case(
            "k4v4", 64, heads=4, kv_heads=1, q_len=17, lens=(40, 300, 17), max_len=320
        ),  # no prefix: the last
        Case("k3v2", 128, 64, heads=1, kv_heads=1, q_len=33, lens=(310, 170), max_len=320, bounds="window"),
        Case("k2v8", 64, 128, kv_heads=1, q_len=17, lens=(170,), max_len=180, mask="left", exact=(4, 30)),
        Case("k8v3", 64, heads=2, kv_heads=1, q_len=17, lens=(150, 290), max_len=290, mask="float"),
        Case("k4v4", 256, heads=1, kv_heads=1, q_len=18, lens=(197, 10), max_len=200, sinks=True),
        Case("k8v8", 64, heads=2, q_len=17, lens=(290,), max_len=300, keys="heavy"),
        Case(
            "k4v4", 64, heads=1, kv_heads=1, q_len=20, lens=(170, 190), max_len=180
        ),  # overfull: the second
        Case("k4v4", 64, heads=1, kv_heads=1, q_len=20, lens=(20,), max_len=20),
        Case("k4v4", 64, q_len=17, lens=(250, 160), max_len=300, mask="holes", bounds="scan", softcap=3.0),
        Case("k4v4", 64, heads=2, q_len=17, lens=(290, 299), max_len=300, exact=(4, 40), softcap=2.0),
    )
]
PIECES_INTERPRETED += [replace(PIECES_INTERPRETED[i], small_pieces=False) for i in (0, 5)]
PIECES_INTERPRETED += [
    Case(
        "k4v4",
        64,
        heads=2,
        q_len=17,
        lens=(560, 300),
        max_len=600,
        dtype=FP16,
        exact=(2, 4),
        small_pieces=small,
    )
    for small in (True, False)
]
PIECES_INTERPRETED += [replace(PIECES_INTERPRETED[-2], fmt="k3v2", softcap=3.0)]
PIECES_GPU = [
    *PIECES_INTERPRETED,
    *(
        Case(
            name,
            dim,
            heads=heads,
            kv_heads=kv,
            q_len=q,
            lens=(900, q + 1, q, 700),
            max_len=1000,
            exact=exact,
            keys=keys,
            small_pieces=small,
        )
        for name, dim in (("k4v4", 128), ("k8v8", 64), ("k2v2", 256), ("k3v3", 128))
        for heads, kv, q, exact, keys in (
            (1, 1, 17, (0, 0), "heavy"),
            (7, 1, 65, (4, 32), "random"),
            (8, 1, 129, (0, 0), "huge"),
            (4, 2, 300, (2, 400), "equal"),
        )
        for small in (False, True)
    ),
    *(
        replace(case, small_pieces=True)
        for case in masked_chunks(CHUNK_FORMATS, (*CHUNK_MASKS, (100, "holes", "scan")))
    ),
    *(
        Case(name, 128, v_dim, heads=8, q_len=257, lens=(9000, 5000, 300), max_len=9216, softcap=cap)
        for name, v_dim in (("k4v4", 128), ("k8v8", 128), ("k3v3", 64))
        for cap in (None, 20.0)
    ),
]
PREFILL_GPU = [
    *PREFILL_INTERPRETED,
    *(
        Case(name, dim, heads=heads, kv_heads=kv, q_len=q, lens=(900, q + 1, q), max_len=1000, exact=exact)
        for name, dim in (
            ("k4v4", 128),
            ("k8v8", 64),
            ("k2v2", 256),
            ("k3v3", 128),
            ("k4v4", 80),
            ("k8v4", 512),
        )
        for heads, kv, q, exact in (
            (1, 1, 17, (0, 0)),
            (7, 1, 65, (4, 32)),
            (8, 1, 129, (0, 0)),
            (4, 2, 300, (2, 400)),
        )
    ),
    *masked_chunks((*CHUNK_FORMATS, ("k4v4", 64, FP32)), CHUNK_MASKS),
    *(Case(name, q_len=129, lens=(1007, 129), max_len=1024) for name in format_names()),
    *(
        Case("k4v4", q_len=200, lens=(900, 201), max_len=1000, keys=keys)
        for keys in ("huge", "equal", "heavy")
    ),
    Case("k4v4", heads=4, kv_heads=1, q_len=1000, lens=(70000, 1000), max_len=70001),
    *(
        Case(
            name,
            dim,
            heads=8,
            q_len=q,
            lens=(900, 330),
            max_len=1000,
            mask=mask,
            bounds=b,
            exact=exact,
            softcap=cap,
            page=page,
            hole=hole,
        )
        for name, dim in (("k4v4", 128), ("k8v2", 64), ("k3v3", 256), ("bf16", 128))
        for q, mask, b, exact, cap, page, hole in (
            (17, "none", "none", (4, 32), 20.0, 0, -1),
            (129, "holes", "scan", (0, 0), None, 0, -1),
            (300, "keys", "scan", (0, 0), 5.0, 0, -1),
            (129, "none", "none", (4, 32), None, 64, 0),
            (65, "bool", "row", (0, 0), 5.0, 48, 18),
        )
        if name != "bf16" or not any(exact)
    ),
]
LARGE_GPU = [
    Case("k4v4", lens=(300,), max_len=17_000_000, dtype=FP16),
    Case("k4v4", lens=(300,), max_len=17_000_000, dtype=FP32),  # by the portable kernel
    Case("bf16", lens=(300,), max_len=5_000_000),
]
ATTEND_GPU = [
    *ATTEND_INTERPRETED,
    *(
        Case("", 128, heads=8, q_len=q, lens=(900, 129), max_len=1000, mask=mask, bounds="scan")
        for q in (1, 4, 400)
        for mask in ("keys", "holes")
    ),
    *(
        Case("", dim, heads=14, q_len=q, max_len=1000, mask=mask, bounds=b, sinks=sinks, dtype=dtype)
        for dim in (64, 80, 128, 256, 512)
        for dtype in (BF16, FP32)
        for q, mask, b, sinks in ((1, "none", "row", False), (5, "bool", "window", True))
    ),
    Case("", 128, heads=71, kv_heads=1, q_len=1, max_len=3000, bounds="row"),
    Case("", 256, heads=8, q_len=1, max_len=3000, bounds="window", softcap=50.0),
    Case("", 128, heads=8, q_len=5, max_len=1000, mask="float", sinks=True, softcap=2.0),
    # Rows enough for wgmma.
    *(
        Case("", *dims, 14, q_len=800, lens=(900, 129), max_len=1000, mask=mask, bounds=b, dtype=dtype)
        for dims, dtype in (((128, 128), BF16), ((128, 128), FP16), ((64, 128), BF16), ((128, 64), FP16))
        for mask, b in (
            *(("none", "row"), ("none", "window")),
            *(("keys", "scan"), ("holes", "scan"), ("keys", "none")),
            *(("left", "scan"), ("bool", "none"), ("bool", "row")),
        )
    ),
    *(  # masks of bits, rows of bytes that start anywhere
        Case("", dim, heads=14, q_len=70, lens=(900, 129), max_len=1003, mask=mask, bounds=b, dtype=dtype)
        for dim, dtype in ((80, BF16), (128, FP16), (256, BF16), (32, FP32))
        for mask, b in (("left", "scan"), ("bool", "row"), ("bool", "none"))
    ),
    Case("", 128, heads=16, q_len=700, max_len=700),
]


@dataclass(frozen=True)
class Ragged:
    """One call of `varlen_attention`: lengths of queries and keys of each sequence."""

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    dim: int = 64
    v_dim: int = 64
    heads: int = 4
    kv_heads: int = 2
    causal: bool = True
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.q_lens}-{self.k_lens}-d{self.dim}x{self.v_dim}-{mask}-{str(self.dtype)[6:]}"


VARLEN_INTERPRETED = [
    Ragged((70, 0, 1, 9), (70, 5, 129, 0), 80, 24, 7, 1, True, FP16),
    Ragged((9, 3), (4, 30), 576, 16, 2, 2, True, FP16),
    Ragged((20, 3), (33, 0), 72, 136, 3, 3, False, FP32),
]
VARLEN_GPU = [
    *VARLEN_INTERPRETED,
    *(
        Ragged((1, 300, 65, 0), (129, 300, 20, 7), dim, v_dim, 8, 2, causal, dtype)
        for dim, v_dim in ((64, 64), (128, 128), (80, 96), (192, 128))
        for causal, dtype in ((True, BF16), (False, FP16), (True, FP32))
    ),
    Ragged((50,), (80,), 256, 256),
    Ragged((50,), (80,), 576, 512, 71, 1),
]
