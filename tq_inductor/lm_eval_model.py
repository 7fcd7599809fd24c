"""EleutherAI's lm-eval with a packed cache.

    python -m tq_inductor.lm_eval_model run --model turboquant --tasks gsm8k \\
        --model_args pretrained=NAME,kv_format=k4v4

takes all that `lm_eval` does. Answers that a model writes come from a `TurboQuantCache`: the prompt is
exact, as always, every later token reads packed bytes. What is only scored is read few tokens at a time,
each as if it had just been written: stricter than a prompt would be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .beside import DECODE_TOKENS
from .cache import TurboQuantCache
from .layer_formats import read_policy


@register_model("turboquant")
class TurboQuantLM(HFLM):
    """lm-eval's transformers model, with a packed cache.

    Args:
        kv_format: a format, "auto", or a file that `tq-inductor calibrate` wrote; "bf16" for comparison.
        sink_tokens, recent_tokens: of the `TurboQuantCache`.
        args, kwargs: those of `HFLM` (`pretrained`, `dtype`, `batch_size`, ...).
    """

    def __init__(
        self,
        *args: Any,
        kv_format: str = "k4v4",
        sink_tokens: int | None = None,
        recent_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.kv_format = read_policy(Path(kv_format)) if kv_format.endswith(".json") else kv_format
        self.sink_tokens, self.recent_tokens = sink_tokens, recent_tokens
        super().__init__(*args, **kwargs)
        self._new_cache(1)  # refuses here what cannot be stored

    def _new_cache(self, max_len: int) -> TurboQuantCache:
        return TurboQuantCache(
            self.config,
            max_len,
            kv_format=self.kv_format,
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
        )

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits of `[B, n]`, read from the cache, the tokens read together too."""
        cache = self._new_cache(inps.shape[1])
        with torch.no_grad():
            chunks = inps.split(DECODE_TOKENS, 1)
            return torch.cat([self.model(chunk, past_key_values=cache).logits for chunk in chunks], 1)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> torch.Tensor:
        cache = self._new_cache(max_length)
        return super()._model_generate(context, max_length, stop, past_key_values=cache, **kwargs)


if __name__ == "__main__":
    cli_evaluate()
