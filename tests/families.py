"""Tiny models of public families, with random weights, and an input for each: for tests and for benchmarks/reload.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_support import declare_operators

os.environ.setdefault("HF_HUB_OFFLINE", "1")
declare_operators()

TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS, GROUPED = {"num_attention_heads": 8}, {"num_attention_heads": 8, "num_key_value_heads": 4}
TWO = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
       "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
MLA = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16,
       "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1}  # fmt: skip
MIXED: dict[str, Any] = {"moe_intermediate_size": 24, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SHAPE | GROUPED | TOKENS),
    "mistral": ("MistralForCausalLM", SHAPE | GROUPED | TOKENS),
    "qwen2": ("Qwen2ForCausalLM", SHAPE | GROUPED | TOKENS),
    "qwen3": ("Qwen3ForCausalLM", SHAPE | GROUPED | TOKENS | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", SHAPE | GROUPED | TOKENS | {"head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", SHAPE | GROUPED | TOKENS | {"head_dim": 8}),
    "phi": ("PhiForCausalLM", SHAPE | HEADS | TOKENS),
    "phi3": ("Phi3ForCausalLM", SHAPE | GROUPED | TOKENS),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 8, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", SHAPE | {"num_attention_heads": 4} | TOKENS),
    "gptj": ("GPTJForCausalLM", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 64} | TOKENS),
    "opt": ("OPTForCausalLM", {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "max_position_embeddings": 64} | HEADS | TOKENS
            | {"word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4} | TOKENS),
    "falcon": ("FalconForCausalLM", SHAPE | HEADS | TOKENS | {"ffn_hidden_size": 64}),
    "falcon_grouped": ("FalconForCausalLM", SHAPE | HEADS | TOKENS | {"ffn_hidden_size": 64, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 8, "n_positions": 64} | TOKENS),
    "gemma": ("GemmaForCausalLM", SHAPE | TOKENS | {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "starcoder2": ("Starcoder2ForCausalLM", SHAPE | GROUPED | TOKENS),
    "olmo2": ("Olmo2ForCausalLM", SHAPE | GROUPED | TOKENS),
    "granite": ("GraniteForCausalLM", SHAPE | GROUPED | TOKENS),
    "cohere": ("CohereForCausalLM", SHAPE | GROUPED | TOKENS),
    "mixtral": ("MixtralForCausalLM", SHAPE | GROUPED | TOKENS | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", SHAPE | GROUPED | TOKENS | MIXED | {"mlp_only_layers": [1]}),
    "olmoe": ("OlmoeForCausalLM", SHAPE | GROUPED | TOKENS | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssForCausalLM", SHAPE | GROUPED | TOKENS | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 4} | TOKENS | MLA),
    "deepseek_v2": ("DeepseekV2ForCausalLM", SHAPE | {"num_attention_heads": 8, "num_key_value_heads": 8} | TOKENS
                    | {key: MLA[key] for key in MLA if key not in ("n_group", "topk_group")} | {"q_lora_rank": None, "v_head_dim": 6}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4} | TOKENS),
    "falcon_h1": ("FalconH1ForCausalLM", SHAPE | GROUPED | TOKENS
                  | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", SHAPE | HEADS),
    "roberta": ("RobertaForMaskedLM", SHAPE | HEADS | TOKENS),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": 97, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4}),
    "electra": ("ElectraForMaskedLM", SHAPE | {"num_attention_heads": 4, "embedding_size": 16}),
    "deberta_v2": ("DebertaV2ForMaskedLM", SHAPE | {"num_attention_heads": 4}),
    "modernbert": ("ModernBertForMaskedLM", SHAPE | {"num_attention_heads": 4, "pad_token_id": 0}),
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", IMAGE | HEADS),
    "deit": ("DeiTForImageClassification", IMAGE | HEADS),
    "beit": ("BeitForImageClassification", IMAGE | {"num_attention_heads": 4}),
    "dinov2": ("Dinov2ForImageClassification", {key: IMAGE[key] for key in IMAGE if key != "intermediate_size"} | {"num_attention_heads": 4, "mlp_ratio": 2}),
    "siglip_vision": ("SiglipForImageClassification", {"vision_config": IMAGE | {"num_attention_heads": 4}}),
    "convnext": ("ConvNextForImageClassification", {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32], "image_size": 32}),
    "resnet": ("ResNetForImageClassification", {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 8, "layer_type": "basic"}),
}
BOTH: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 97, "d_model": 32, "d_kv": 4, "d_ff": 64, "num_layers": 2, "num_heads": 8} | TOKENS
           | {"decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", {"vocab_size": 97, "max_position_embeddings": 64} | TWO | TOKENS),
    "whisper": ("WhisperForConditionalGeneration", {"vocab_size": 97, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32} | TWO | TOKENS
                | {"decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": []}),
}  # fmt: skip
FAMILIES = CAUSAL | ENCODERS | VISION | BOTH


def ids(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def build(name: str, layers: int | None = None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of a family, and what to call it with; of ``layers``, where its configuration has one number of them."""
    import transformers

    kind, numbers = FAMILIES[name]
    if layers is not None:
        numbers = {key: layers if key in ("num_hidden_layers", "n_layer") else value for key, value in numbers.items()}
    make: Callable = getattr(transformers, kind)
    torch.manual_seed(0)
    model = make(make.config_class(**numbers)).eval()
    with torch.no_grad():  # biases and norms that are not zero and one, and differences that show
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if name in VISION:
        size = numbers.get("image_size", 16)
        return model, {"pixel_values": torch.randn(2, 3, size, size)}
    if name == "whisper":
        return model, {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids()}
    return model, {"input_ids": ids()} | ({"decoder_input_ids": ids()} if name in BOTH else {})


def result(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def written(model: nn.Module, inputs: dict[str, torch.Tensor], cache: bool = True) -> torch.Tensor | None:
    """What a generative model writes, greedily."""
    if not hasattr(model, "generate") or not model.can_generate():
        return None
    start = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    return model.generate(**start, max_new_tokens=6, do_sample=False, use_cache=cache)
