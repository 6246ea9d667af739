"""Hidden states that wait in host memory: same gradients, nothing left behind, fetched ahead of their backward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from numerics import assert_same_bits
from torch import Tensor

from engine.model import tap_store
from engine.model.tap_store import TapKeeper, TapPolicy, check_tap_policy

LAYERS, TOKENS, WIDTH, SIDE = 4, 7, 24, 6


def climb(hidden: list[Tensor], weights: list[Tensor], gate: Tensor, policy: TapPolicy) -> Tensor:
    keeper, state = TapKeeper(policy), None
    for h, weight in zip(hidden, weights, strict=True):
        state = keeper.tap(h, weight, state, None if state is None else gate)
    assert state is not None
    return state


@pytest.fixture
def inputs() -> tuple[list[Tensor], list[Tensor], Tensor]:
    hidden = [torch.randn(TOKENS, WIDTH) for _ in range(LAYERS)]
    weights = [torch.randn(SIDE, WIDTH, requires_grad=True) for _ in range(LAYERS)]
    return hidden, weights, torch.tensor(0.3, requires_grad=True)


def test_gradients_come_from_the_copies(inputs: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
    hidden, weights, gate = inputs
    leaves = [*weights, gate]
    dout = torch.randn(TOKENS, SIDE)
    expected = torch.autograd.grad(climb(hidden, weights, gate, "device"), leaves, dout)
    out = climb(hidden, weights, gate, "host")
    for h in hidden:
        h.fill_(torch.nan)
    for again in range(2):  # a graph that is kept can be walked again
        actual = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        for name, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(f"pass {again}, leaf {name}", ours, theirs)


def test_nothing_holds_the_hidden_states(inputs: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
    hidden, weights, gate = inputs
    out = climb(hidden, weights, gate, "host")
    alive = [weakref.ref(h.untyped_storage()) for h in hidden]
    hidden.clear()
    del inputs
    gc.collect()
    assert out.requires_grad and not any(ref() for ref in alive)


def test_copies_are_fetched_one_ahead_and_freed(
    inputs: tuple[list[Tensor], list[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weights, gate = inputs
    events: list[tuple[str, int]] = []
    copies: list[weakref.ref[tap_store._HostCopy]] = []

    class Spied(tap_store._HostCopy):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.number = len(copies)
            copies.append(weakref.ref(self))

        def fetch(self) -> None:
            if self._arriving is None:
                events.append(("fetch", self.number))
            super().fetch()

        def fetched(self) -> Tensor:
            tensor = super().fetched()
            events.append(("use", self.number))
            return tensor

    monkeypatch.setattr(tap_store, "_HostCopy", Spied)
    out = climb(hidden, weights, gate, "host")
    assert [ref() is not None for ref in copies] == [True] * LAYERS and events == []
    out.backward(torch.ones_like(out))
    last = LAYERS - 1
    expected = [("fetch", last)]
    for number in range(last, -1, -1):
        expected += [("fetch", number - 1)] * (number > 0) + [("use", number)]
    assert events == expected
    assert not any(ref() for ref in copies)


def test_other_tensors_are_saved_as_they_are() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    state, gate = torch.randn(3, 2), torch.tensor(0.5, requires_grad=True)
    out = TapKeeper("host").tap(hidden, weight, state, gate)
    assert out.grad_fn is not None
    saved = {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}  # type: ignore[attr-defined]
    assert {weight.data_ptr(), state.data_ptr(), gate.data_ptr()} <= saved and hidden.data_ptr() not in saved


def test_memory_that_cannot_be_pinned_is_pageable_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, shape, dtype = True, torch.Size((3, 4)), torch.float16

    empty = torch.empty

    def refuses_pinning(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nhost allocation failed")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refuses_pinning)
    tap_store._warn_pageable.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"no more host memory.*taps \(CUDA error: out of memory\); .*taps int8"
    ) as said:
        buffers = [tap_store._host_buffer(OnGpu()) for _ in range(3)]  # type: ignore[arg-type]
    assert len(said) == 1
    assert all(buffer.shape == (3, 4) and buffer.dtype == torch.float16 for buffer in buffers)


def test_policies_are_checked() -> None:
    check_tap_policy("host")
    with pytest.raises(ValueError, match="taps must be one of device, int8, host, none, got 'cpu'"):
        check_tap_policy("cpu")
