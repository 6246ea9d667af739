"""Where kernels are launched, and how many for a side layer: by stand-ins, which need no GPU, not to speak of two."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ladder_kernels.gpu
from ladder_kernels import SideLayerWeights
from ladder_kernels.gpu import side_layer as gpu
from ladder_kernels.gpu.launcher import launch
from ladder_kernels.side_layer import SideLayerCall, SideLayerShape

FLASH_BACKWARD = 3  # launches of flash attention's backward where every query head has a key head of its own


class Kernel:
    """Notes the current device, the grid and the arguments of every launch."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.seen.append(
            (torch.cuda.current_device(), grid, arguments[1:], options)
        )


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu"])
def test_current_device_is_that_of_the_tensors(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    current, entered = [0], []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        entered.append(device)
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    kernel, place = Kernel(), torch.device(device)
    launch(kernel, (3, 2), SimpleNamespace(device=place), 7, BLOCK=64)
    assert kernel.seen == [(1 if device == "cuda:1" else 0, (3, 2), (7,), {"BLOCK": 64})]
    # The current device is left alone where it is the right one.
    assert entered == ([place] if device == "cuda:1" else [])


def test_every_launch_is_made_there() -> None:
    launches = []
    for path in Path(ladder_kernels.gpu.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # kernel[grid](...)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and "kernel" in ast.dump(node.func):
                launches.append(path.name)
    assert set(launches) == {"launcher.py"}


class Operations(TorchDispatchMode):
    """Torch operations that would be launches on a GPU, which views and allocations are not."""

    FREE = ("empty", "empty_like", "new_empty", "view", "split_with_sizes", "slice", "detach", "transpose", "t")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("width", "forward", "backward"), [(64, 3, 11), (384, 3, 11), (416, 5, 14), (1024, 5, 14)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_a_side_layer(
    monkeypatch: pytest.MonkeyPatch, width: int, forward: int, backward: int, weight_dtype: torch.dtype
) -> None:
    """Two query heads share a key head. Kernels compute nothing here, torch operations really run."""
    launches: list[str] = []

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            launches.append("attention")
            ctx.shapes = query.shape, key.shape, value.shape
            return query.new_empty(len(query), width)

        @staticmethod
        def backward(ctx: Any, dmixed: Tensor) -> tuple[Tensor, ...]:
            assert len(set(ctx.shapes)) == 1, "gradients of grouped heads would be added up in two more launches"
            launches.extend(["attention backward"] * FLASH_BACKWARD)
            return tuple(dmixed.new_empty(shape) for shape in ctx.shapes)

    monkeypatch.setattr(gpu, "_launch", lambda kernel, *_: launches.append(kernel.__name__))
    shape, tokens, inner = SideLayerShape(width // 32, width // 64, 32, (5, 8), 1e-6), 13, width
    if width % 64:
        shape = shape._replace(kv_heads=1)
    qkv = (shape.heads + 2 * shape.kv_heads) * 32
    shapes = ((width,), (qkv, width), (width, width), (width,), (2 * inner, width), (width, inner))
    weights = SideLayerWeights(*(torch.zeros(size, dtype=weight_dtype) for size in shapes))
    state, table = torch.zeros(tokens, width, dtype=torch.bfloat16), torch.zeros(tokens, 32, dtype=torch.bfloat16)
    call = SideLayerCall(table, table, None, shape, Attention.apply)
    with Operations() as operations:
        gpu.side_layer(state, weights, call)
        assert len(launches) + len(operations.names) == forward
        launches.clear(), operations.names.clear()
        gpu.side_layer_backward(state, state, weights, call)
        assert set(operations.names) == {"mm"}
        assert len(launches) + len(operations.names) == backward
