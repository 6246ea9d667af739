"""RMSNorm, rotary embedding and SwiGLU, all bound by memory, against plain torch and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels_path import kernels_path
from benchmarks.registry import TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape
from ladder_kernels import reference, rms_norm, rotary, swiglu

Operation = Callable[..., Tensor]
_EPSILON = 1e-6


def _random(case: Case, context: Context, *sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(context.device).manual_seed(0)
    return [torch.randn(size, generator=generator, device=context.device).to(case.dtype) for size in sizes]


def _norm_arguments(case: Case, context: Context) -> list[Tensor | float]:
    tokens, width = case.sizes["tokens"], case.sizes["width"]
    return [*_random(case, context, (tokens, width), (width,)), _EPSILON]


def _rotary_arguments(case: Case, context: Context) -> list[Tensor | float]:
    tokens, heads, size = (case.sizes[name] for name in ("tokens", "heads", "head_dim"))
    return [*_random(case, context, (tokens, heads, size), (tokens, size), (tokens, size))]


def _swiglu_arguments(case: Case, context: Context) -> list[Tensor | float]:
    size = (case.sizes["tokens"], case.sizes["width"])
    return [*_random(case, context, size, size)]


def _implementation(
    operation: Operation, arguments: Callable[[Case, Context], list[Tensor | float]], *, is_ours: bool
) -> Callable[[Case, Context], Runnable]:
    def build(case: Case, context: Context) -> Runnable:
        values = arguments(case, context)
        kernels = kernels_path(context.device) if is_ours else ""
        return Runnable(torch.no_grad()(lambda: operation(*values)), kernels=kernels)

    return build


def _copy(case: Case, context: Context) -> Runnable:
    """As many bytes as the operation has to read and write, half of them read."""
    assert case.bytes_moved is not None
    source = torch.ones(case.bytes_moved // 2, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return Runnable(lambda: target.copy_(source))


def _case(name: str, sizes: dict[str, int], elements: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """`elements` are read and written in all, small tables included."""
    return Case(name, sizes, dtype, bytes_moved=elements * dtype.itemsize)


def _norm_case(name: str, tokens: int, width: int, dtype: torch.dtype) -> Case:
    return _case(name, {"tokens": tokens, "width": width}, 2 * tokens * width + width, dtype)


def _rotary_case(name: str, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Case:
    elements = 2 * tokens * heads * head_dim + 2 * tokens * head_dim
    return _case(name, {"tokens": tokens, "heads": heads, "head_dim": head_dim}, elements, dtype)


def _swiglu_case(name: str, tokens: int, width: int, dtype: torch.dtype) -> Case:
    return _case(name, {"tokens": tokens, "width": width}, 3 * tokens * width, dtype)


def _benchmark(
    name: str, ours: Operation, plain: Operation, arguments: Callable[..., list[Tensor | float]], cases: list[Case]
) -> Benchmark:
    *real, toy = cases
    return Benchmark(
        name=name,
        summary=f"{name} of a backbone pass against plain torch and a copy of the same bytes",
        cases=tuple(real),
        toy=toy,
        implementations=(
            Implementation("ladder_kernels", _implementation(ours, arguments, is_ours=True), "ours"),
            Implementation("torch", _implementation(plain, arguments, is_ours=False)),
            Implementation("copy", _copy, "bound"),
        ),
        seconds=1.0,
    )


def _benchmarks() -> tuple[Benchmark, ...]:
    shape, bf16, fp32 = model_shape("Qwen2.5-7B"), torch.bfloat16, torch.float32
    name, tokens = "Qwen2.5-7B-t2048-bf16", 2048
    norm_cases = [_norm_case(name, tokens, shape.hidden_size, bf16), _norm_case(TOY, 5, 48, fp32)]
    rotary_cases = [_rotary_case(name, tokens, shape.num_heads, 128, bf16), _rotary_case(TOY, 5, 3, 32, fp32)]
    swiglu_cases = [_swiglu_case(name, tokens, shape.intermediate_size, bf16), _swiglu_case(TOY, 5, 48, fp32)]
    return (
        _benchmark("rms_norm", rms_norm, reference.rms_norm, _norm_arguments, norm_cases),
        _benchmark("rotary", rotary, reference.rotary, _rotary_arguments, rotary_cases),
        _benchmark("swiglu", swiglu, reference.swiglu, _swiglu_arguments, swiglu_cases),
    )


BENCHMARKS = _benchmarks()
