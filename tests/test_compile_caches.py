"""Inductor's caches: the decisions of the rewrite are part of every key."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

def f(q, k, v, position):
    mask = torch.arange(64) <= position
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None, None], enable_gqa=True)

def found(options):
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        out = torch.compile(f, backend="turboquant", options=options)(q, k, v, torch.tensor(9))
        assert torch.allclose(out, f(q, k, v, torch.tensor(9)), atol=1e-5)
    aot, ind = counters["aot_autograd"], counters["inductor"]
    return {
        "hits": aot["autograd_cache_hit"] + ind["fxgraph_cache_hit"],
        "misses": aot["autograd_cache_miss"] + ind["fxgraph_cache_miss"],
        "calls": dict(counters["turboquant"]),
    }

all_options, artifacts = json.loads(sys.argv[1]), sys.argv[2]
if artifacts.startswith("load:"):
    torch.compiler.load_cache_artifacts(open(artifacts[5:], "rb").read())
torch.manual_seed(0)
q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, 1), (2, 64), (2, 64)))
results = [found(options) for options in all_options]
if artifacts.startswith("save:"):
    data, _ = torch.compiler.save_cache_artifacts()
    open(artifacts[5:], "wb").write(data)
print(json.dumps(results))
"""


def compile_in_new_process(cache, *options, artifacts=""):
    """What each of `options` found in the folder `cache`, one after the other."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    environment["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "1"
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, json.dumps(options), artifacts],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_same_decisions_hit_others_miss_and_artifacts_round_trip(tmp_path):
    """One test, because the compilation that fills the caches is the most of its time."""
    saved = tmp_path / "artifacts"
    (first,) = compile_in_new_process(tmp_path / "a", {}, artifacts=f"save:{saved}")
    again, other = compile_in_new_process(tmp_path / "a", {}, {"attention": "sdpa"})
    assert (first["hits"], again["misses"]) == (0, 0)
    assert again["hits"] > 0
    assert again["calls"] == first["calls"] == {"calls": 1, "rewritten.triton": 1}  # told on a hit too
    assert other["hits"] == 0
    assert other["calls"] == {"calls": 1, "left.sdpa": 1}
    (loaded,) = compile_in_new_process(tmp_path / "empty", {}, artifacts=f"load:{saved}")
    assert (loaded["hits"] > 0, loaded["misses"]) == (True, 0)
