"""NF4 against bitsandbytes, a dense GEMM and a plain copy: `nf4_linear`, `dequantize_nf4`, `quantize_nf4`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
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
_GRAPHED_BELOW = 32  # tokens


def _nf4_bytes(rows: int, columns: int) -> int:
    """Codes, one-byte block scales and their scales of a double-quantized weight."""
    blocks = -(-rows * columns // 64)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // 256)


def _matrices(case: Case) -> tuple[tuple[int, int], ...]:
    """(N, K) of every weight of the case: the one it names, or all linears of a block of its model."""
    if case.model:
        return tuple(model_shape(case.model).linears.values())
    return ((case.sizes["n"], case.sizes["k"]),)


def _weights(case: Case, context: Context) -> list[NF4Weight]:
    generator = torch.Generator(context.device).manual_seed(_SEED)
    return [random_nf4_weight(n, k, generator) for n, k in _matrices(case)]


def _inputs(case: Case, context: Context) -> list[Tensor]:
    """One x [M, K] per weight."""
    generator = torch.Generator(context.device).manual_seed(_SEED + 1)
    sizes = [(case.sizes["m"], k) for _, k in _matrices(case)]
    return [torch.randn(size, generator=generator, device=context.device).to(case.dtype) for size in sizes]


def _dense(case: Case, context: Context) -> list[Tensor]:
    assert case.dtype is not None
    return [dequantize_nf4(weight, case.dtype) for weight in _weights(case, context)]


def _bitsandbytes_parts(weight: NF4Weight) -> tuple[Tensor, Any]:
    """Packed codes and quantization state of the same weight, as bitsandbytes holds them."""
    from bitsandbytes.functional import QuantState

    tensors = weight.to_bitsandbytes("weight")
    packed = tensors.pop("weight").reshape(-1, 1)
    state = {key.removeprefix("weight."): tensor for key, tensor in tensors.items()}
    return packed, QuantState.from_dict(state, device=weight.device)


def _in_turn(products: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """One call of each product on its input, without gradients; the last output is returned."""

    @torch.no_grad()
    def call() -> Tensor:
        for product, x in zip(products, inputs, strict=True):
            out = product(x)
        return out

    return call


def _linear_ours(case: Case, context: Context) -> Runnable:
    workspace = Workspace()
    products = [partial(nf4_linear, nf4_weight=weight, workspace=workspace) for weight in _weights(case, context)]
    return Runnable(_in_turn(products, _inputs(case, context)), kernels=kernels_path(context.device))


def _linear_dense(case: Case, context: Context) -> Runnable:
    weights = _dense(case, context)
    traffic = sum(weight.nbytes for weight in weights) + _activation_bytes(case)
    products = [partial(F.linear, weight=weight) for weight in weights]
    return Runnable(_in_turn(products, _inputs(case, context)), bytes_moved=traffic)


def _linear_dense_fp32(case: Case, context: Context) -> Runnable:
    """The GEMM that bounds 16-bit products on a CPU without 16-bit units: twice the bytes, no conversions."""
    weights, inputs = ([tensor.float() for tensor in each(case, context)] for each in (_dense, _inputs))
    products = [partial(F.linear, weight=weight) for weight in weights]
    traffic = sum(weight.nbytes for weight in weights) + 2 * _activation_bytes(case)
    return Runnable(_in_turn(products, inputs), bytes_moved=traffic, details="fp32")


def _linear_bitsandbytes(case: Case, context: Context) -> Runnable:
    """`Linear4bit` in evaluation mode, which picks bitsandbytes' packed CPU path where the machine has one."""
    layers = [_linear4bit(weight, case) for weight in _weights(case, context)]
    return Runnable(_in_turn(layers, _inputs(case, context)), details=_bitsandbytes_path(layers[0], context))


def _linear4bit(weight: NF4Weight, case: Case) -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    packed, state = _bitsandbytes_parts(weight)
    rows, columns = weight.shape
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=case.dtype, quant_type="nf4", device="meta")
    layer.weight = Params4bit(packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True)
    layer.weight.module = layer
    return layer.eval()


def _bitsandbytes_path(layer: torch.nn.Module, context: Context) -> str:
    if context.device.type != "cpu":
        return "gemm_4bit"
    return "packed AVX512-BF16" if layer.support_avx512bf16_for_cpu else "dequantize and F.linear (no AVX512-BF16)"


def _linear_bitsandbytes_matmul(case: Case, context: Context) -> Runnable:
    """`matmul_4bit`, the path of a training step on a CPU."""
    from bitsandbytes import matmul_4bit

    parts = [_bitsandbytes_parts(weight) for weight in _weights(case, context)]
    products = [partial(matmul_4bit, B=packed, quant_state=state) for packed, state in parts]
    return Runnable(_in_turn(products, _inputs(case, context)))


def _activation_bytes(case: Case) -> int:
    assert case.dtype is not None
    return case.sizes["m"] * sum(map(sum, _matrices(case))) * case.dtype.itemsize


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


def _layer_case(model: str, m: int) -> Case:
    """All linears of one block, in bf16; below 32 tokens they are shorter than their launches."""
    matrices = model_shape(model).linears.values()
    return Case(
        f"{model}-layer-m{m}-bf16",
        {"m": m, "linears": len(matrices)},
        torch.bfloat16,
        model=model,
        flops=sum(2 * m * n * k for n, k in matrices),
        bytes_moved=sum(_nf4_bytes(n, k) + 2 * m * (n + k) for n, k in matrices),
        devices=("cuda",),
        graphed=m < _GRAPHED_BELOW,
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
    cases += [_layer_case("Qwen2.5-7B", m) for m in (1, 2, 4, 8, 16, 512, 2048, 8192)]
    return tuple(cases)


def _outputs(case: Case, context: Context) -> list[Tensor]:
    """Memory for every decoded matrix of the case: one buffer, as a pass over a backbone reuses it."""
    sizes = _matrices(case)
    buffer = torch.empty(max(n * k for n, k in sizes), dtype=case.dtype, device=context.device)
    return [buffer[: n * k].view(n, k) for n, k in sizes]


def _decode_ours(case: Case, context: Context) -> Runnable:
    assert case.dtype is not None
    jobs, dtype = list(zip(_weights(case, context), _outputs(case, context), strict=True)), case.dtype

    def call() -> Tensor:
        for weight, out in jobs:
            dequantize_nf4(weight, dtype, out=out)
        return out

    return Runnable(call, details="out reused", kernels=kernels_path(context.device))


def _decode_ours_fresh(case: Case, context: Context) -> Runnable:
    assert case.dtype is not None
    weights, dtype = _weights(case, context), case.dtype

    def call() -> Tensor:
        for weight in weights:
            out = dequantize_nf4(weight, dtype)
        return out

    return Runnable(call, details="fresh memory", kernels=kernels_path(context.device))


def _decode_bitsandbytes(case: Case, context: Context) -> Runnable:
    from bitsandbytes.functional import dequantize_4bit

    is_cpu = context.device.type == "cpu"
    jobs = [
        (*_bitsandbytes_parts(weight), out)
        for weight, out in zip(_weights(case, context), _outputs(case, context), strict=True)
    ]

    def call() -> Tensor:
        for packed, state, out in jobs:
            state.dtype = case.dtype
            if is_cpu:
                _bitsandbytes_decode_into(packed, state, out)
            else:
                dequantize_4bit(packed, state, out=out)
        return out

    return Runnable(call, details="out reused, C function" if is_cpu else "out reused")


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

    parts = [_bitsandbytes_parts(weight) for weight in _weights(case, context)]

    def call() -> Tensor:
        for packed, state in parts:
            state.dtype = case.dtype
            out = dequantize_4bit(packed, state)
        return out

    return Runnable(call, details="fresh memory")


def _copy(case: Case, context: Context) -> Runnable:
    """Copying the dense weights: the bytes per second that converting is held against."""
    jobs = list(zip(_dense(case, context), _outputs(case, context), strict=True))

    def call() -> Tensor:
        for source, target in jobs:
            target.copy_(source)
        return target

    return Runnable(call, bytes_moved=2 * sum(source.nbytes for source, _ in jobs))


def _quantize_ours(case: Case, context: Context) -> Runnable:
    (dense,) = _dense(case, context)
    return Runnable(lambda: quantize_nf4(dense), kernels=kernels_path(context.device))


def _quantize_bitsandbytes(case: Case, context: Context) -> Runnable:
    from bitsandbytes.functional import quantize_4bit

    (dense,) = _dense(case, context)
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


def _decode_layer_case(model: str) -> Case:
    """All linears of one block: a pass over the model is this times its blocks."""
    matrices = model_shape(model).linears.values()
    return Case(
        f"{model}-layer-bf16",
        {"linears": len(matrices)},
        torch.bfloat16,
        model=model,
        bytes_moved=sum(_nf4_bytes(n, k) + 2 * n * k for n, k in matrices),
        devices=("cuda",),
        graphed=True,
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
            Implementation("dense_fp32", _linear_dense_fp32, "bound", devices=("cpu",)),
            Implementation("bitsandbytes", _linear_bitsandbytes),
            Implementation("bitsandbytes_matmul", _linear_bitsandbytes_matmul, devices=("cpu",)),
        ),
    ),
    Benchmark(
        name="dequantize_nf4",
        summary="NF4 with double quantization to a dense matrix, against bitsandbytes and a plain copy",
        cases=(*_convert_cases(), _decode_layer_case("Qwen2.5-7B")),
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
            Implementation("copy", _copy, "bound"),
        ),
    ),
)
