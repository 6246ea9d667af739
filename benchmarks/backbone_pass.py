"""The frozen backbone's forward pass against the bare matrix products in it, dense: how much of the GEMM rate it keeps.

FLOPs are those of the linears alone, so attention, norms, decoding and launches all count against the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels_path import kernels_path
from benchmarks.models import case_backbone
from benchmarks.registry import TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape, prepare_checkpoint
from engine.dtypes import compute_dtype
from engine.sequence import SequenceLayout


def _pass(case: Case, context: Context) -> Runnable:
    backbone = case_backbone(case, context)
    tokens, device = case.sizes["tokens"], context.device
    generator = torch.Generator(device).manual_seed(0)
    input_ids = torch.randint(case.sizes["vocab"], (tokens,), generator=generator, device=device)

    def call() -> Tensor:
        layout = SequenceLayout.packed([tokens], device)
        for _, hidden in backbone.hidden_states(input_ids, layout):
            last = hidden
        return last

    return Runnable(call, kernels=kernels_path(device))


def _products(case: Case, context: Context) -> Runnable:
    """The linears of one block as dense products into reused memory, once per block."""
    shape, tokens, device = model_shape(case.model), case.sizes["tokens"], context.device
    dtype = compute_dtype(device)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    sizes = shape.linears.values()
    inputs = {k: random(tokens, k) for k in {k for _, k in sizes}}
    outputs = {n: random(tokens, n) for n in {n for n, _ in sizes}}
    jobs = [(inputs[k], random(n, k), outputs[n]) for n, k in sizes]

    def call() -> Tensor:
        for _ in range(shape.num_layers):
            for x, weight, out in jobs:
                torch.mm(x, weight.T, out=out)
        return out

    return Runnable(call)


def _case(name: str, model: str, tokens: int, *devices: str) -> Case:
    shape = model_shape(model)
    weights = shape.num_layers * sum(n * k for n, k in shape.linears.values())
    sizes = {"tokens": tokens, "vocab": shape.vocab_size}
    return Case(name, sizes, model=model, flops=2 * tokens * weights, tokens=tokens, devices=devices)


BENCHMARKS = (
    Benchmark(
        name="backbone_pass",
        summary="forward pass of the frozen NF4 backbone against the bare dense products in it",
        cases=tuple(_case(f"Qwen2.5-7B-t{tokens}", "Qwen2.5-7B", tokens, "cuda") for tokens in (2048, 8192)),
        toy=_case(TOY, "toy", 24, "cpu", "cuda"),
        implementations=(
            Implementation("ladder", _pass, "ours"),
            Implementation("products", _products, "bound"),
        ),
        prepare=prepare_checkpoint,
    ),
)
