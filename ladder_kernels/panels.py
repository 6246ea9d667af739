"""Products with a packed frozen matrix W [N, K], decoded a panel of rows at a time into reused memory.

On a GPU two panels alternate: while one is multiplied, the next is decoded on a second stream, bandwidth work beside
tensor work. Every decode is waited for by the caller's stream, so memory of the arguments may be freed or reused there
as usual, and a CUDA graph can capture the fork and the join. Without CUDA the same happens in sequence.

`Decode` writes rows [first_row, first_row + P) of W to its second argument [P, K].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Decode = Callable[[int, Tensor], None]


def panel_linear(x: Tensor, decode: Decode, bias: Tensor | None, panels: Tensor, out: Tensor) -> None:
    """Write x [M, K] @ W^T + bias to out [M, N], in x.dtype.

    Args:
        panels: scratch in x.dtype, P rows of W at a time: [2, P, K], or [1, P, K] without CUDA or with P >= N.
    """
    for begin, panel in _decoded(decode, out.shape[1], panels):
        columns = slice(begin, begin + panel.shape[0])
        if bias is None:
            torch.mm(x, panel.T, out=out[:, columns])
        else:
            torch.addmm(bias[columns], x, panel.T, out=out[:, columns])


def panel_linear_dx(dy: Tensor, decode: Decode, panels: Tensor, sums: Tensor, out: Tensor) -> None:
    """Write dy [M, N] @ W to out [M, K]: the gradient to the input of a frozen head.

    The sums over panels are kept in fp32: rounding each to 16 bits would cost a vocabulary of 152k a dozen roundings.

    Args:
        panels: as for `panel_linear`.
        sums: fp32 scratch [M, K]; may be out, if that is fp32.
    """
    sums.zero_()
    for begin, panel in _decoded(decode, dy.shape[1], panels):
        part = dy[:, begin : begin + panel.shape[0]]
        if dy.is_cuda and dy.dtype != torch.float32:
            torch.addmm(sums, part, panel, out_dtype=torch.float32, out=sums)
        else:
            sums.addmm_(part.float(), panel.float())
    if sums is not out:
        out.copy_(sums)


def _decoded(decode: Decode, rows: int, panels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the decoded weights of each panel; they hold until the next one is asked for."""
    size = panels.shape[1]
    parts = [
        (begin, panels[index % panels.shape[0], : min(size, rows - begin)])
        for index, begin in enumerate(range(0, rows, size))
    ]
    if not panels.is_cuda or len(parts) == 1:
        for begin, panel in parts:
            decode(begin, panel)
            yield begin, panel
        return
    current, side = torch.cuda.current_stream(panels.device), _decode_stream(panels.device)
    side.wait_stream(current)
    decoded = [_decode_on(side, decode, *part) for part in parts[:2]]
    for index, part in enumerate(parts):
        current.wait_event(decoded[index])
        yield part
        if index + 2 < len(parts):
            side.wait_event(current.record_event())  # the product that reads this panel
            decoded.append(_decode_on(side, decode, *parts[index + 2]))


def _decode_on(stream: torch.cuda.Stream, decode: Decode, first_row: int, panel: Tensor) -> torch.cuda.Event:
    with torch.cuda.stream(stream):
        decode(first_row, panel)
    return stream.record_event()


@functools.cache
def _decode_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
