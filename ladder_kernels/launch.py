"""Launch configurations: pure functions of shape, so that a test can pin them without a device."""

from __future__ import annotations

# Rows of the matrix product below which it is bound by reading the weight, not by arithmetic.
FEW_TOKENS = 32
# fp32, 512 tokens, two cores of an AVX-512 Xeon, 3584 x 3584: panels of 3.5, 7, 14 and 49 MiB cost 52, 26, 12 and 0 %
# over one full matrix, because every panel packs the activations again.
MANY_TOKENS_PANEL_BYTES = 32 << 20
# A panel that stays in the second-level cache between its decode and its use.
FEW_TOKENS_PANEL_BYTES = 1 << 20
PANEL_ROW_MULTIPLE = 64


def panel_rows(tokens: int, rows: int, cols: int, itemsize: int) -> int:
    """Rows of an [rows, cols] weight that are decoded at a time for a product with `tokens` rows.

    All panels but the last are equal and a multiple of 64 rows, and the last is not much smaller.
    """
    budget = FEW_TOKENS_PANEL_BYTES if tokens < FEW_TOKENS else MANY_TOKENS_PANEL_BYTES
    panels = max(1, -(-rows * cols * itemsize // budget))
    multiple = -(-rows // (panels * PANEL_ROW_MULTIPLE)) * PANEL_ROW_MULTIPLE
    return min(rows, multiple)


def logit_rows(rows: int, vocabulary: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows of logits that fit in `chunk_bytes`, at least one; chunks are as equal as can be."""
    fitting = max(1, chunk_bytes // (vocabulary * itemsize))
    chunks = max(1, -(-rows // fitting))
    return max(1, -(-rows // chunks))
