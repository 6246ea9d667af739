"""Loss of a frozen head, forward and the gradient to its input, against full logits and two bare GEMMs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels_path import kernels_path
from benchmarks.registry import DTYPE_NAMES, TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape
from ladder_kernels import linear_cross_entropy


def _inputs(case: Case, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [R, D] with gradient, head [V, D] without, targets [R]."""
    rows, width, vocabulary = (case.sizes[name] for name in ("rows", "hidden", "vocab"))
    device = context.device
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device).to(case.dtype).requires_grad_()
    head = torch.empty(vocabulary, width, dtype=case.dtype, device=device)
    head.normal_(std=width**-0.5, generator=generator)
    return hidden, head, torch.randint(vocabulary, (rows,), generator=generator, device=device)


def _ours(case: Case, context: Context) -> Runnable:
    hidden, head, targets = _inputs(case, context)

    def call() -> None:
        linear_cross_entropy(hidden, head, targets).backward()
        hidden.grad = None

    return Runnable(call, kernels=kernels_path(context.device))


def _full_logits(case: Case, context: Context) -> Runnable:
    """What transformers does: all logits, in fp32."""
    hidden, head, targets = _inputs(case, context)

    def call() -> None:
        F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum").backward()
        hidden.grad = None

    return Runnable(call)


def _two_gemms(case: Case, context: Context) -> Runnable:
    """Logits and the input gradient as bare products into reused memory: no exact algorithm does less arithmetic."""
    hidden, head, _ = _inputs(case, context)
    hidden = hidden.detach()
    logits = torch.empty(len(hidden), len(head), dtype=hidden.dtype, device=hidden.device)
    gradient = torch.empty_like(hidden)

    def call() -> None:
        torch.mm(hidden, head.t(), out=logits)
        torch.mm(logits, head, out=gradient)

    return Runnable(call)


def _case(name: str, rows: int, width: int, vocabulary: int, dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    return Case(
        name,
        {"rows": rows, "hidden": width, "vocab": vocabulary},
        dtype,
        flops=4 * rows * width * vocabulary,
        bytes_moved=(2 * vocabulary * width + 2 * rows * width) * dtype.itemsize,
        tokens=rows,
        devices=devices,
    )


def _model_case(model: str, rows: int, dtype: torch.dtype, *devices: str, vocabulary: int | None = None) -> Case:
    shape = model_shape(model, vocabulary)
    name = f"{model}-v{shape.vocab_size}-r{rows}-{DTYPE_NAMES[dtype]}"
    return _case(name, rows, shape.hidden_size, shape.vocab_size, dtype, devices)


BENCHMARKS = (
    Benchmark(
        name="linear_cross_entropy",
        summary="loss of a frozen head with the gradient to its input, against full logits and two bare GEMMs",
        cases=(
            _model_case("Qwen2.5-0.5B", 512, torch.float32, "cpu", vocabulary=32000),
            _model_case("Qwen2.5-0.5B", 512, torch.bfloat16, "cpu", "cuda", vocabulary=32000),
            _model_case("Qwen2.5-0.5B", 512, torch.float32, "cpu"),
            _model_case("Llama-2-7B", 512, torch.float32, "cpu"),
            _model_case("Qwen2.5-7B", 2048, torch.bfloat16, "cuda"),
            _model_case("Llama-3.1-8B", 8192, torch.bfloat16, "cuda"),
        ),
        toy=_case(TOY, 5, 32, 101, torch.float32, ("cpu", "cuda")),
        implementations=(
            Implementation("ladder_kernels", _ours, "ours"),
            Implementation("torch_full_logits", _full_logits),
            Implementation("two_gemms", _two_gemms, "bound"),
        ),
    ),
)
