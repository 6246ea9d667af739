"""A frozen decoder block around its attention, for few rows on a CPU: two native calls.

    x        = rms_norm(h, attention_norm)                                       h [T, D]
    q, k, v  = x W_q^T + b_q, x W_k^T + b_k, x W_v^T + b_v                       [T, Hq, d], [T, Hkv, d], [T, Hkv, d]
    q, k     = rotary(rms_norm(q, query_norm)), rotary(rms_norm(k, key_norm))    norms where the block has them
    u        = h + attention(q, k, v) W_o^T
    gate, up = x W_gate^T, x W_up^T                                              x = rms_norm(u, mlp_norm)
    out      = u + (silu(gate) * up) W_down^T

Decoding a token with a model of 0.5B weights, the checks, plans and calls around the some 15 kernels of a block took
longer than the kernels. The bits are those of `rms_norm`, `nf4_linear`, `rotary` and `swiglu` called one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.checks import COMPUTE_DTYPES, check_contiguous, check_dtype, check_like, check_shape
from ladder_kernels.dispatch import runs_eagerly
from ladder_kernels.launch import reads_packed
from ladder_kernels.native_abi import DecoderBlock
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.workspace import Workspace

_OP = "decoder_block"


class PackedLinear(NamedTuple):
    """A frozen y = x W^T + b: weight [N, K], bias [N] in the dtype of the hidden states, or None."""

    weight: NF4Weight
    bias: Tensor | None = None


class DecoderWeights(NamedTuple):
    """The weights of a decoder block: seven linears, attention_norm and mlp_norm [D], query_norm and key_norm [d] or
    both None."""

    query: PackedLinear
    key: PackedLinear
    value: PackedLinear
    output: PackedLinear
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        """The linears, in order."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    @property
    def norms(self) -> tuple[Tensor | None, ...]:
        """The norms, in order."""
        return (self.attention_norm, self.mlp_norm, self.query_norm, self.key_norm)

    @property
    def key_size(self) -> int | None:
        """d, where the block norms its keys; else the rotary tables tell."""
        return None if self.key_norm is None else self.key_norm.numel()

    def tensors(self) -> list[Tensor]:
        """All that kernels read."""
        linears = [tensor for weight, bias in self.linears for tensor in (*weight.tensors[:-1], bias)]
        return [tensor for tensor in (*linears, *self.norms) if tensor is not None]


class PackedDecoderBlock:
    """A block whose weights are checked once and whose few rows are computed natively.

    Where the weights lie is looked up at every call, so they may move, or change, between calls.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices of the weights disagree.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        _check_weights(weights)
        self._weights = weights
        self._tensors = weights.tensors()
        self._sizes = {(weight.shape[1], weight.block_size) for weight, _ in weights.linears}
        self._is_plain = all(type(tensor) is Tensor and tensor.is_cpu for tensor in self._tensors)
        self._addresses: list[int] = []
        self._structure = DecoderBlock()

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        epsilon: float,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        workspace: Workspace,
    ) -> Tensor | None:
        """The block's output [T, D]; None where kernels that read packed weights cannot compute it here and now.

        Args:
            hidden: [T, D] of the norms' dtype.
            cos, sin: [T, d] in that dtype, the rotary table of the rows.
            epsilon: added to the mean square in all norms.
            attend: attention of rotated query [T, Hq, d], key and value [T, Hkv, d] -> [T, Hq d].
            workspace: keeps the scratch between calls.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices disagree.
        """
        if not self._applies(hidden, cos, sin):
            return None
        self._check_rows(hidden, cos, sin)
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            self._structure, self._addresses = native.decoder_structure(self._weights), addresses
        query, key, value = native.decoder_heads(self._structure, hidden, cos, sin, epsilon, workspace)
        mixed = attend(query, key, value)
        check_like(_OP, "the result of attend", mixed, (hidden.shape[0], self._weights.output.weight.shape[1]), hidden)
        return native.decoder_mlp(self._structure, mixed.contiguous(), hidden, epsilon, workspace)

    def _applies(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
        if not (self._is_plain and hidden.is_cpu and hidden.dim() == 2 and runs_eagerly(hidden, cos, sin)):
            return False
        if hidden.requires_grad and torch.is_grad_enabled():
            return False
        tokens, isa = hidden.shape[0], native.isa()
        return all(reads_packed(tokens, cols, block_size, isa) for cols, block_size in self._sizes)

    def _check_rows(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        weights, tokens = self._weights, hidden.shape[0]
        check_like(_OP, "hidden", hidden, (tokens, *weights.attention_norm.shape), weights.attention_norm)
        check_contiguous(_OP, "hidden", hidden)
        check_shape(_OP, "cos", cos, (tokens, "d"))
        size, (rows, kv_rows) = cos.shape[1], (weights.query.weight.shape[0], weights.key.weight.shape[0])
        if size == 0 or size % 2 or rows % size or kv_rows % size or weights.key_size not in (None, size):
            expected = "of even d that divides" if weights.key_size is None else f"of d = {weights.key_size} for"
            raise ValueError(
                f"{_OP}: expected cos [T, d] {expected} {rows} and {kv_rows} rows of query and key, got {size}"
            )
        for name, table in (("cos", cos), ("sin", sin)):
            check_like(_OP, name, table, (tokens, size), hidden)
            check_contiguous(_OP, name, table)


def _check_weights(weights: DecoderWeights) -> None:
    norm = weights.attention_norm
    check_dtype(_OP, "attention_norm", norm.dtype, COMPUTE_DTYPES)
    rows, width = weights.query.weight.shape
    kv_rows, inner = weights.key.weight.shape[0], weights.gate.weight.shape[0]
    if kv_rows > rows:  # the scratch of a projection is as wide as the queries
        raise ValueError(f"{_OP}: expected at most as many rows of key as of query, {rows}, got {kv_rows}")
    heads, mlp = ((rows, width), (kv_rows, width), (kv_rows, width), (width, rows)), (inner, width)
    shapes = (*heads, mlp, mlp, (width, inner))
    for name, (weight, bias), shape in zip(weights._fields[:7], weights.linears, shapes, strict=True):
        if weight.shape != shape:
            raise ValueError(f"{_OP}: expected {name} of shape {list(shape)}, got {list(weight.shape)}")
        if bias is not None:
            check_like(_OP, f"the bias of {name}", bias, shape[:1], norm)
            check_contiguous(_OP, f"the bias of {name}", bias)
    if (weights.query_norm is None) != (weights.key_norm is None):
        raise ValueError(f"{_OP}: expected query_norm and key_norm, or none of them, got one")
    sizes = (width, width, weights.key_size or 0, weights.key_size or 0)
    for name, tensor, size in zip(weights._fields[7:], weights.norms, sizes, strict=True):
        if tensor is not None:
            check_like(_OP, name, tensor, (size,), norm)
            check_contiguous(_OP, name, tensor)
