"""Tiny random checkpoints of every supported family, written to disk by transformers itself.

Weights are drawn with unit-variance outputs instead of transformers' 0.02, so that attention, norms and the MLP all
matter and a wrong one changes the output visibly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

_BASE: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "bos_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama2": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama3": (LlamaConfig, {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16}),
    "llama_linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama_yarn": (LlamaConfig, {"rope_parameters": _YARN_ROPE}),
    "llama_bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}
"""Named test shapes: transformers config class and what differs from the common tiny shape."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte (ids 0..255), then <eos> 256, <pad> 257 and the three role markers 258..260."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens(["<eos>", "<pad>", *roles])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", extra_special_tokens=roles
    )
    fast.chat_template = _CHAT_TEMPLATE if chat_template else None
    return fast


def tiny_model(family: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A random fp32 transformers model of the named family in evaluation mode."""
    config_class, differences = FAMILIES[family]
    config = config_class(**(_BASE | differences | config_overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def tiny_checkpoint(
    tmp_path: Path,
    family: str,
    *,
    seed: int = 0,
    weight_dtype: torch.dtype = torch.float32,
    chat_template: bool = True,
    max_shard_size: str = "5GB",
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint with tokenizer and return its new folder below tmp_path.

    Args:
        family: a key of `FAMILIES`.
        seed: of the weights; the same arguments write the same weights.
        weight_dtype: floating dtype of the saved tensors.
        chat_template: whether the tokenizer has one.
        max_shard_size: as in save_pretrained; small values give several shards and an index.
        config_overrides: fields of the transformers config.
    """
    folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
    model = tiny_model(family, seed=seed, **config_overrides).to(weight_dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder
