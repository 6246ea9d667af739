"""Config reading: every family's facts, and hostile or unsupported configs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES as SHAPES
from checkpoints import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from engine.backbone.families import (
    FAMILIES,
    BackboneConfig,
    backbone_config,
    expected_tensors,
    parse_config,
    rotary_frequencies,
)


def llama(**changes: Any) -> dict[str, Any]:
    """The content of a small, valid Llama config.json; a change to ... removes the field."""
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    return {name: value for name, value in (raw | changes).items() if value is not ...}


def read(raw: dict[str, Any]) -> BackboneConfig:
    return backbone_config(parse_config(raw))


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_tensors_are_those_transformers_saves(shape: str) -> None:
    model = tiny_model(shape)
    config = backbone_config(model.config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    saved = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    assert {name: expected.shape for name, expected in expected_tensors(config).items()} == saved
    assert {name for name, expected in expected_tensors(config).items() if expected.linear} == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_config_survives_json(shape: str) -> None:
    hf_config = tiny_model(shape).config
    hf_config.architectures = [FAMILIES[hf_config.model_type].architecture]
    raw = json.loads(hf_config.to_json_string(use_diff=False))
    assert read(raw) == backbone_config(hf_config)


def test_facts_of_a_config() -> None:
    config = read(llama(head_dim=16, tie_word_embeddings=True, attention_bias=True, rope_theta=5e5))
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.tie_word_embeddings, config.qkv_bias, config.output_bias, config.mlp_bias) == (
        True,
        True,
        True,
        False,
    )
    assert (config.rope_type, config.rope_theta, config.sliding_window) == ("default", 5e5, None)


def test_windows_follow_the_config_of_each_family() -> None:
    assert backbone_config(tiny_model("mistral").config).layer_windows == (5, 5, 5, 5)
    assert backbone_config(tiny_model("mistral", sliding_window=None).config).layer_windows == (None,) * 4
    assert backbone_config(tiny_model("qwen2_window").config).layer_windows == (None, None, 5, 5)
    assert backbone_config(tiny_model("qwen2", sliding_window=5).config).layer_windows == (None,) * 4
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    qwen3 = tiny_model("qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=7)
    config = backbone_config(qwen3.config)
    assert (config.layer_windows, config.sliding_window) == ((7, None, None, 7), 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"unsupported architecture.*gpt2.*LlamaForCausalLM.*Mistral.*Qwen2.*Qwen3"),
        ({"model_type": ["llama"]}, "unsupported architecture"),
        ({"model_type": ...}, "unsupported architecture"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "unsupported architecture.*SequenceClassification"),
        ({"hidden_size": 10**12}, r"hidden_size: expected an int from 1 to \d+, got 1000000000000"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: expected an int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an int from 1"),
        ({"vocab_size": -1}, "vocab_size: expected an int from 1"),
        ({"vocab_size": "288"}, "vocab_size: expected an int .* got '288'"),
        ({"intermediate_size": 96.0}, "intermediate_size: expected an int"),
        ({"num_attention_heads": True}, "num_attention_heads: expected an int .* got True"),
        ({"hidden_size": None}, "hidden_size: expected an int .* got None"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "multiple"),
        ({"head_dim": 15}, "even"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: expected a number between 0 and 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "unsupported rope type 'dynamic'.*llama3, yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "finite positive frequencies"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "cannot be used|refuses"),
        ({"rope_theta": -1.0}, "rope_theta: expected a number above 1, got -1.0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
    ],
)
def test_bad_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(llama(**changes))


def test_bad_layer_types_are_named() -> None:
    qwen = llama(model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=4)
    with pytest.raises(ValueError, match="layer_types"):
        read(qwen | {"layer_types": ["full_attention"]})
    with pytest.raises(ValueError, match="layer_types"):
        read(qwen | {"layer_types": ["full_attention", "chunked_attention"]})
    with pytest.raises(ValueError, match="sliding_window is not set"):
        read(qwen | {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": False})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
_FIELDS = [*llama(), "head_dim", "rope_scaling", "rope_theta", "rope_parameters", "tie_word_embeddings", "eos_token_id"]


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(_FIELDS), _JSON, min_size=1, max_size=2))
def test_any_config_is_read_or_refused_with_a_value_error(changes: dict[str, Any]) -> None:
    try:
        config = read(llama(**changes))
    except ValueError:
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert all(len(expected.shape) in (1, 2) for expected in expected_tensors(config).values())


def test_rotary_frequencies_are_those_of_transformers() -> None:
    for shape in SHAPES:
        model = tiny_model(shape)
        frequencies, scale = rotary_frequencies(model.config)
        assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)
        assert scale == model.model.rotary_emb.attention_scaling


def test_old_rope_scaling_spelling_is_read() -> None:
    old = read(llama(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2}))
    new = read(llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000, "factor": 2.0}))
    assert old == new


def test_auto_map_is_dropped() -> None:
    hf_config = parse_config(llama(auto_map={"AutoConfig": "evil.EvilConfig"}))
    assert type(hf_config) is LlamaConfig
    assert not hasattr(hf_config, "auto_map")
