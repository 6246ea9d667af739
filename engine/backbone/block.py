"""The frozen weights of a decoder block, packed or dense, and what multiplies by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ladder_kernels import (
    DecoderWeights,
    NF4Weight,
    PackedDecoderBlock,
    PackedLinear,
    Workspace,
    frozen_linear,
    nf4_linear,
)


@dataclass(frozen=True)
class Linear:
    """A frozen y = x W^T + b with W [N, K] packed NF4 or dense, b [N] or None."""

    weight: NF4Weight | Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, workspace: Workspace, residual: Tensor | None = None) -> Tensor:
        """x W^T + b, plus the residual [T, N]; differentiable in both."""
        if not isinstance(self.weight, NF4Weight):
            out = F.linear(x, self.weight, self.bias)
        elif wants_gradient(x, residual):
            out = frozen_linear(x, self.weight, self.bias, workspace=workspace)
        else:
            return nf4_linear(x, self.weight, self.bias, residual, workspace=workspace)
        return out if residual is None else residual + out

    def map(self, fn: Callable[[Tensor], Tensor]) -> Linear:
        """The same with `fn` applied to every tensor."""
        weight = self.weight.map(fn) if isinstance(self.weight, NF4Weight) else fn(self.weight)
        return Linear(weight, None if self.bias is None else fn(self.bias))


@dataclass(frozen=True)
class Block:
    """The frozen weights of one decoder block."""

    attention_norm: Tensor
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None

    @cached_property
    def packed(self) -> PackedDecoderBlock | None:
        """The block as native kernels compute it for few rows; None unless all linears are packed, on a CPU."""
        if not self.attention_norm.is_cpu:
            return None
        linears: list[PackedLinear] = []
        for linear in (self.query, self.key, self.value, self.output, self.gate, self.up, self.down):
            if not isinstance(linear.weight, NF4Weight):
                return None
            linears.append(PackedLinear(linear.weight, linear.bias))
        norms = (self.attention_norm, self.mlp_norm, self.query_norm, self.key_norm)
        return PackedDecoderBlock(DecoderWeights(*linears, *norms))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Block:
        """The same with `fn` applied to every tensor, in an order that depends on the block's fields alone."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Block(
            **{
                name: value.map(fn) if isinstance(value, Linear) else None if value is None else fn(value)
                for name, value in values.items()
            }
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor, packed weights with all their parts, in the order of `map`."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(keep)
        return found


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on one of them."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
