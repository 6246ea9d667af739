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
# A processor whose best set is one of these computes 16-bit products by converting inside: on an AVX-512 Xeon
# 2048 x 4096 x 4096 took 4.7 times as long in bf16 as in fp32.
WITHOUT_BF16_UNITS = ("avx512", "avx2")
# Rows of x that are widened at a time.
WIDE_TOKENS = 512
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


# Tokens up to which the fused kernel is launched on a GPU rather than decoded panels and cuBLAS. None of these is
# measured here. GeForce: a multiply-add of a 128-token tile leaves 64 issue slots per weight on sm_86/89 for a decode
# of 5, and at 1024 tokens a published fused int4 kernel still led on an A6000; at 2048 at most 4 to 7 % are to be won.
# Data-centre cards: bitsandbytes switches at 128 tokens on an A100 and at 64 on sm_90, where 8 slots are left. Triton
# (3.6, 3.7) has no tensor-core product for sm_75: what it compiles there instead spills 2 KiB a thread.
FUSED_TOKENS = {75: 0, 80: 128, 86: 1024, 89: 1024, 90: 64, 100: 64, 120: 1024}
# Multiplying with fp16 sums doubles the tensor rate on GeForce only, so only there is the fused kernel worth it always.
HALF_PRECISION_ARCHITECTURES = (86, 89, 120)
# Two panels alternate. Both fit in the second-level cache of 36 MiB and more where there is one; 3 MiB on sm_86 and
# below hold none, so there panels only have to be few.
GPU_PANEL_BYTES = {75: 32 << 20, 80: 12 << 20, 86: 32 << 20, 89: 12 << 20, 90: 16 << 20, 100: 16 << 20, 120: 12 << 20}
CUBLAS_TILE = (128, 256)  # tokens, rows: the usual tile of a large product
MAX_SPLITS = 16
MIN_COLS_PER_SPLIT = 512  # a prologue and a sum of partial results have to be worth their while


class LinearPlan(NamedTuple):
    """How `nf4_linear` computes a product.

    Attributes:
        panel_rows: rows of the weight decoded at a time; None for the kernel that reads packed weights.
        scratch_bytes: what it needs of scratch.
        wide_tokens: 16-bit rows of x that are multiplied in fp32 at a time; 0 to multiply in x's own dtype.
    """

    panel_rows: int | None
    scratch_bytes: int
    wide_tokens: int = 0


def linear_plan(tokens: int, rows: int, cols: int, block_size: int, itemsize: int, isa: str | None) -> LinearPlan:
    """The plan for x [tokens, cols] with items of `itemsize` bytes times an NF4 weight [rows, cols].

    isa: the instruction set of the native library; None where tensors are elsewhere or there is no library.
    """
    if reads_packed(tokens, cols, block_size, isa):
        return LinearPlan(None, 4 * cols * -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE)
    if isa not in WITHOUT_BF16_UNITS or itemsize > 2 or tokens == 0:
        panel = panel_rows(tokens, rows, cols, itemsize)
        return LinearPlan(panel, panel * cols * itemsize)
    panel, wide_tokens = panel_rows(tokens, rows, cols, 4), min(tokens, WIDE_TOKENS)
    return LinearPlan(panel, sum(wide_scratch(panel, cols, wide_tokens)), wide_tokens)


def reads_packed(tokens: int, cols: int, block_size: int, isa: str | None) -> bool:
    """Whether the native kernel multiplies so many tokens by packed weights as it reads them."""
    if isa is None or not 0 < tokens <= FEW_TOKENS[isa]:
        return False
    return cols > 0 and cols % GROUP == 0 and block_size % GROUP == 0


def wide_scratch(panel_rows: int, cols: int, tokens: int) -> tuple[int, int, int]:
    """Bytes of a panel, of x and of out in fp32, each a multiple of 64."""
    panel, x, out = (-(-4 * items // 64) * 64 for items in (panel_rows * cols, tokens * cols, tokens * panel_rows))
    return panel, x, out


class GemmConfig(NamedTuple):
    """Launch configuration of the fused NF4 product, sizes of a thread block's tile.

    Attributes:
        is_wide: whether the decode looks up bytes, two codes at a time, in 2 KiB, rather than nibbles in 64 bytes.
            That halves the instructions, but 32 lanes that read 8 of 2048 bytes each collide about 6 times (2 x 3.1, 16
            lanes on 16 pairs of banks), and 16 codes never do: worth it where tensor cores are the bound.
    """

    block_tokens: int
    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int
    is_wide: bool


class GpuLinearPlan(NamedTuple):
    """How a GPU computes a product with an NF4 weight.

    Attributes:
        config: of the fused product; None where panels are decoded and multiplied by cuBLAS.
        splits: parts that the columns are split into among thread blocks; 1 without partial sums.
        cols_per_split: columns of each part but the last.
        panel_rows: rows of the weight decoded at a time; 0 for the fused product.
        scratch_bytes: for partial sums [splits, tokens, rows] in fp32, twice for a pair, or two panels.
    """

    config: GemmConfig | None
    splits: int
    cols_per_split: int
    panel_rows: int
    scratch_bytes: int


def gemm_config(tokens: int, is_pair: bool) -> GemmConfig:
    """Configuration of the fused product for so many tokens; a pair has half the rows, with two sums for each."""
    if tokens <= 16:
        config = GemmConfig(16, 64, 128, 4, 3, False)
    elif tokens <= 32:
        # 128 columns of a pair do not fit in the registers of sm_86.
        config = GemmConfig(32, 64, 64 if is_pair else 128, 4, 3, False)
    elif tokens <= 64:
        config = GemmConfig(64, 64, 64, 4, 3, True) if is_pair else GemmConfig(64, 128, 64, 8, 3, True)
    else:
        config = GemmConfig(128, 128, 64, 8, 2 if is_pair else 3, True)
    return config._replace(block_rows=config.block_rows // 2) if is_pair else config


def gpu_linear_plan(
    tokens: int,
    rows: int,
    cols: int,
    block_size: int,
    itemsize: int,
    architecture: int,
    sm_count: int,
    *,
    is_pair: bool = False,
    half_precision: bool = False,
) -> GpuLinearPlan:
    """The plan for x [tokens, cols] with items of `itemsize` bytes times an NF4 weight [rows, cols], or a pair of them.

    architecture: compute capability, 86 for 8.6. half_precision: fp16 sums were asked for.
    """
    known = max((known for known in FUSED_TOKENS if known <= architecture), default=75)
    always = half_precision and known in HALF_PRECISION_ARCHITECTURES
    fits = cols > 0 and cols % GROUP == 0 and block_size % GROUP == 0 and itemsize == 2
    if not fits or tokens * rows == 0 or (tokens > FUSED_TOKENS[known] and not always):
        panel = gpu_panel_rows(tokens, rows, cols, itemsize, known, sm_count)
        return GpuLinearPlan(None, 1, cols, panel, min(2, -(-rows // panel)) * panel * cols * itemsize)
    config = gemm_config(tokens, is_pair)
    tiles = -(-tokens // config.block_tokens) * -(-rows // config.block_rows)
    step = config.block_cols
    # With few tokens, enough bytes have to be on their way: 4.3 TB/s at 700 ns are 23 KiB for each of 132
    # multiprocessors, and a thread block has 8 KiB in flight. With many, the tensor cores are busy anyway.
    wanted = (4 if tokens <= CACHED_PANEL_TOKENS else 1) * sm_count // tiles
    splits = max(1, min(wanted, cols // MIN_COLS_PER_SPLIT, MAX_SPLITS))
    cols_per_split = -(-cols // (splits * step)) * step
    splits = -(-cols // cols_per_split)
    scratch = 4 * splits * tokens * rows * (2 if is_pair else 1) if splits > 1 else 0
    return GpuLinearPlan(config, splits, cols_per_split, 0, scratch)


def gpu_panel_rows(tokens: int, rows: int, cols: int, itemsize: int, architecture: int, sm_count: int) -> int:
    """Rows of a weight decoded at a time on a GPU: within the budget, and whole waves of cuBLAS tiles if possible.

    A product whose tiles fill the multiprocessors 1.1 times takes as long as one that fills them twice.
    """
    if rows * cols == 0:
        return max(1, rows)
    tile_tokens, tile_rows = CUBLAS_TILE
    fitting = max(1, GPU_PANEL_BYTES[architecture] // (cols * itemsize))
    if rows <= fitting:
        return rows
    tiles_across = -(-tokens // tile_tokens)
    waves = fitting // tile_rows * tiles_across // sm_count
    full = waves * sm_count // max(1, tiles_across) * tile_rows
    if full == 0:
        full = fitting // PANEL_ROW_MULTIPLE * PANEL_ROW_MULTIPLE
    return min(rows, max(full, PANEL_ROW_MULTIPLE))


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
