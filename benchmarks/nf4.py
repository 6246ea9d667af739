"""NF4 against bitsandbytes, a dense GEMM and a plain copy: `nf4_linear`, `dequantize_nf4`, `quantize_nf4`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels_path import kernels_path
from benchmarks.registry import DTYPE_NAMES, TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape, random_nf4_weight
from ladder_kernels import NF4Weight, Workspace, dequantize_nf4, nf4_linear, quantize_nf4

_SEED = 0
_SQUARE = (4096, 4096)
_ROWS = (1, 16, 256, 1024, 2048)


def _nf4_bytes(rows: int, columns: int) -> int:
    """Codes, one-byte block scales and their scales of a double-quantized weight."""
    blocks = -(-rows * columns // 64)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // 256)


def _weight(case: Case, context: Context) -> NF4Weight:
    generator = torch.Generator().manual_seed(_SEED)
    return random_nf4_weight(case.sizes["n"], case.sizes["k"], generator).to(context.device)


def _input(case: Case, context: Context) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED + 1)
    x = torch.randn(case.sizes["m"], case.sizes["k"], generator=generator)
    return x.to(context.device, case.dtype)


def _dense(case: Case, context: Context) -> Tensor:
    assert case.dtype is not None
    return dequantize_nf4(_weight(case, context), case.dtype)


def _bitsandbytes_parts(case: Case, context: Context) -> tuple[Tensor, Any]:
    """Packed codes and quantization state of the same weight, as bitsandbytes holds them."""
    from bitsandbytes.functional import QuantState

    tensors = _weight(case, context).to_bitsandbytes("weight")
    packed = tensors.pop("weight").reshape(-1, 1)
    state = {key.removeprefix("weight."): tensor for key, tensor in tensors.items()}
    return packed, QuantState.from_dict(state, device=context.device)


def _linear_ours(case: Case, context: Context) -> Runnable:
    weight, x, workspace = _weight(case, context), _input(case, context), Workspace()

    def call() -> Tensor:
        return nf4_linear(x, weight, workspace=workspace)

    return Runnable(torch.no_grad()(call), kernels=kernels_path(context.device))


def _linear_dense(case: Case, context: Context) -> Runnable:
    weight, x = _dense(case, context), _input(case, context)
    traffic = weight.nbytes + _activation_bytes(case)
    return Runnable(torch.no_grad()(lambda: F.linear(x, weight)), bytes_moved=traffic)


def _linear_dense_fp32(case: Case, context: Context) -> Runnable:
    """The GEMM that bounds 16-bit products on a CPU without 16-bit units: twice the bytes, no conversions."""
    weight, x = _dense(case, context).float(), _input(case, context).float()
    traffic = weight.nbytes + 2 * x.nbytes
    return Runnable(torch.no_grad()(lambda: F.linear(x, weight)), bytes_moved=traffic, details="fp32")


def _linear_bitsandbytes(case: Case, context: Context) -> Runnable:
    """A `Linear4bit` in evaluation mode, which picks bitsandbytes' packed CPU path where the machine has one."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    packed, state = _bitsandbytes_parts(case, context)
    layer = Linear4bit(
        case.sizes["k"], case.sizes["n"], bias=False, compute_dtype=case.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = Params4bit(packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True)
    layer.weight.module = layer
    layer.eval()
    x = _input(case, context)
    return Runnable(torch.no_grad()(lambda: layer(x)), details=_bitsandbytes_path(layer, context))


def _bitsandbytes_path(layer: torch.nn.Module, context: Context) -> str:
    if context.device.type != "cpu":
        return "gemm_4bit"
    return "packed AVX512-BF16" if layer.support_avx512bf16_for_cpu else "dequantize and F.linear (no AVX512-BF16)"


def _linear_bitsandbytes_matmul(case: Case, context: Context) -> Runnable:
    """`matmul_4bit`, the path of a training step."""
    from bitsandbytes import matmul_4bit

    packed, state = _bitsandbytes_parts(case, context)
    x = _input(case, context)
    return Runnable(torch.no_grad()(lambda: matmul_4bit(x, packed, quant_state=state)))


def _activation_bytes(case: Case) -> int:
    assert case.dtype is not None
    return case.sizes["m"] * (case.sizes["n"] + case.sizes["k"]) * case.dtype.itemsize


def _linear_case(
    name: str, m: int, n: int, k: int, dtype: torch.dtype, devices: tuple[str, ...] = ("cpu", "cuda")
) -> Case:
    activations = m * (n + k) * dtype.itemsize
    return Case(
        name,
        {"m": m, "n": n, "k": k},
        dtype,
        flops=2 * m * n * k,
        bytes_moved=_nf4_bytes(n, k) + activations,
        devices=devices,
    )


def _linear_cases() -> tuple[Case, ...]:
    """The square of every comparison, and the widest linears of real models at decoding and training lengths."""
    cases = [
        _linear_case(f"4096x4096-m{m}-{DTYPE_NAMES[dtype]}", m, *_SQUARE, dtype, devices)
        for dtype, devices in ((torch.bfloat16, ("cpu", "cuda")), (torch.float32, ("cpu",)))
        for m in _ROWS
    ]
    for model in ("Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3.1-8B"):
        linears = model_shape(model).linears
        for linear in ("gate_proj", "down_proj"):
            n, k = linears[f"mlp.{linear}"]
            cases += [_linear_case(f"{model}-{linear}-m{m}-bf16", m, n, k, torch.bfloat16) for m in (1, 2048)]
    return tuple(cases)


def _decode_ours(case: Case, context: Context) -> Runnable:
    assert case.dtype is not None
    weight, dtype = _weight(case, context), case.dtype
    out = torch.empty(weight.shape, dtype=dtype, device=context.device)
    return Runnable(
        lambda: dequantize_nf4(weight, dtype, out=out), details="out reused", kernels=kernels_path(context.device)
    )


def _decode_ours_fresh(case: Case, context: Context) -> Runnable:
    assert case.dtype is not None
    weight, dtype = _weight(case, context), case.dtype
    return Runnable(lambda: dequantize_nf4(weight, dtype), details="fresh memory", kernels=kernels_path(context.device))


def _decode_bitsandbytes(case: Case, context: Context) -> Runnable:
    from bitsandbytes.functional import dequantize_4bit

    packed, state = _bitsandbytes_parts(case, context)
    state.dtype = case.dtype
    out = torch.empty(case.sizes["n"], case.sizes["k"], dtype=case.dtype, device=context.device)
    if context.device.type == "cpu":
        return Runnable(lambda: _bitsandbytes_decode_into(packed, state, out), details="out reused, C function")
    return Runnable(lambda: dequantize_4bit(packed, state, out=out), details="out reused")


def _bitsandbytes_decode_into(packed: Tensor, state: Any, out: Tensor) -> Tensor:
    """What bitsandbytes' CPU op does after allocating: it has no variant that writes to memory of the caller."""
    from bitsandbytes.cextension import lib
    from bitsandbytes.functional import dequantize_blockwise, get_ptr

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    decode = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{DTYPE_NAMES[out.dtype]}")
    sizes = (ctypes.c_longlong(size) for size in (state.blocksize, *out.shape))
    decode(get_ptr(packed), get_ptr(absmax), get_ptr(out), *sizes)
    return out


def _decode_bitsandbytes_fresh(case: Case, context: Context) -> Runnable:
    from bitsandbytes.functional import dequantize_4bit

    packed, state = _bitsandbytes_parts(case, context)
    state.dtype = case.dtype
    return Runnable(lambda: dequantize_4bit(packed, state), details="fresh memory")


def _copy(case: Case, context: Context) -> Runnable:
    """Copying the dense weight: the bytes per second that decoding is held against."""
    source = _dense(case, context)
    target = torch.empty_like(source)
    return Runnable(lambda: target.copy_(source), bytes_moved=2 * source.nbytes)


def _quantize_ours(case: Case, context: Context) -> Runnable:
    dense = _dense(case, context)
    return Runnable(lambda: quantize_nf4(dense), kernels=kernels_path(context.device))


def _quantize_bitsandbytes(case: Case, context: Context) -> Runnable:
    from bitsandbytes.functional import quantize_4bit

    dense = _dense(case, context)
    return Runnable(lambda: quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4"))


def _convert_case(name: str, n: int, k: int, dtype: torch.dtype) -> Case:
    traffic = _nf4_bytes(n, k) + n * k * dtype.itemsize
    return Case(name, {"n": n, "k": k}, dtype, bytes_moved=traffic)


def _convert_cases() -> tuple[Case, ...]:
    gate = model_shape("Qwen2.5-7B").linears["mlp.gate_proj"]
    return (
        _convert_case("4096x4096-bf16", *_SQUARE, torch.bfloat16),
        _convert_case("4096x4096-fp32", *_SQUARE, torch.float32),
        _convert_case("Qwen2.5-7B-gate_proj-bf16", *gate, torch.bfloat16),
    )


BENCHMARKS = (
    Benchmark(
        name="nf4_linear",
        summary="x @ NF4 weight^T against a dense GEMM and bitsandbytes",
        cases=_linear_cases(),
        toy=_linear_case(TOY, 3, 128, 64, torch.float32),
        implementations=(
            Implementation("ladder_kernels", _linear_ours, "ours"),
            Implementation("dense", _linear_dense),
            Implementation("dense_fp32", _linear_dense_fp32, "bound"),
            Implementation("bitsandbytes", _linear_bitsandbytes),
            Implementation("bitsandbytes_matmul", _linear_bitsandbytes_matmul),
        ),
    ),
    Benchmark(
        name="dequantize_nf4",
        summary="NF4 with double quantization to a dense matrix, against bitsandbytes and a plain copy",
        cases=_convert_cases(),
        toy=_convert_case(TOY, 128, 64, torch.bfloat16),
        implementations=(
            Implementation("ladder_kernels", _decode_ours, "ours"),
            Implementation("ladder_kernels_fresh", _decode_ours_fresh, "ours"),
            Implementation("bitsandbytes", _decode_bitsandbytes),
            Implementation("bitsandbytes_fresh", _decode_bitsandbytes_fresh),
            Implementation("copy", _copy, "bound"),
        ),
    ),
    Benchmark(
        name="quantize_nf4",
        summary="dense matrix to NF4 with double quantization, against bitsandbytes",
        cases=_convert_cases(),
        toy=_convert_case(TOY, 128, 64, torch.bfloat16),
        implementations=(
            Implementation("ladder_kernels", _quantize_ours, "ours"),
            Implementation("bitsandbytes", _quantize_bitsandbytes),
        ),
    ),
)
