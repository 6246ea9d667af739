"""Launch configurations of a side layer's kernels: pure functions of its sizes.

They serve 16-bit states from sm_80 on and fit the 99 KiB of shared memory that sm_86, 89 and 120 have. Elsewhere the
layer is plain torch: Triton multiplies fp32, and everything on sm_75, without tensor cores and with spills.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Up to this width a program holds whole rows, so that the norm and the MLP around it need no launches of their own.
# Wider ones would have room for 16 rows only and read all weights once per 16 tokens.
FUSED_SIDE_DIM = 384
CAST_BLOCK = 4096  # parameters that a program rounds


class SideSizes(NamedTuple):
    """Sizes of a side layer: width S, heads Hq, Hkv and d, inner width F."""

    side_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int

    @property
    def mixed(self) -> int:
        """Columns of the attention's output, Hq d."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Rows of the qkv weight, (Hq + 2 Hkv) d."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def is_fused(self) -> bool:
        """Whether one program holds whole rows."""
        return self.side_dim <= FUSED_SIDE_DIM


class KernelConfig(NamedTuple):
    """One kernel's compile-time constants and launch options."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and that tl.dot takes."""
    return max(16, 1 << (size - 1).bit_length())


def _depth(size: int) -> int:
    """Step along a sum of `size` terms: 64 where that divides it."""
    return 32 if size % 64 else 64


def qkv_config(sizes: SideSizes, *, casts: bool, for_backward: bool) -> KernelConfig:
    """`_side_qkv_fwd_kernel`: at a step of 32 it spilled a register on sm_100 with 3 stages or 4 warps.

    Parameters that it rounds itself are twice as wide, so wide layers read them half as often, in taller tiles; those
    spilled at a step of 32.
    """
    constants = {
        "S": sizes.side_dim,
        **_heads(sizes),
        "F": sizes.inner,
        "REPEATS": sizes.heads // sizes.kv_heads if for_backward else 1,
        "BLOCK_CAST": CAST_BLOCK,
        "BLOCK_N": 32,
    }
    if casts and not sizes.is_fused:
        return KernelConfig({**constants, "BLOCK_M": 128, "BLOCK_K": 64}, 8, 2)
    step = _depth(sizes.side_dim)
    return KernelConfig({**constants, "BLOCK_M": 64, "BLOCK_K": step}, 8 if step == 32 else 4, 2)


def cast_blocks(sizes: SideSizes) -> int:
    """Programs of `_side_qkv_fwd_kernel` that round the parameters."""
    side_dim, inner = sizes.side_dim, sizes.inner
    counts = (2 * inner * side_dim, side_dim * inner, sizes.qkv * side_dim, side_dim * sizes.mixed, side_dim, side_dim)
    return sum(-(-count // CAST_BLOCK) for count in counts)


def swiglu_config(sizes: SideSizes) -> KernelConfig:
    """`_side_swiglu_fwd_kernel`."""
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": _depth(sizes.side_dim)}
    return KernelConfig({"S": sizes.side_dim, "F": sizes.inner, **tile}, 4, 3)


def linear_config(cols: int, depth: int) -> KernelConfig:
    """`_side_linear_fwd_kernel` for a weight [cols, depth]."""
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": _depth(depth)}
    return KernelConfig({"N": cols, "K": depth, **tile}, 4, 3)


def mlp_config(sizes: SideSizes) -> KernelConfig:
    """`_side_mlp_fwd_kernel`."""
    block_s = power_of_two(sizes.side_dim)
    rows, num_warps = _whole_rows(block_s)
    # Three tiles of weights, each twice because loads run ahead, beside the normed rows.
    block = 32 if block_s <= 256 else 16
    tile = {"BLOCK_S": block_s, "BLOCK_M": rows, "BLOCK_F": block, "BLOCK_K": block}
    return KernelConfig({"S": sizes.side_dim, "MIXED": sizes.mixed, "F": sizes.inner, **tile}, num_warps, 2)


def mlp_backward_config(sizes: SideSizes) -> KernelConfig:
    """`_side_mlp_bwd_kernel`."""
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    return KernelConfig({"S": sizes.side_dim, "F": sizes.inner, **tile}, 8, 3)


def mlp_dx_config(sizes: SideSizes) -> KernelConfig:
    """`_side_mlp_bwd_dx_kernel`."""
    block_s = power_of_two(sizes.side_dim)
    rows, num_warps = _whole_rows(block_s)
    tile = {"BLOCK_S": block_s, "BLOCK_M": rows, "BLOCK_K": 32}
    return KernelConfig({"S": sizes.side_dim, "K": 2 * sizes.inner, **tile}, num_warps, 3)


def qkv_dx_config(sizes: SideSizes) -> KernelConfig:
    """`_side_qkv_bwd_dx_kernel`: 16 rows, because it holds gradients and tables of both halves of a head besides.

    11 query heads that share a key head spilled 224 bytes on sm_120 at a step of 32.
    """
    block_s = power_of_two(sizes.side_dim)
    constants = {
        "S": sizes.side_dim,
        **_heads(sizes),
        "BLOCK_S": block_s,
        "BLOCK_M": 16,
        "BLOCK_K": 16 if block_s > 256 else 32,
    }
    return KernelConfig(constants, 8 if block_s > 256 else 4, 2)


def norm_dx_config(sizes: SideSizes) -> KernelConfig:
    """`_side_norm_bwd_dx_kernel`: 32 rows a program, so that the second sum of the weight's gradient stays short."""
    block_s = power_of_two(sizes.side_dim)
    rows = max(1, min(16, 4096 // block_s))
    return KernelConfig({"S": sizes.side_dim, "BLOCK_S": block_s, "BLOCK_M": rows, "BLOCKS": 32 // rows}, 4, 1)


def rotary_config(sizes: SideSizes) -> KernelConfig:
    """`_side_rotary_bwd_kernel`."""
    return KernelConfig({**_heads(sizes), "BLOCK_M": 32, "BLOCK_N": 64}, 4, 1)


def weights_config(sizes: SideSizes) -> KernelConfig:
    """`_side_weights_bwd_dw_kernel`. Narrow layers have few tiles: smaller ones keep more of the device busy."""
    block = 32 if sizes.side_dim <= 128 else 64
    widths = {"S": sizes.side_dim, "WIDTH": sizes.qkv, "MIXED": sizes.mixed, "F": sizes.inner}
    return KernelConfig({**widths, "BLOCK_M": block, "BLOCK_N": block, "BLOCK_T": 64}, 4, 3)


def _heads(sizes: SideSizes) -> dict[str, int]:
    return {"HEADS": sizes.heads, "KV_HEADS": sizes.kv_heads, "HEAD_DIM": sizes.head_dim}


def _whole_rows(block_s: int) -> tuple[int, int]:
    """Rows a program holds and its warps. Every program reads all weights, so more rows mean less traffic; with more
    than 1024 accumulators a warp spilled on sm_86."""
    rows = 32 if block_s <= 256 else 16
    return rows, 8 if rows * block_s >= 8192 else 4
