"""LadderConfig: presets, validation of untrusted values, and the sizes derived from a backbone."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import PRESETS, LadderConfig, side_dims


def shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Any:
    return SimpleNamespace(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )


def test_presets_are_what_the_papers_describe() -> None:
    ladder, xladder, lst, qst = (LadderConfig.preset(name) for name in ("ladder", "xladder", "lst", "qst"))
    assert ladder == LadderConfig()
    assert (ladder.connection, ladder.output, ladder.merge, ladder.gate_temperature) == (
        "ladder",
        "residual",
        "lst",
        0.1,
    )
    assert (xladder.connection, xladder.output, xladder.tap_embeddings) == ("xladder", "residual", False)
    assert (lst.output, lst.tap_embeddings, lst.tap_down) == ("side_only", True, "linear")
    assert (qst.output, qst.tap_embeddings, qst.tap_down, qst.tap_rank) == ("mix", True, "adapter", 16)
    assert LadderConfig.preset("rejoin").rejoin == 0.5 and ladder.rejoin == 0
    assert all(LadderConfig.preset(name).preset_name == name for name in PRESETS)


def test_preset_takes_overrides() -> None:
    config = LadderConfig.preset("xladder", reduction_factor=8, num_taps=3)
    assert (config.reduction_factor, config.num_taps, config.connection) == (8, 3, "xladder")


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LadderConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = LadderConfig.preset(name, seed=2**62, reduction_factor=3)
    assert LadderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"side_dim": 64}, r"unknown ladder configuration keys \['side_dim'\]; known keys: preset_name"),
        ({"preset_name": "rope"}, "preset_name must be one of ladder, xladder, lst, qst, rejoin, got 'rope'"),
        ({"merge": ["lst"]}, "merge must be one of lst, sum"),
        ({"tap_down": "conv"}, "tap_down must be one of linear, low_rank, adapter, avg_pool, max_pool, got 'conv'"),
        ({"output": None}, "output must be one of"),
        ({"reduction_factor": 0}, "reduction_factor must be an integer from 1 to 1024, got 0"),
        ({"reduction_factor": 10**12}, "reduction_factor must be an integer"),
        ({"reduction_factor": 16.0}, "reduction_factor must be an integer"),
        ({"reduction_factor": True}, "reduction_factor must be an integer"),
        ({"reduction_factor": None}, "reduction_factor must be an integer"),
        ({"num_side_layers": 10**9}, "num_side_layers must be an integer"),
        ({"tap_rank": "16"}, "tap_rank must be an integer"),
        ({"seed": -1}, "seed must be an integer"),
        ({"tap_embeddings": 1}, "tap_embeddings must be true or false, got 1"),
        ({"gate_temperature": 0}, "gate_temperature must be a number from 0.001 to 1000, got 0"),
        ({"gate_temperature": float("nan")}, "gate_temperature must be a number"),
        ({"gate_temperature": float("inf")}, "gate_temperature must be a number"),
        ({"gate_temperature": "0.1"}, "gate_temperature must be a number"),
        ({"num_taps": 2}, "num_taps=2 belongs to connection='xladder'.*set tap_every, or use the preset xladder"),
        ({"connection": "xladder", "tap_every": 2}, "tap_every=2 belongs to connection='ladder'.*set num_taps"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LadderConfig.from_dict(values)


def test_wrong_containers_are_refused() -> None:
    with pytest.raises(ValueError, match="a ladder configuration is a JSON object, got list"):
        LadderConfig.from_dict([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown preset 'lora'; expected one of ladder, xladder, lst, qst"):
        LadderConfig.preset("lora")
    with pytest.raises(ValueError, match=r"unknown ladder configuration keys \['rank'\]"):
        LadderConfig.preset("qst", rank=4)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(sorted(LadderConfig().to_dict())) | st.text(max_size=4), _JSON, max_size=4))
def test_any_json_either_gives_a_valid_config_or_a_value_error(values: dict[str, Any]) -> None:
    try:
        config = LadderConfig.from_dict(values)
    except ValueError:
        return
    assert LadderConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("backbone", "reduction_factor", "expected"),
    [
        pytest.param(shape(3584, 18944, 28, 28, 4), 16, (224, 32, 7, 1, 1184), id="qwen2.5-7b"),
        pytest.param(shape(3584, 18944, 28, 28, 4), 8, (448, 64, 7, 1, 2368), id="qwen2.5-7b-r8"),
        pytest.param(shape(4096, 11008, 32, 32, 32), 16, (256, 64, 4, 4, 704), id="llama-2-7b"),
        pytest.param(shape(896, 4864, 24, 14, 2), 16, (64, 64, 1, 1, 320), id="qwen2.5-0.5b"),
        pytest.param(shape(2048, 11008, 36, 16, 2), 16, (128, 64, 2, 1, 704), id="qwen2.5-3b-ratio-does-not-fit"),
        pytest.param(shape(8192, 28672, 80, 64, 8), 16, (512, 64, 8, 1, 1792), id="llama-70b"),
        pytest.param(shape(48, 100, 2, 4, 2), 1024, (32, 32, 1, 1, 32), id="tiny"),
    ],
)
def test_side_dims(backbone: Any, reduction_factor: int, expected: tuple[int, ...]) -> None:
    assert dataclasses.astuple(side_dims(backbone, reduction_factor)) == expected


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 2**14), st.integers(1, 2**16), st.integers(1, 16), st.integers(1, 64), st.integers(1, 1024))
def test_side_dims_always_form_a_layer(hidden: int, inner: int, group: int, kv_heads: int, factor: int) -> None:
    dims = side_dims(shape(hidden, inner, 2, group * kv_heads, kv_heads), factor)
    assert dims.side_dim % 32 == 0
    assert dims.intermediate_size % 32 == 0
    assert 0 <= dims.side_dim - hidden / factor < 32
    assert dims.num_heads * dims.head_dim == dims.side_dim
    assert dims.num_heads % dims.num_kv_heads == 0
    assert dims.num_heads // dims.num_kv_heads <= group
