"""Optimizer, schedule and random state through JSON and safetensors: back to the bit, or refused."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoints.state import (
    load_optimizer_state,
    load_state,
    random_state,
    restore_random_state,
    save_state,
)
from engine.checkpoints.store import CheckpointError

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TENSORS = st.sampled_from(
    [torch.tensor(1.5), torch.arange(6).view(2, 3).T, torch.zeros(0, 3), torch.tensor([math.nan, -0.0]).bfloat16()]
)
STATES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and repr(one) == repr(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@given(state=STATES)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_states_come_back(tmp_path: Path, state: Any) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    save_state(tmp_path, "state", state)
    assert same(load_state(tmp_path, "state"), state)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))

    draw()
    save_state(tmp_path, "random", random_state())
    expected = [draw() for _ in range(3)]
    restore_random_state(load_state(tmp_path, "random"))
    assert [draw() for _ in range(3)] == expected


def test_random_state_of_other_gpus_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=rf"random states of 7 GPUs, this process sees {torch.cuda.device_count()}"
    ):
        restore_random_state(random_state() | {"cuda": [torch.zeros(1)] * 7})


def trained(optimizer_class: Any, **options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Linear(80, 3))
    optimizer = optimizer_class(
        [{"params": model[0].parameters()}, {"params": model[1].parameters(), "weight_decay": 0.1}], lr=1e-3, **options
    )
    step(model, optimizer, 2)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        optimizer.zero_grad()
        model(torch.full((4, 64), 0.1 * number)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "adafactor"])
def test_an_optimizer_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"fused": True} if kind == "adamw" else {}
    if kind == "adamw_8bit":
        from torchao.optim import AdamW8bit as optimizer_class
    else:
        optimizer_class = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[kind]
    model, optimizer = trained(optimizer_class, **options)
    weights = copy.deepcopy(model.state_dict())
    save_state(tmp_path, "optimizer", optimizer.state_dict())
    step(model, optimizer, 3)
    again, fresh = trained(optimizer_class, **options)
    again.load_state_dict(weights)
    load_optimizer_state(fresh, load_state(tmp_path, "optimizer"), tmp_path)
    step(again, fresh, 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_the_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    _, optimizer = trained(torch.optim.AdamW)
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"another kind of optimizer .*resume with the one it was saved with"):
        load_optimizer_state(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))]), state, tmp_path)
    fewer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(CheckpointError, match="state of 4 trained tensors in 2 groups, here are 1 in 1: resume with"):
        load_optimizer_state(fewer, state, tmp_path)
    state["state"][0]["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"exp_avg of tensor 0 has shape \(3, 3\), its parameter \(80, 64\)"):
        load_optimizer_state(optimizer, state, tmp_path)


class Payload:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Payload, "ran", True))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    for state in ({"a": [Payload()]}, {1.5: 1}, {"a": {(1,): 2}}, {"f": print}):
        with pytest.raises(TypeError, match="cannot be saved"):
            save_state(tmp_path, "state", state)
    assert not list(tmp_path.iterdir())
    torch.save({"a": Payload()}, tmp_path / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json: is not the state that was saved"):
        load_state(tmp_path, "state")
    assert not Payload.ran


@pytest.mark.parametrize("text", ["", "{", '{"tensor": "9"}', '{"class": 1}', '{"pairs": 3}', "[" * 200_000])
def test_files_of_another_making_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json: is not the state that was saved"):
        load_state(tmp_path, "state")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler\.json: is missing, and training would silently go on"):
        load_state(tmp_path, "scheduler")
