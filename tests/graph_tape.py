"""A stand-in for CUDA graphs on a CPU: a tape of every operation below autograd, with the memory it read and wrote.

Like a graph it holds tensors and numbers and no Python: what the host decided while it was recorded stays decided.
Capturing leaves memory from outside as it was, reading a value on the host is an error, and what a replay has not yet
written holds NaN, as memory of a shared pool holds anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Dispatched(TorchDispatchMode):
    """Operations take the form they have on a tape: some CPU kernels round elsewhere without the dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Records the operations of its context; `replay` does them again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._own: dict[int, Tensor] = {}  # the first tensor on every storage that was made here
        self._outer: list[tuple[Tensor, Tensor]] = []  # memory from outside, and what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _HOST_READS & set(func.tags):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(written):
                    if _storage(tensor) not in self._own:
                        self._outer.append((tensor, tensor.clone()))
        out = func(*args, **kwargs)
        read = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if _storage(tensor) not in read:
                self._own[_storage(tensor)] = tensor
        self._calls.append((func, args, kwargs, out))
        return out

    def rewind(self) -> None:
        """Undo what the recorded operations did to memory from outside."""
        for tensor, before in reversed(self._outer):
            tensor.detach().copy_(before)
        self._outer.clear()

    def replay(self) -> None:
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for tensor in self._own.values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
            for func, args, kwargs, out in self._calls:
                for recorded, value in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                    if _storage(recorded) != _storage(value):
                        recorded.copy_(value)


class TapeGraphs:
    """`engine.training.step_graph.GraphMaker` of a CPU; counts what it is asked for."""

    def __init__(self) -> None:
        self.runs = 0
        self.tapes: list[Tape] = []

    @property
    def replays(self) -> int:
        return sum(tape.replays for tape in self.tapes)

    def run(self, call: Callable[[], Tensor]) -> Tensor:
        self.runs += 1
        with Dispatched():
            return call()

    def capture(self, call: Callable[[], Tensor]) -> tuple[Tape, Tensor]:
        tape = Tape()
        try:
            with tape:
                out = call()
        finally:
            tape.rewind()
        self.tapes.append(tape)
        return tape, out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
