"""A transformers model with a packed cache: compile it, make the cache, generate.

    python examples/transformers_model.py [MODEL] [--prompt TEXT]

MODEL is any decoder that transformers loads; the one that ships with the package unless given.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tq_inductor import TurboQuantCache

DEMO_MODEL = str(files("tq_inductor") / "demo_model")


def main(argv: list[str] | None = None) -> None:
    """Go on with a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEMO_MODEL)
    parser.add_argument("--prompt", default="def mean(values):\n")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)

    # The three lines. With max_batch_size the buffers are made at once, and may be used again after
    # cache.reset(), for a prompt of any length, without another compilation.
    model.compile(backend="turboquant")
    cache = TurboQuantCache(model.config, 2048, kv_format="k4v4", max_batch_size=1, device=device)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=64, do_sample=False)

    print(tokenizer.decode(out[0]))
    print(f"{cache.nbytes:,} bytes for {cache.get_max_length():,} tokens")


if __name__ == "__main__":
    main()
