"""What transformers is told about the combined model: its config class and its generation settings."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedConfig

from engine.backbone import Backbone
from engine.config import LadderConfig
from engine.model.connections import connections


class LadderModelConfig(PreTrainedConfig):
    """What transformers needs to know of the combined model; `ladder_config.json` says how to build it.

    num_hidden_layers counts backbone blocks and side layers, because that many layers hold keys and values while
    decoding.
    """

    model_type = "ladder"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    max_position_embeddings: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False


def model_config(backbone: Backbone, config: LadderConfig) -> LadderModelConfig:
    """The transformers config of a side network of `config` beside `backbone`."""
    shape, source = backbone.config, backbone.hf_config
    _, num_side_layers = connections(config, shape.num_layers)
    return LadderModelConfig(
        architectures=["LadderForCausalLM"],
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers + num_side_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_position_embeddings,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
        name_or_path=backbone.source,
    )


def generation_config(backbone: Backbone) -> GenerationConfig:
    """The backbone's own generation settings, else its special tokens."""
    if backbone.folder is not None and (backbone.folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(backbone.folder, local_files_only=True)
    source = backbone.hf_config
    return GenerationConfig(
        bos_token_id=source.bos_token_id, eos_token_id=source.eos_token_id, pad_token_id=source.pad_token_id
    )
