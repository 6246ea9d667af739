"""NF4 products by decoded panels and cuBLAS, for more tokens than the fused kernel is meant for.

Two panels of rows alternate: while one is multiplied, the next is decoded on a second stream, bandwidth work beside
tensor work. Every decode is waited for by the caller's stream, so memory of the arguments may be freed or reused there
as usual, and a CUDA graph can capture the fork and the join. Without CUDA the same happens in sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ladder_kernels.nf4 import dequantize_rows
from ladder_kernels.nf4_tensors import NF4Tensors


def nf4_linear_panels(x: Tensor, nf4: NF4Tensors, bias: Tensor | None, panels: Tensor, out: Tensor) -> None:
    """Write x [M, K] @ W^T + bias to out [M, N], in x.dtype.

    Args:
        panels: [2, P, K] scratch in x.dtype, or [1, P, K] with P >= N: P rows of W are decoded at a time.
    """
    for begin, panel in _decoded(nf4, out.shape[1], panels):
        columns = slice(begin, begin + panel.shape[0])
        if bias is None:
            torch.mm(x, panel.T, out=out[:, columns])
        else:
            torch.addmm(bias[columns], x, panel.T, out=out[:, columns])


def nf4_linear_dx(dy: Tensor, nf4: NF4Tensors, cols: int, panels: Tensor, out: Tensor) -> None:
    """Write dy [M, N] @ W to out [M, K = cols]: the gradient to the input of a frozen NF4 head.

    The sums over panels are kept in fp32: rounding each to 16 bits would cost a vocabulary of 152k a dozen roundings.

    Args:
        panels: as for `nf4_linear_panels`.
    """
    total = torch.zeros(dy.shape[0], cols, dtype=torch.float32, device=dy.device)
    for begin, panel in _decoded(nf4, dy.shape[1], panels):
        part = dy[:, begin : begin + panel.shape[0]]
        if dy.is_cuda and dy.dtype != torch.float32:
            torch.addmm(total, part, panel, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(part.float(), panel.float())
    out.copy_(total)


def _decoded(nf4: NF4Tensors, rows: int, panels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the decoded weights of each panel; they hold until the next one is asked for."""
    size = panels.shape[1]
    parts = [
        (begin, panels[index % panels.shape[0], : min(size, rows - begin)])
        for index, begin in enumerate(range(0, rows, size))
    ]
    if not panels.is_cuda or len(parts) == 1:
        for begin, panel in parts:
            dequantize_rows(nf4, begin, panel)
            yield begin, panel
        return
    current, side = torch.cuda.current_stream(panels.device), _decode_stream(panels.device)
    side.wait_stream(current)
    decoded = [_decode_on(side, nf4, *part) for part in parts[:2]]
    for index, part in enumerate(parts):
        current.wait_event(decoded[index])
        yield part
        if index + 2 < len(parts):
            side.wait_event(current.record_event())  # the product that reads this panel
            decoded.append(_decode_on(side, nf4, *parts[index + 2]))


def _decode_on(stream: torch.cuda.Stream, nf4: NF4Tensors, first_row: int, panel: Tensor) -> torch.cuda.Event:
    with torch.cuda.stream(stream):
        dequantize_rows(nf4, first_row, panel)
    return stream.record_event()


@functools.cache
def _decode_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
