"""Bytes that one frozen block takes while it computes, in either direction."""

from __future__ import annotations

from engine.backbone.chunks import chunk_tokens
from engine.backbone.decoder import gradient_bytes_per_token
from engine.backbone.families import BackboneConfig
from ladder_kernels.frozen_norm import slice_rows


def forward_bytes(backbone: BackboneConfig, rows: int, itemsize: int, is_input_kept: bool, has_kernels: bool) -> int:
    """Activations at the worst moment of a forward pass, the stages in slices where they are long.

    Args:
        is_input_kept: whether the block's input is counted elsewhere.
        has_kernels: whether element-wise passes write in place instead of making intermediates.
    """
    width, inner = backbone.hidden_size, backbone.intermediate_size
    queries, keys = backbone.num_heads * backbone.head_dim, backbone.num_kv_heads * backbone.head_dim
    heads = queries + 2 * keys
    size = chunk_tokens(rows, (width + 2 * heads) * itemsize)
    # Normed states, then heads before and after the rotation, v only once.
    projections = size * (width + 2 * heads - keys) + (rows * heads if size < rows else 0)
    size = chunk_tokens(rows, 2 * (width + inner) * itemsize)
    # Normed states, gate and up; the hidden states are there in full.
    mlp = rows * width + size * (width + (2 if has_kernels else 4) * inner)
    attention = max(projections, rows * (heads + queries)) + (0 if is_input_kept else rows * width)
    return itemsize * (max(attention, mlp) + rows * 2 * backbone.head_dim)


def gradient_bytes(backbone: BackboneConfig, rows: int, itemsize: int) -> int:
    """Activations of one block computed again for a gradient that passes through it, at the worst moment.

    All rows have rotated heads, what the attention mixed, its sum with the input and two gradients; where heads have
    norms, also the heads before them. Beside that comes the MLP, or a slice of such a norm at 26 bytes a number. Rows
    of a slice of the MLP have six of its width, or four beside a decoded matrix: gate, up, silu, and the gradients of
    their product.
    """
    width, inner = backbone.hidden_size, backbone.intermediate_size
    queries, keys = backbone.num_heads * backbone.head_dim, backbone.num_kv_heads * backbone.head_dim
    size = chunk_tokens(rows, gradient_bytes_per_token(backbone, itemsize))
    mlp = size * width + max(6 * size * inner, 4 * size * inner + width * inner)
    normed, norms = 0, 0
    if backbone.qk_norm:
        normed = queries + keys
        norms = 26 * min(rows * backbone.num_heads, slice_rows(backbone.head_dim)) * backbone.head_dim
    kept = rows * (2 * queries + 2 * keys + normed + 3 * width + 2 * backbone.head_dim)
    return itemsize * kept + max(itemsize * mlp, norms)
