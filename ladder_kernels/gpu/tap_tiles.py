"""Launch configurations of the tap: pure functions of shape and width of the types."""

from __future__ import annotations

from typing import NamedTuple

from ladder_kernels.reference import INT8_GROUP

FEW_TOKENS = 32  # text decoding: bound by reading the weight, so more thread blocks, each with more in flight
MANY_TOKENS = 4096  # from here on tall tiles, which read the weight half as often, are enough to fill a large card
ELEMENTS = 2048  # of an elementwise pass, per thread block of 128 threads

_THREAD_BLOCKS = 128  # most of a large card
_PART_TOKENS = 512  # parts with fewer tokens cost more to add up than they save


class ForwardTile(NamedTuple):
    """One thread block: tokens x side outputs, `width` columns of h at a time."""

    tokens: int
    side: int
    width: int
    num_warps: int
    num_stages: int


class GradientTile(NamedTuple):
    """One thread block: side x width of dweight, `tokens` at a time."""

    side: int
    width: int
    tokens: int
    num_warps: int
    num_stages: int


class Parts(NamedTuple):
    """How the tokens are split for more thread blocks."""

    count: int
    tokens: int


def forward_tile(tokens: int, itemsize: int, keep_int8: bool) -> ForwardTile:
    """Tile for h [tokens, D] with items of `itemsize` bytes."""
    if itemsize == 4:  # no tensor cores: products and sums in fp32
        return ForwardTile(32, 32, INT8_GROUP, 4, 2)
    if tokens <= FEW_TOKENS and not keep_int8:
        return ForwardTile(16, 16, 128, 4, 3)
    if tokens < MANY_TOKENS:
        return ForwardTile(64, 64, INT8_GROUP, 4, 3)
    return ForwardTile(128, 64, INT8_GROUP, 8, 3)


def gradient_tile(itemsize: int, is_int8: bool) -> GradientTile:
    """Tile for dweight from dout with items of `itemsize` bytes, and h or its int8 codes."""
    if itemsize == 4:
        return GradientTile(32, 32, 32, 4, 2)
    # Decoded codes wait in registers: 64 tokens of them spill on sm_86.
    return GradientTile(64, INT8_GROUP, 32, 4, 4) if is_int8 else GradientTile(64, INT8_GROUP, 64, 4, 3)


def gradient_parts(tokens: int, side: int, width: int, tile: GradientTile) -> Parts:
    """Parts of the sum over tokens for dweight [side, width]: equal but for the last, whole tiles, never empty."""
    blocks = -(-side // tile.side) * -(-width // tile.width)
    wanted = max(1, min(_THREAD_BLOCKS // max(1, blocks), tokens // _PART_TOKENS))
    part = max(1, -(-tokens // (wanted * tile.tokens))) * tile.tokens
    return Parts(max(1, -(-tokens // part)), part)
