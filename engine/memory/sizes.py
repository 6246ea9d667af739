"""Bytes and numbers of weights, from shapes alone."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import nn

from engine.backbone.families import BackboneConfig, ExpectedTensor, expected_tensors
from engine.backbone.layout import ALIGNMENT, PAGE, round_up
from engine.config import LadderConfig
from engine.model.side_network import SideNetwork
from ladder_kernels.reference import ABSMAX_BLOCK, INT8_GROUP

NF4_BLOCK = 64
_MOMENT_BLOCK = 256  # of 8-bit AdamW (torchao)
_NF4_TABLES = 4 * (16 + 256 + 1)  # codebook, map of the scales, their offset, fp32


def nf4_bytes(rows: int, columns: int) -> int:
    """A double-quantized NF4 matrix: half a byte a weight, a byte a block of 64, four bytes a block of 256 of those."""
    blocks = -(-rows * columns // NF4_BLOCK)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // ABSMAX_BLOCK) + _NF4_TABLES


def int8_bytes(rows: int, columns: int) -> int:
    """An int8 matrix with one fp32 scale for each group of 64 columns of a row."""
    return rows * columns + 4 * rows * -(-columns // INT8_GROUP)


def head_bytes(rows: int, columns: int, head_dtype: str, itemsize: int) -> int:
    """An output matrix in the compute dtype ("dense"), as int8 with one fp32 scale for each row, or as NF4."""
    sizes = {"dense": itemsize * rows * columns, "int8": rows * (columns + 4), "nf4": nf4_bytes(rows, columns)}
    return sizes[head_dtype]


def moment_bytes(trained: int, optimizer: str) -> int:
    """AdamW's two moments of so many parameters: fp32 ("adamw"), or bytes with one fp32 scale for each 256."""
    return 8 * trained if optimizer == "adamw" else 2 * (trained + 4 * -(-trained // _MOMENT_BLOCK))


@lru_cache(maxsize=64)
def layer_bytes(backbone: BackboneConfig, itemsize: int) -> int:
    """One packed decoder block with its norms and biases."""
    tensors = layer_tensors(backbone)
    packed = sum(nf4_bytes(*tensor.shape) for tensor in tensors if tensor.linear)
    return packed + itemsize * sum(math.prod(tensor.shape) for tensor in tensors if not tensor.linear)


def staged_layer_bytes(backbone: BackboneConfig, itemsize: int) -> int:
    """The same as one buffer, see `engine.backbone.layout`: tensors at multiples of 256 bytes, in whole pages."""
    sizes: list[int] = []
    for tensor in layer_tensors(backbone):
        count = math.prod(tensor.shape)
        if tensor.linear:
            blocks = -(-count // NF4_BLOCK)
            sizes += (-(-count // 2), blocks, 4 * 16, 4 * -(-blocks // ABSMAX_BLOCK), 4 * 256, 4)
        else:
            sizes.append(itemsize * count)
    return round_up(sum(round_up(size, ALIGNMENT) for size in sizes), PAGE)


@lru_cache(maxsize=64)
def layer_tensors(backbone: BackboneConfig) -> tuple[ExpectedTensor, ...]:
    """What one decoder block is made of."""
    prefix = backbone.names.layer.format(0)
    return tuple(tensor for name, tensor in expected_tensors(backbone).items() if name.startswith(prefix))


@lru_cache(maxsize=64)
def side_parameters(backbone: BackboneConfig, config: LadderConfig) -> int:
    """Trained parameters of the side network."""
    return count(meta_side_network(backbone, config))


@lru_cache(maxsize=64)
def meta_side_network(backbone: BackboneConfig, config: LadderConfig) -> SideNetwork:
    """The side network without memory."""
    with torch.device("meta"):
        return SideNetwork(config, backbone)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
