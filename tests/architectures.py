"""The transformers architectures that the compiler is tested on: tiny, with random weights.

`architecture_runs.py` says what is run of each, `test_architectures.py` what must come of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

BATCH, LENGTH, VOCABULARY = 2, 12, 99
PADDED = 5  # positions of the first row
# A layer of four heads; a config takes what it knows and keeps the rest as attributes. There are two where
# layers differ or share something, where the second was rewritten otherwise, and in one model of each kind.
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 256,
}  # fmt: skip
MULTI_HEAD = SIZES | {"num_key_value_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TWO = {"num_hidden_layers": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {**TWO, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {
    "num_hidden_layers": 4, "layer_types": 2 * WINDOW["layer_types"], "sliding_window": 8,
    "num_kv_shared_layers": 2, "global_head_dim": 32,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
}  # fmt: skip
LINEAR = {
    **TWO, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
}  # fmt: skip
TWO_EACH = {"encoder_layers": 2, "decoder_layers": 2, "num_layers": 2, "num_decoder_layers": 2}
SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "num_layers": 1, "num_decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 256,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, "forced_bos_token_id": None,
}  # fmt: skip
T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
PATCHES = {"image_size": 16, "patch_size": 8}
WAVES = {
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_chunk_size": 8, **TWO, "layer_types": ["mamba", "attention"],
}  # fmt: skip
WHISPER = {
    **SEQ2SEQ, **TOKENS, "num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": 64,
    "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip
TEXT_TOWER = {**MULTI_HEAD, **TOKENS, "eos_token_id": 2, "projection_dim": 32}
VISION_TOWER = {**MULTI_HEAD, **PATCHES, "projection_dim": 32}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: transformers' `model_type`.
        kind: what it is, in the table's words.
        model: name of an auto class of transformers.
        takes: names of the inputs.
        config: arguments of the config.
        paddings: on which sides a batch may be padded.
    """

    name: str
    kind: str
    model: str
    takes: tuple[str, ...]
    config: dict[str, Any]
    paddings: tuple[str, ...] = ("left", "right")

    @property
    def generates(self) -> bool:
        """Whether it is a model for `generate`."""
        return "LM" in self.model or "Seq2Seq" in self.model

    @property
    def encodes_first(self) -> bool:
        """Whether it has a decoder that attends to an encoder."""
        return "decoder_input_ids" in self.takes

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model, the same whenever it is built."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.name, **self.config)
        model = getattr(transformers, self.model).from_config(config, dtype=dtype).eval()
        for weight in model.parameters():
            if weight.dim() > 1:  # larger than usual, or all attention is uniform and hides its mask
                torch.nn.init.normal_(weight, std=0.1)
        return model

    def inputs(self, padding: str = "") -> dict[str, torch.Tensor]:
        """A batch for `forward`, the same whenever it is made; `padding` is "", "left" or "right"."""
        random = torch.Generator().manual_seed(1)
        shapes = {"pixel_values": (3, 16, 16), "input_features": (8, 2 * LENGTH), "input_values": (400,)}
        batch = {}
        for name in self.takes:
            if name in shapes:
                batch[name] = torch.randn(BATCH, *shapes[name], generator=random)
            else:
                batch[name] = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=random)
        if padding:
            first = batch[self.takes[0]]
            mask = torch.ones_like(first, dtype=torch.int64)
            padded = first.shape[1] * PADDED // LENGTH
            row = slice(None, padded) if padding == "left" else slice(-padded, None)
            first[0, row] = mask[0, row] = 0
            batch["attention_mask"] = mask
        return batch


def _decoder(name: str, kind: str = "decoder", **config: Any) -> Architecture:
    sizes = {k: v for k, v in SIZES.items() if name != "falcon" or k != "head_dim"}  # it has no setter
    config = {**sizes, **TOKENS, **config}
    return Architecture(name, kind, "AutoModelForCausalLM", ("input_ids",), config)


def _encoder(name: str, **config: Any) -> Architecture:
    config = {**MULTI_HEAD, **TOKENS, **config}
    return Architecture(name, "encoder", "AutoModel", ("input_ids",), config)


def _encoder_decoder(name: str, **config: Any) -> Architecture:
    config = {**SEQ2SEQ, **TOKENS, **config}
    return Architecture(
        name, "encoder-decoder", "AutoModelForSeq2SeqLM", ("input_ids", "decoder_input_ids"), config
    )


def _vision(name: str, **config: Any) -> Architecture:
    config = {**MULTI_HEAD, **PATCHES, **config}
    return Architecture(name, "vision", "AutoModel", ("pixel_values",), config, paddings=())


def _audio(name: str, **config: Any) -> Architecture:
    config = {**MULTI_HEAD, **WAVES, **config}
    return Architecture(name, "audio", "AutoModel", ("input_values",), config, paddings=("right",))


def _two_towers(name: str) -> Architecture:
    config = {"text_config": TEXT_TOWER, "vision_config": VISION_TOWER, "projection_dim": 32}
    return Architecture(name, "text and vision", "AutoModel", ("input_ids", "pixel_values"), config)


ARCHITECTURES = {
    a.name: a
    for a in (
        _decoder("llama", **TWO),
        _decoder("qwen2"),
        _decoder("qwen3"),
        _decoder("mistral", sliding_window=8),
        _decoder("ministral", **WINDOW),
        _decoder("gemma"),
        _decoder("gemma2", **WINDOW, query_pre_attn_scalar=16),
        _decoder("gemma3_text", **WINDOW, query_pre_attn_scalar=16),
        _decoder("gemma4_text", "decoder, layers share keys", **GEMMA4),
        _decoder("phi"),
        _decoder("phi3"),
        _decoder("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=256),
        _decoder("gptj", n_embd=64, n_layer=1, n_head=4, n_positions=256, rotary_dim=8),
        _decoder("gpt_neox"),
        _decoder("falcon", alibi=False, new_decoder_architecture=True, num_kv_heads=2),
        _decoder("opt", ffn_dim=96, word_embed_proj_dim=64),
        _decoder("bloom", **TWO, n_head=4),
        _decoder("mpt", **TWO, d_model=64, n_heads=4, max_seq_len=256, use_cache=True),
        _decoder("olmo2"),
        _decoder("olmo3", **WINDOW),
        _decoder("cohere"),
        _decoder("cohere2", **WINDOW),
        _decoder("granite"),
        _decoder("glm"),
        _decoder("glm4"),
        _decoder("stablelm"),
        _decoder("starcoder2", sliding_window=None),
        _decoder("smollm3"),
        _decoder("exaone4", **WINDOW),
        _decoder("nemotron"),
        _decoder("arcee"),
        _decoder("apertus"),
        _decoder("seed_oss"),
        _decoder("ernie4_5"),
        _decoder("hunyuan_v1_dense"),
        _decoder("mixtral", "MoE decoder", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        _decoder("qwen2_moe", "MoE decoder", **EXPERTS, shared_expert_intermediate_size=32),
        _decoder("qwen3_moe", "MoE decoder", **EXPERTS),
        _decoder("olmoe", "MoE decoder", **EXPERTS),
        _decoder("gpt_oss", "MoE decoder with sinks", **WINDOW, num_local_experts=4, num_experts_per_tok=2),
        _decoder(
            "deepseek_v3",
            "MoE decoder, MLA",
            **TWO,
            **MLA,
            **EXPERTS,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        _decoder(
            "qwen3_next",
            "MoE decoder, hybrid linear attention",
            **LINEAR,
            **EXPERTS,
            shared_expert_intermediate_size=32,
        ),
        _decoder("qwen3_5_text", "decoder, hybrid linear attention", **LINEAR),
        _decoder(
            "granitemoehybrid",
            "MoE decoder, hybrid linear attention",
            **MAMBA,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
        ),
        _decoder("lfm2", "decoder, hybrid convolution", **TWO, layer_types=["conv", "full_attention"]),
        _decoder(
            "llama4_text",
            "MoE decoder, chunked attention",
            **TWO,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
            attention_chunk_size=8,
            num_local_experts=4,
            intermediate_size_mlp=96,
        ),
        _encoder("bert", **TWO),
        _encoder("roberta"),
        _encoder("distilbert", dim=64, n_layers=1, n_heads=4, hidden_dim=96),
        _encoder("electra", embedding_size=32),
        _encoder("albert", **TWO, embedding_size=32),
        _encoder("mpnet", **TWO),
        _encoder("deberta-v2"),
        _encoder(
            "modernbert",
            **TWO,
            global_attn_every_n_layers=2,
            local_attention=8,
            cls_token_id=1,
            sep_token_id=2,
        ),
        _encoder_decoder("bart", **TWO_EACH),
        _encoder_decoder("mbart"),
        _encoder_decoder("pegasus"),
        _encoder_decoder("t5", **T5, **TWO_EACH),
        _encoder_decoder("umt5", **T5),
        Architecture(
            "whisper",
            "audio encoder-decoder",
            "AutoModelForSpeechSeq2Seq",
            ("input_features", "decoder_input_ids"),
            WHISPER,
            paddings=(),
        ),
        _vision("vit"),
        _vision("deit"),
        _vision("dinov2"),
        _vision("beit"),
        _vision("siglip_vision_model"),
        _audio("wav2vec2"),
        _audio("hubert"),
        _audio("wavlm", **TWO),
        _two_towers("clip"),
        _two_towers("siglip"),
    )
}
