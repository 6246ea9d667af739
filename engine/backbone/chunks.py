"""A stage of the backbone over slices of its tokens: a long context needs no transient as long as itself.

Every slice decodes the weights of its stage again, so slices are long: at 2,048 tokens a decode is 4 to 10 % of the
product it is for, and in proportion less above. Up to that many tokens nothing is ever cut.

Rows do not depend on each other, but libraries of matrix products choose their kernels by the number of rows: a pass in
slices equals one in one piece within rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

CHUNK_BYTES = 256 << 20  # the MLP of a 7B model holds 90 kB a token in 16 bits, so this cuts at 2,978 tokens
MIN_CHUNK_TOKENS = 2048
_ROW_MULTIPLE = 128  # rows of a large product's tile


def chunk_tokens(tokens: int, bytes_per_token: int) -> int:
    """Tokens of a slice whose transients fit in CHUNK_BYTES, or MIN_CHUNK_TOKENS of them; slices are about equal."""
    fitting = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // bytes_per_token)
    if tokens <= fitting:
        return tokens
    chunks = -(-tokens // fitting)
    return -(-tokens // (chunks * _ROW_MULTIPLE)) * _ROW_MULTIPLE


def by_rows(
    stage: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    bytes_per_token: int,
    out: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """stage(*inputs), computed slice by slice where the inputs are long.

    Args:
        stage: rows in, the same number of rows out.
        inputs: [T, ...] each.
        bytes_per_token: what the stage holds at its peak for a row, its results included.
        out: where the results may be written if there are slices; may be inputs. Fresh memory by default.
    """
    tokens = inputs[0].shape[0]
    size = chunk_tokens(tokens, bytes_per_token)
    if size >= tokens:
        return stage(*inputs)
    for begin in range(0, tokens, size):
        rows = slice(begin, begin + size)
        parts = stage(*(tensor[rows] for tensor in inputs))
        out = out or [part.new_empty(tokens, *part.shape[1:]) for part in parts]
        for index, part in enumerate(parts):
            out[index][rows] = part
        del parts, part  # else they would live beside those of the next slice
    return tuple(out)
