"""What compiling a kernel ahead of time needs: every module of this package lists its shipped configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TURING = 75  # no bf16, no asynchronous copies: the fp16 kernels run there too
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}  # Triton's names


class KernelSpec(NamedTuple):
    """One kernel in one launch configuration.

    Attributes:
        name: "op.kernel.dtype.configuration", unique.
        kernel: the `triton.jit` function.
        types: Triton type of every run-time argument by name, "*bf16", "*u8", "i32", "fp32". Pointers are compiled as
            aligned to 16 bytes, as torch allocates.
        constants: every constexpr by name.
        divisible: integer arguments that are multiples of 16 in the shapes this configuration is meant for.
        num_warps, num_stages: as launched.
        architectures: compute capabilities it is launched on, 86 for 8.6.
        uses_tensor_cores: whether its main loop has to contain tensor-core instructions.
        weights_per_iteration: NF4 weights that one thread block decodes per pass of the main loop; 0 without decode.
            With tensor cores, BLOCK_M tokens at x_ptr are multiplied with weights / BLOCK_K rows of BLOCK_K weights.
        enable_fp_fusion: as launched; True is Triton's default up to 3.9.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    architectures: tuple[int, ...] = ARCHITECTURES
    uses_tensor_cores: bool = False
    weights_per_iteration: int = 0
    enable_fp_fusion: bool = True


def architectures_of(dtype: torch.dtype) -> tuple[int, ...]:
    """Where kernels without matrix products are launched on this dtype."""
    return ARCHITECTURES if dtype == torch.bfloat16 else (TURING, *ARCHITECTURES)


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device, 86 for 8.6; 86 for the interpreter's CPU."""
    if device.type != "cuda":
        return 86
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
