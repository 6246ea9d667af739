"""Causal attention over documents that lie one after the other in flattened rows.

    out = softmax(q k^T / sqrt(d)) v        each query sees its own document up to itself, or a window of that

Three ways to compute it, all of them torch's own kernels:

- documents of one length: one batched `scaled_dot_product_attention` with `is_causal` and no mask tensor;
- a GPU with flash attention, documents of several lengths or a window: one call of its variable-length form, which
  takes both as numbers and knows grouped heads;
- elsewhere: document by document, a window in blocks of queries, each with a boolean mask of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH_HEAD_DIM = 256  # largest head of flash attention, whose heads are a multiple of 8
_FLASH_CAPABILITY = (8, 0)
_WINDOW_QUERIES = 512  # at least so many to a block: fewer would be many small calls


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    offsets: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal softmax(q k^T / sqrt(d)) v within each document, grouped heads allowed; differentiable.

    Args:
        query: [T, Hq, d]; key and value: [T, Hkv, d] with Hq a multiple of Hkv. Rows may be strided.
        lengths: rows per document, in order; they sum to T. Host integers, so that no device is waited for.
        offsets: int32 [documents + 1] on the device of the rows, 0 and the cumulated lengths; what the variable-length
            kernels read. Without it documents of several lengths are computed one by one.
        window: a query sees at most this many latest keys, itself included (sliding window attention).

    Returns:
        [T, Hq * d].
    """
    longest = max(lengths)
    if window is not None and window >= longest:
        window = None
    has_one_length = all(length == longest for length in lengths)
    if offsets is not None and (window is not None or not has_one_length) and has_flash(query):
        return _flash(query, key, value, offsets, longest, window).flatten(1)
    if has_one_length:
        batch = (t.unflatten(0, (len(lengths), longest)) for t in (query, key, value))
        return _documents(*batch, window).flatten(0, 1).flatten(1)
    documents = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_documents(q[None], k[None], v[None], window)[0] for q, k, v in documents]).flatten(1)


def has_flash(query: Tensor) -> bool:
    """Whether torch's flash attention takes heads of this device, dtype and size."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= _FLASH_HEAD_DIM
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, window: int | None) -> Tensor:
    """The variable-length kernel on rows [T, H, d]; the operator behind `torch.nn.attention.varlen`, whose Python
    signature differs between the supported versions of torch."""
    out, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        offsets,
        offsets,
        longest,
        longest,
        0.0,  # no dropout
        True,  # causal
        False,  # no debug mask
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return out


def _documents(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Attention of [B, length, H, d] documents of equal length, without a mask where none is needed.

    A window is computed for a block of queries at a time, with the keys that they see, so that neither time nor a mask
    grows with the square of the length.
    """
    if window is None:
        return _attend(query, key, value, None)
    length, size, blocks = query.shape[1], max(window, _WINDOW_QUERIES), []
    for begin in range(0, length, size):
        end, first = min(begin + size, length), max(0, begin - window + 1)
        rows = torch.arange(begin, end, device=query.device)[:, None]
        columns = torch.arange(first, end, device=query.device)
        mask = (columns <= rows) & (columns > rows - window)
        blocks.append(_attend(query[:, begin:end], key[:, first:end], value[:, first:end], mask))
    return torch.cat(blocks, dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries [B, length, H, d] to the keys of a mask [length, keys]; causal without one."""
    group = query.shape[2] // key.shape[2]
    if group > 1 and query.is_cuda and (mask is not None or not has_flash(query)):
        # Of the fused kernels only flash attention knows grouped heads: the rest would compute length x length scores.
        key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
        group = 1
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=group > 1,
    )
    return out.transpose(1, 2)
