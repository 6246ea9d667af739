"""Launch configurations: pure functions of shape, so that a test can pin them without a device."""

from __future__ import annotations

from typing import NamedTuple

# Tokens up to which the native kernel that reads packed weights beats decoding a panel and multiplying it. Measured at
# 4096 x 4096 on two AVX-512 cores without bf16 units, whose sets are given AVX-512's number.
FEW_TOKENS = {"amx": 32, "avx512bf16": 32, "avx512": 32, "avx2": 16, "scalar": 2}
# Below this a product is bound by reading the weight, not by arithmetic.
CACHED_PANEL_TOKENS = 32
# fp32, 512 tokens, two cores of an AVX-512 Xeon, 3584 x 3584: panels of 3.5, 7, 14 and 49 MiB cost 52, 26, 12 and 0 %
# over one full matrix, because every panel packs the activations again.
MANY_TOKENS_PANEL_BYTES = 32 << 20
# A panel that stays in the second-level cache between its decode and its use.
CACHED_PANEL_BYTES = 1 << 20
PANEL_ROW_MULTIPLE = 64
# Logits of a loss chunk, counted in fp32. A GPU reads the whole head for a chunk, twice: 512 rows of Qwen's 152k words,
# 160 MB in 16 bits, are enough to multiply for longer than that takes.
LOGIT_CHUNK_BYTES = 64 << 20
GPU_LOGIT_CHUNK_BYTES = 320 << 20
# The few-tokens kernel works on whole groups of 64 weights that share a scale, and on up to 16 tokens at a time.
GROUP = 64
TOKEN_MULTIPLE = 16


class LinearPlan(NamedTuple):
    """How `nf4_linear` computes a product.

    Attributes:
        panel_rows: rows of the weight decoded at a time; None for the kernel that reads packed weights.
        scratch_bytes: what it needs of scratch.
    """

    panel_rows: int | None
    scratch_bytes: int


def linear_plan(tokens: int, rows: int, cols: int, block_size: int, itemsize: int, isa: str | None) -> LinearPlan:
    """The plan for x [tokens, cols] with items of `itemsize` bytes times an NF4 weight [rows, cols].

    isa: the instruction set of the native library; None where tensors are elsewhere or there is no library.
    """
    if isa is not None and 0 < tokens <= FEW_TOKENS[isa] and cols > 0 and cols % GROUP == 0 and block_size % GROUP == 0:
        return LinearPlan(None, 4 * cols * -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE)
    panel = panel_rows(tokens, rows, cols, itemsize)
    return LinearPlan(panel, panel * cols * itemsize)


def panel_rows(tokens: int, rows: int, cols: int, itemsize: int) -> int:
    """Rows of an [rows, cols] weight that are decoded at a time for a product with `tokens` rows.

    All panels but the last are equal and a multiple of 64 rows, and the last is not much smaller.
    """
    budget = CACHED_PANEL_BYTES if tokens < CACHED_PANEL_TOKENS else MANY_TOKENS_PANEL_BYTES
    panels = max(1, -(-rows * cols * itemsize // budget))
    multiple = -(-rows // (panels * PANEL_ROW_MULTIPLE)) * PANEL_ROW_MULTIPLE
    return max(1, min(rows, multiple))


def logit_chunk_bytes(device_type: str) -> int:
    """Budget of a chunk of logits, counted in fp32, on that type of device."""
    return GPU_LOGIT_CHUNK_BYTES if device_type == "cuda" else LOGIT_CHUNK_BYTES


def logit_rows(rows: int, vocabulary: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows of logits that fit in `chunk_bytes`, at least one; chunks are as equal as can be."""
    fitting = max(1, chunk_bytes // (vocabulary * itemsize))
    chunks = max(1, -(-rows // fitting))
    return max(1, -(-rows // chunks))
