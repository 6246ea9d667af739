"""Supported model families: what their config.json means and what their tensors are called.

To add a family whose block is RMSNorm, rotary attention, RMSNorm, SwiGLU: add one entry to `FAMILIES` (and one tiny
shape to tests/checkpoints.py; the parity tests then cover it). A bias entry is True, False, or the name of the config
field that decides. A family with other tensor names passes its own `TensorNames`. A family that computes something new
(soft-capping, a second norm) needs a `BackboneConfig` field with a neutral default, so that fingerprints of other
families stay as they are, and a line in decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary scalings whose frequencies do not depend on the sequence length, so that one table serves a whole run."""

_ROPE_NOISE = ("type", "partial_rotary_factor")
"""Left out of `rope_parameters`: the old spelling of rope_type, and a factor that is always 1."""

_BOUNDS = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2048,
    "num_key_value_heads": 2048,
    "head_dim": 1024,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
}
_NOT_CONFIG = ("auto_map", "quantization_config")
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")


@dataclass(frozen=True)
class TensorNames:
    """Names in the checkpoint; block entries follow `layer.format(index)`, linears carry .weight and maybe .bias."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{}."
    attention_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    query_norm: str = "self_attn.q_norm.weight"
    key_norm: str = "self_attn.k_norm.weight"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class Family:
    """What distinguishes one family. Bias entries are a constant or the name of the config field that holds it."""

    architecture: str
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: str = "none"
    """Which layers use config.sliding_window: "none", "all", or "layer_types" (per layer, from the config)."""
    names: TensorNames = field(default_factory=TensorNames)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family("MistralForCausalLM", window="all"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window="layer_types"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        window="layer_types",
    ),
}
"""Supported families by `model_type`."""

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors some checkpoints carry although they follow from the config."""


@dataclass(frozen=True)
class BackboneConfig:
    """Everything the forward pass depends on; sizes in elements.

    Attributes:
        family: key of `FAMILIES`.
        rope_parameters: sorted items of transformers' `rope_parameters` (rope_type, rope_theta and scaling numbers).
        layer_windows: per layer, how many latest keys a query sees, or None for all.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: tuple[tuple[str, Any], ...]
    max_position_embeddings: int
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def names(self) -> TensorNames:
        return FAMILIES[self.family].names

    @property
    def rope_type(self) -> str:
        return dict(self.rope_parameters)["rope_type"]

    @property
    def rope_theta(self) -> float:
        """Base wavelength of the rotary embedding."""
        return dict(self.rope_parameters)["rope_theta"]

    @property
    def sliding_window(self) -> int | None:
        """The window of the layers that have one, None where no layer has."""
        return next((window for window in self.layer_windows if window is not None), None)


@dataclass(frozen=True)
class ExpectedTensor:
    """Shape a checkpoint tensor must have, and whether it is a linear weight, which may be NF4."""

    shape: tuple[int, ...]
    linear: bool = False


def expected_tensors(config: BackboneConfig) -> dict[str, ExpectedTensor]:
    """Every tensor the checkpoint of this config must hold, by name; a tied head has no tensor of its own."""
    names, hidden = config.names, config.hidden_size
    tensors = {
        names.embedding: ExpectedTensor((config.vocab_size, hidden)),
        names.final_norm: ExpectedTensor((hidden,)),
    }
    if not config.tie_word_embeddings:
        tensors[names.head] = ExpectedTensor((config.vocab_size, hidden))
    for index in range(config.num_layers):
        prefix = names.layer.format(index)
        tensors |= {prefix + name: expected for name, expected in _block_tensors(config)}
    return tensors


def _block_tensors(config: BackboneConfig) -> Iterator[tuple[str, ExpectedTensor]]:
    names, hidden, inner = config.names, config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield names.attention_norm, ExpectedTensor((hidden,))
    yield names.mlp_norm, ExpectedTensor((hidden,))
    if config.qk_norm:
        yield names.query_norm, ExpectedTensor((config.head_dim,))
        yield names.key_norm, ExpectedTensor((config.head_dim,))
    for name, rows, columns, bias in (
        (names.query, queries, hidden, config.qkv_bias),
        (names.key, keys, hidden, config.qkv_bias),
        (names.value, keys, hidden, config.qkv_bias),
        (names.output, hidden, queries, config.output_bias),
        (names.gate, inner, hidden, config.mlp_bias),
        (names.up, inner, hidden, config.mlp_bias),
        (names.down, hidden, inner, config.mlp_bias),
    ):
        yield f"{name}.weight", ExpectedTensor((rows, columns), linear=True)
        if bias:
            yield f"{name}.bias", ExpectedTensor((rows,))


def parse_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config object of a config.json's content, which is treated as hostile.

    No code of the checkpoint is ever run: `auto_map` is dropped and the class comes from transformers by `model_type`.
    `quantization_config` is dropped as well: it describes the files, not the model.

    Raises:
        ValueError: unsupported architecture, a size that is no positive int within bounds, or a config that
            transformers itself refuses.
    """
    supported = ", ".join(f"{family.architecture} ({model_type})" for model_type, family in FAMILIES.items())
    model_type = raw.get("model_type")
    architectures = raw.get("architectures")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (architectures and architectures != [family.architecture]):
        raise ValueError(
            f"unsupported architecture {architectures!r} with model_type {model_type!r}; supported are: {supported}"
        )
    for name, limit in _BOUNDS.items():
        value = raw.get(name)
        if value is None and (name not in raw or name in _OPTIONAL):
            continue
        if type(value) is not int or not 0 < value <= limit:
            raise ValueError(f"config field {name}: expected an int from 1 to {limit}, got {value!r}")
    try:
        return CONFIG_MAPPING[model_type].from_dict({k: v for k, v in raw.items() if k not in _NOT_CONFIG})
    except Exception as error:
        raise ValueError(f"transformers refuses this {model_type} config: {error}") from error


def backbone_config(hf_config: PreTrainedConfig) -> BackboneConfig:
    """Read the fields of a transformers config that the forward pass depends on.

    Raises:
        ValueError: a family, activation, head split or rotary scaling this engine does not compute.
    """
    if hf_config.model_type not in FAMILIES:
        raise ValueError(f"unsupported model_type {hf_config.model_type!r}; supported are: {', '.join(FAMILIES)}")
    family = FAMILIES[hf_config.model_type]
    if hf_config.hidden_act != "silu":
        raise ValueError(f"config field hidden_act: expected 'silu', got {hf_config.hidden_act!r}")
    heads, kv_heads, hidden = hf_config.num_attention_heads, hf_config.num_key_value_heads, hf_config.hidden_size
    head_dim = getattr(hf_config, "head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise ValueError(f"hidden_size {hidden} must be a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embeddings, got {head_dim}")
    epsilon = hf_config.rms_norm_eps
    if not 0 < epsilon < 1:
        raise ValueError(f"config field rms_norm_eps: expected a number between 0 and 1, got {epsilon!r}")
    config = BackboneConfig(
        family=hf_config.model_type,
        vocab_size=hf_config.vocab_size,
        hidden_size=hidden,
        intermediate_size=hf_config.intermediate_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(epsilon),
        rope_parameters=_rope_parameters(hf_config),
        max_position_embeddings=hf_config.max_position_embeddings,
        layer_windows=_layer_windows(hf_config, family),
        tie_word_embeddings=bool(hf_config.tie_word_embeddings),
        qkv_bias=_flag(hf_config, family.qkv_bias),
        output_bias=_flag(hf_config, family.output_bias),
        mlp_bias=_flag(hf_config, family.mlp_bias),
        qk_norm=family.qk_norm,
    )
    rotary_frequencies(hf_config)
    return config


def _flag(hf_config: PreTrainedConfig, value: bool | str) -> bool:
    return value if isinstance(value, bool) else bool(getattr(hf_config, value))


def _rope_parameters(hf_config: PreTrainedConfig) -> tuple[tuple[str, Any], ...]:
    parameters = hf_config.rope_parameters
    rope_type = parameters.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"unsupported rope type {rope_type!r}; supported are: {', '.join(ROPE_TYPES)}")
    theta = parameters.get("rope_theta")
    if not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise ValueError(f"config field rope_theta: expected a number above 1, got {theta!r}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"unsupported partial_rotary_factor {parameters['partial_rotary_factor']!r}: expected 1.0 (whole heads)"
        )
    kept = {name: value for name, value in parameters.items() if value is not None and name not in _ROPE_NOISE}
    return tuple((name, float(value) if type(value) is int else value) for name, value in sorted(kept.items()))


def _layer_windows(hf_config: PreTrainedConfig, family: Family) -> tuple[int | None, ...]:
    layers = hf_config.num_hidden_layers
    if family.window == "none":
        return (None,) * layers
    window = hf_config.sliding_window
    if family.window == "all":
        return (window,) * layers
    kinds = hf_config.layer_types
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"config field layer_types: expected {layers} entries full_attention or sliding_attention, got {kinds!r}"
        )
    if "sliding_attention" in kinds and window is None:
        raise ValueError(
            "config field layer_types asks for sliding_attention, but sliding_window is not set or not used"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rotary_frequencies(hf_config: PreTrainedConfig) -> tuple[Tensor, float]:
    """Inverse frequencies fp32 [head_dim / 2] on the CPU and the factor on cos and sin, as transformers computes them.

    Raises:
        ValueError: scaling numbers that give no finite, positive frequencies.
    """
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    parameters = hf_config.rope_parameters
    try:
        if parameters["rope_type"] == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
            frequencies, scale = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        else:
            frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf_config)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"rope_parameters {parameters!r} cannot be used: {error!r}") from error
    positive = bool((torch.isfinite(frequencies) & (frequencies > 0)).all())
    if frequencies.shape != (head_dim // 2,) or not positive or not 0 < scale < math.inf:
        raise ValueError(f"rope_parameters {parameters!r} give no finite positive frequencies")
    return frequencies, float(scale)
