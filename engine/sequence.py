"""How flattened rows form sequences, and causal attention over them.

Everything in the engine works on rows `[T, D]` without a batch dimension: padding is dropped on entry, so a padded
batch, a packed row of documents and one long document are the same thing, and no attention mask exists in training.
Only cached decoding keeps a batch dimension, because its rows grow in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

import ladder_kernels as kernels


@dataclass(frozen=True)
class SequenceLayout:
    """Document boundaries and positions of T rows.

    Attributes:
        positions: int64 [T], rotary position of every row.
        lengths: rows per document, in order; they sum to T. Host integers, so that no device is waited for.
        padding: bool [B, kv_len], True where cached or new key columns hold real tokens; None without a cache. With a
            cache the rows are the flattened [B, q_len] block of new columns, padding included.
        boundaries: int32 [documents + 1] on the rows' device, 0 and the cumulated lengths, where the caller has it.
    """

    positions: Tensor
    lengths: tuple[int, ...]
    padding: Tensor | None = None
    boundaries: Tensor | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> SequenceLayout:
        """Documents of the given lengths side by side, each counting positions from 0."""
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        return cls(positions, tuple(lengths))

    @classmethod
    def joined(cls, layouts: Sequence[SequenceLayout]) -> SequenceLayout:
        """The documents of several layouts, none of them cached, side by side."""
        positions = torch.cat([layout.positions for layout in layouts])
        return cls(positions, tuple(length for layout in layouts for length in layout.lengths))

    @classmethod
    def cached(cls, padding: Tensor, query_length: int) -> SequenceLayout:
        """The last `query_length` columns of a batch whose columns so far are described by `padding` [B, kv_len].

        Positions count real tokens only, so left-padded rows start at 0 where their text starts.
        """
        padding = padding.bool()
        columns = (padding.long().cumsum(-1) - 1).clamp_min(0)
        return cls(columns[:, -query_length:].reshape(-1), (query_length,) * len(padding), padding)

    @cached_property
    def is_padded(self) -> bool:
        """Whether some of the columns hold no token; on a GPU one wait a pass, beside those of sampling."""
        return self.padding is not None and not bool(self.padding.all())

    @cached_property
    def offsets(self) -> Tensor | None:
        """int32 [documents + 1] on the rows' GPU, where each document begins and the last one ends; None on a CPU.

        The given boundaries, else copied there once per layout, from pinned memory, so that nothing waits for it. A
        CUDA graph must not hold that copy: the pinned memory is somebody else's when the graph is replayed.
        """
        device = self.positions.device
        if device.type != "cuda":
            return None
        if self.boundaries is not None:
            return self.boundaries
        offsets = torch.tensor((0, *accumulate(self.lengths)), dtype=torch.int32, pin_memory=True)
        return offsets.to(device, non_blocking=True)

    def mask(self, window: int | None) -> Tensor | None:
        """bool [B, 1, q_len, kv_len] for cached attention, True where a query may look; built once per window.

        None where that is plain causality: one new column, or nothing but new columns, none of them padding. Attention
        without a mask is faster everywhere, and on CUDA the only kind with grouped heads that is not the math path.

        A padded query may look at itself, so that its softmax is not 0/0: a NaN there would reach real rows through the
        values of the next block.
        """
        assert self.padding is not None
        query_length, kv_length = self.lengths[0], self.padding.shape[1]
        is_causal = query_length in (1, kv_length) and (window is None or kv_length <= window)
        if is_causal and not self.is_padded:
            return None
        if window not in self._masks:
            columns = torch.arange(kv_length, device=self.padding.device)
            distance = columns[-query_length:, None] - columns[None, :]
            allowed = distance >= 0
            if window is not None:
                allowed &= distance < window
            visible = (allowed & self.padding[:, None, :]) | (distance == 0)
            self._masks[window] = visible[:, None]
        return self._masks[window]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SequenceLayout,
    *,
    window: int | None = None,
    cache: DynamicCache | None = None,
    layer: int = 0,
) -> Tensor:
    """Causal softmax(q k^T / sqrt(d)) v within each document, grouped heads allowed.

    Args:
        query: [T, Hq, d]; key and value: [T, Hkv, d] with Hq a multiple of Hkv.
        layout: which rows belong together; with a cache, which key columns are real.
        window: a query sees at most this many latest keys, itself included (sliding window attention).
        cache: keys and values of earlier columns, extended in place at index `layer`.

    Returns:
        [T, Hq * d].
    """
    if cache is not None:
        return _cached_attention(query, key, value, layout, window, cache, layer)
    return kernels.attention(query, key, value, layout.lengths, offsets=layout.offsets, window=window)


def _cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SequenceLayout,
    window: int | None,
    cache: DynamicCache,
    layer: int,
) -> Tensor:
    """Attention of the new columns to all columns so far, which the cache keeps as [B, Hkv, kv_len, d]."""
    batch, length = len(layout.lengths), layout.lengths[0]
    heads, kv_heads, size = query.shape[1], *key.shape[1:]
    if length == 1:
        # The queries of a key head become the rows of one head: nothing is transposed, no key head is read twice.
        query = query.reshape(batch, kv_heads, heads // kv_heads, size)
        key, value = key.unsqueeze(2), value.unsqueeze(2)
    else:
        query, key, value = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in (query, key, value))
    key, value = cache.update(key, value, layer)
    assert layout.padding is not None
    if key.shape[2] != layout.padding.shape[1]:
        raise ValueError(
            f"expected a cache that holds all {layout.padding.shape[1]} columns of the mask in every layer, "
            f"got {key.shape[2]} in layer {layer}: pass a DynamicCache of this model without sliding layers"
        )
    mask = layout.mask(window)
    if length == 1:
        return F.scaled_dot_product_attention(query, key, value, mask).reshape(batch, heads * size)
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def inverse_frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """theta^(-2 i / d), fp32 [d / 2]: what plain rotary embeddings of heads of size d turn by per position."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    return theta ** (-exponents / head_dim)


def rotary_table(
    positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, d] of positions [T] times inverse frequencies [d / 2], computed in fp32."""
    angles = positions.to(torch.float32)[:, None] * inverse_frequencies.to(torch.float32)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
