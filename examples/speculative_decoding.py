"""Prompt lookup and an assistant model, as transformers has them, on a packed cache.

    python examples/speculative_decoding.py [--eager] [--new-tokens 200]

Several tokens are proposed, by what followed the same words before or by a smaller model, and checked in
one step. On a text that repeats itself most proposals hold. What is proposed changes the speed, never the
text: rounding aside, it is what the model would write alone.
"""

from __future__ import annotations

import argparse
import time
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tq_inductor import TurboQuantCache

DEMO_MODEL = str(files("tq_inductor") / "demo_model")
LINE = "    parser.add_argument('--verbose', action='store_true', help='say more')\n"
PROMPT = "def main(argv=None):\n    parser = argparse.ArgumentParser()\n" + 6 * LINE
ASSISTANT_LAYERS = 3


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A smaller model that is often right: the same one, without its last layers; weights are shared."""
    config = type(model.config)(
        **{**model.config.to_dict(), "num_hidden_layers": layers, "layer_types": None}
    )
    with torch.device("meta"):
        smaller = type(model)(config)
    smaller.load_state_dict(model.state_dict(), strict=False, assign=True)
    smaller.model.rotary_emb = model.model.rotary_emb  # its buffers are not among the weights
    smaller.generation_config = model.generation_config
    return smaller.eval()


def main(argv: list[str] | None = None) -> None:
    """Time each way, once it is compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--new-tokens", type=int, default=200)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype).to(device).eval()
    assistant = first_layers(model, ASSISTANT_LAYERS)
    if not args.eager:
        model.compile(backend="turboquant")
    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)
    room = inputs["input_ids"].shape[1] + args.new_tokens + 32  # proposals that are taken back
    cache = TurboQuantCache(model.config, room, max_batch_size=1, dtype=dtype, device=device)
    ways = {
        "alone": {},
        "prompt lookup": {"prompt_lookup_num_tokens": 10},
        "assistant": {"assistant_model": assistant},
    }
    for name, options in ways.items():
        for _ in range(1 if args.eager else 2):  # the first time compiles
            cache.reset()
            start = time.perf_counter()
            out = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=args.new_tokens, do_sample=False, **options
            )
            seconds = time.perf_counter() - start
        new = out[0, inputs["input_ids"].shape[1] :]
        print(f"{name}: {len(new) / seconds:.0f} tokens/s, ending in {tokenizer.decode(new)[-40:]!r}")


if __name__ == "__main__":
    main()
