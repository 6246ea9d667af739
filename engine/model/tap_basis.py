"""Taps that start with what the backbone reads of its hidden states, in place of random directions.

    G = sum over the matrices W that read hidden states of (W n)^T (W n) / |W n|^2
    P = eigenvectors of the S largest eigenvalues of G, [S, D]

with n the gain of the RMSNorm before a matrix: q, k, v, gate and up of every block. Of all orthonormal P it keeps most
of what those matrices make of a hidden state. All taps start as P, so that side layers pass one basis on.

A pruned start in which side layers are cut out of the backbone's as well (LST, arXiv 2206.06522) gains little beyond
the taps: benchmarks/quality/TRIED.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.backbone import Backbone
from engine.backbone.block import Linear
from engine.model.side_network import SideNetwork
from ladder_kernels import NF4Weight, dequantize_nf4

_ROWS = 4096  # of a matrix that are fp32 at a time


@torch.no_grad()
def start_at_basis(network: SideNetwork, backbone: Backbone) -> None:
    """Overwrite the taps of a new side network; where S is above D, rounded up, rows beyond D stay random."""
    basis = tap_basis(backbone, network.dims.side_dim)
    for tap in network.all_taps:
        tap.weight[: len(basis)].copy_(basis)


@torch.no_grad()
def tap_basis(backbone: Backbone, size: int) -> Tensor:
    """P [min(size, D), D], fp32, on the backbone's device; a row's largest component is positive, which fixes its sign.

    Weights are decoded one at a time, in the compute dtype: for a 32B backbone half a gigabyte, before training.
    """
    width = backbone.config.hidden_size
    total = torch.zeros(width, width, device=backbone.device)
    for block in backbone.blocks:
        for norm, linears in (
            (block.attention_norm, (block.query, block.key, block.value)),
            (block.mlp_norm, (block.gate, block.up)),
        ):
            gain = norm.to(backbone.device, torch.float32)
            for linear in linears:
                gram = _gram(_decoded(linear, backbone)) * gain.outer(gain)
                total += gram / gram.trace().clamp(min=torch.finfo(torch.float32).tiny)
    vectors = torch.linalg.eigh(total).eigenvectors.flip(1)[:, :size].T
    return vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()


def _gram(weight: Tensor) -> Tensor:
    """W^T W in fp32."""
    total = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    for part in weight.split(_ROWS):
        wide = part.float()
        total.addmm_(wide.T, wide)
    return total


def _decoded(linear: Linear, backbone: Backbone) -> Tensor:
    weight = linear.weight
    dense = dequantize_nf4(weight, backbone.dtype) if isinstance(weight, NF4Weight) else weight
    return dense.to(backbone.device)
