"""The side layer's kernels in the configurations they are launched in, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ladder_kernels.gpu import side_config as config
from ladder_kernels.gpu.side_backward import (
    _side_mlp_bwd_dx_kernel,
    _side_mlp_bwd_kernel,
    _side_norm_bwd_dx_kernel,
    _side_qkv_bwd_dx_kernel,
    _side_rotary_bwd_kernel,
)
from ladder_kernels.gpu.side_config import KernelConfig, SideSizes
from ladder_kernels.gpu.side_forward import (
    _side_linear_fwd_kernel,
    _side_mlp_fwd_kernel,
    _side_qkv_fwd_kernel,
    _side_swiglu_fwd_kernel,
)
from ladder_kernels.gpu.side_weights import _side_weights_bwd_dw_kernel
from ladder_kernels.gpu.spec import KernelSpec
from ladder_kernels.side_layer import SideLayerWeights

# One size of each padded width and of each way to compute: Qwen2.5 0.5B, 7B and 3B and Llama-3 8B beside reduction
# factors of 16, 16, 6 and 4.
SIZES = (
    SideSizes(64, 1, 1, 64, 320),
    SideSizes(224, 7, 1, 32, 1184),
    SideSizes(352, 11, 1, 32, 1856),
    SideSizes(1024, 16, 4, 64, 3584),
)
_PARAMETERS = tuple(f"{name}_ptr" for name in SideLayerWeights._fields)
_KEPT_IN_FP32 = ("attention_partial_ptr", "mlp_partial_ptr", "dnorm_ptr")
_WEIGHT_GRADIENTS = tuple(
    f"d{name}_ptr"
    for name in ("attention_norm", "qkv_weight", "attention_out", "mlp_norm", "gate_up_weight", "mlp_out")
)


def specs() -> Iterator[KernelSpec]:
    """Every kernel of every size; of fp16, which compiles as bf16 does, those of two sizes."""
    for sizes in SIZES:
        for dtype in ("bf16", "fp16") if sizes in (SIZES[1], SIZES[-1]) else ("bf16",):
            for name, kernel, chosen in _kernels(sizes):
                yield _spec(name, kernel, chosen, dtype, sizes)


def _kernels(sizes: SideSizes) -> Iterator[tuple[str, Any, KernelConfig]]:
    for name, for_backward in (("qkv", False), ("qkv_again", True)):
        yield name, _side_qkv_fwd_kernel, config.qkv_config(sizes, casts=False, for_backward=for_backward)
        yield f"{name}_cast", _side_qkv_fwd_kernel, config.qkv_config(sizes, casts=True, for_backward=for_backward)
    yield "attention_out", _side_linear_fwd_kernel, config.linear_config(sizes.side_dim, sizes.mixed)
    yield "mlp_bwd", _side_mlp_bwd_kernel, config.mlp_backward_config(sizes)
    yield "weights", _side_weights_bwd_dw_kernel, config.weights_config(sizes)
    if sizes.is_fused:
        yield "mlp", _side_mlp_fwd_kernel, config.mlp_config(sizes)
        yield "mlp_dx", _side_mlp_bwd_dx_kernel, config.mlp_dx_config(sizes)
        yield "qkv_dx", _side_qkv_bwd_dx_kernel, config.qkv_dx_config(sizes)
    else:
        yield "swiglu", _side_swiglu_fwd_kernel, config.swiglu_config(sizes)
        yield "mlp_out", _side_linear_fwd_kernel, config.linear_config(sizes.side_dim, sizes.inner)
        yield "norm_dx", _side_norm_bwd_dx_kernel, config.norm_dx_config(sizes)
        yield "rotary_bwd", _side_rotary_bwd_kernel, config.rotary_config(sizes)


def _spec(name: str, kernel: Any, chosen: KernelConfig, dtype: str, sizes: SideSizes) -> KernelSpec:
    casts = name.endswith("_cast")
    absent = {}
    if kernel is _side_qkv_fwd_kernel:
        absent = {"normed_ptr": None} if "again" not in name else {}
        absent |= {} if casts else dict.fromkeys((f"to_{parameter}" for parameter in _PARAMETERS), None)

    def type_of(argument: str) -> str:
        if not argument.endswith("_ptr"):
            return "fp32" if argument == "epsilon" else "i32"
        # Parameters and their gradients are fp32.
        is_wide = (
            argument in _KEPT_IN_FP32
            or (casts and argument in _PARAMETERS)
            or (kernel is _side_weights_bwd_dw_kernel and argument in _WEIGHT_GRADIENTS)
        )
        return "*fp32" if is_wide else f"*{dtype}"

    constants = chosen.constants | absent
    return KernelSpec(
        name=f"side_layer.{name}.{dtype}.S{sizes.side_dim}",
        kernel=kernel,
        types={argument: type_of(argument) for argument in kernel.arg_names if argument not in constants},
        constants=constants,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        uses_tensor_cores=name not in ("norm_dx", "rotary_bwd"),
    )
