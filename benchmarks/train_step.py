"""One optimizer step (forward, loss, backward, AdamW) of our side networks against the same step of QLoRA.

Same weights, same tokens, same labels (every token but the first), one run, taking turns. Every implementation
lives in a process of its own, so that memory is its own; the others sleep on a pipe meanwhile. Memory growth
(`step_mib`) is the peak of the resident set (CPU) or of allocated bytes (GPU) during the first two steps above the
state after loading: activations, scratch, gradients and optimizer state. `build_and_step_mib` counts from before
loading, so with the weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from benchmarks.kernels_path import kernels_path
from benchmarks.models import case_backbone, case_nf4_model
from benchmarks.qlora import bitsandbytes_path, qlora_loss, qlora_model
from benchmarks.registry import DTYPE_NAMES, TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape, prepare_checkpoint

if TYPE_CHECKING:
    from engine import LadderForCausalLM

REDUCTION_FACTOR = 16
LEARNING_RATE = 1e-4


def _batch(case: Case, context: Context) -> tuple[Tensor, Tensor]:
    """Random token ids [B, T] and the same as labels, which the models shift."""
    generator = torch.Generator().manual_seed(0)
    size = (case.sizes["batch"], case.sizes["tokens"])
    input_ids = torch.randint(case.sizes["vocab"], size, generator=generator).to(context.device)
    return input_ids, input_ids.clone()


def _ladder(preset: str, cuda_graph: bool = False) -> Callable[[Case, Context], Runnable]:
    """A builder of our step with a preset of `LadderConfig`.

    With `cuda_graph` forward and backward are replayed as by `LadderArguments(cuda_graph=True)`, the optimizer is not.
    Nothing in it waits for the device: document lengths and supervised rows come from the host.
    """

    def build(case: Case, context: Context) -> Runnable:
        from engine import LadderConfig, LadderForCausalLM

        backbone = case_backbone(case, context)
        config = LadderConfig.preset(preset, reduction_factor=REDUCTION_FACTOR)
        return ladder_step(LadderForCausalLM.from_backbone(backbone, config), case, context, cuda_graph)

    return build


def ladder_step(model: LadderForCausalLM, case: Case, context: Context, cuda_graph: bool = False) -> Runnable:
    """Our step of the case's tokens, on the batch that our trainer's collator makes."""
    from engine.data.collator import Collator

    model.train()
    input_ids, _ = _batch(case, context)
    batch = Collator()([{"input_ids": sample} for sample in input_ids.cpu()])
    for name, value in batch.items():
        if isinstance(value, Tensor):
            batch[name] = value.to(context.device)
    training_pass = _training_pass(lambda: model(**batch).loss)
    if cuda_graph and context.device.type == "cuda":
        training_pass = _replayed(model, batch, context.device)
    return Runnable(
        _step(model, training_pass),
        details=f"{DTYPE_NAMES[model.backbone.dtype]} backbone, {_count_trainable(model)}",
        kernels=kernels_path(context.device),
    )


def _replayed(model: LadderForCausalLM, batch: dict[str, Any], device: torch.device) -> Callable[[], Tensor]:
    """The training pass as a graph, captured here and not in the time of the first calls."""
    from engine.training.step_graph import EAGER_PASSES, CudaGraphs, StepGraphs

    graphs = StepGraphs(model, CudaGraphs(device))

    def training_pass() -> Tensor:
        return graphs(lambda inputs: _training_pass(lambda: model(**inputs).loss)(), batch)

    for _ in range(EAGER_PASSES + 1):
        model.zero_grad()
        training_pass()
    return training_pass


def _deterministic(builder: Callable[[Case, Context], Runnable]) -> Callable[[Case, Context], Runnable]:
    """The same step under torch's deterministic algorithms, whose cost this shows."""

    def build(case: Case, context: Context) -> Runnable:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it at every product
        runnable = builder(case, context)

        def step() -> object:
            was_enabled = torch.are_deterministic_algorithms_enabled()
            was_filled = deterministic.fill_uninitialized_memory
            torch.use_deterministic_algorithms(True)
            deterministic.fill_uninitialized_memory = False  # a debugging aid, no part of the algorithms
            try:
                return runnable.call()
            finally:
                torch.use_deterministic_algorithms(was_enabled)
                deterministic.fill_uninitialized_memory = was_filled

        return dataclasses.replace(runnable, call=step, details=f"{runnable.details}, deterministic")

    return build


def _qlora(dtype: torch.dtype, checkpointing: bool) -> Callable[[Case, Context], Runnable]:
    """A builder of QLoRA's step, multiplying in `dtype`, keeping activations or recomputing them."""

    def build(case: Case, context: Context) -> Runnable:
        model = qlora_model(case_nf4_model(case, context, dtype), checkpointing)
        input_ids, labels = _batch(case, context)
        details = f"{DTYPE_NAMES[dtype]}, {_count_trainable(model)}, {bitsandbytes_path(context.device)}"
        training_pass = _training_pass(lambda: qlora_loss(model, input_ids, labels, dtype))
        return Runnable(_step(model, training_pass), details=details)

    return build


def _training_pass(loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Forward and backward, returning the loss."""

    def training_pass() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss.detach()

    return training_pass


def _step(model: nn.Module, training_pass: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step both sides share, returning its loss; gradients are freed in between, as trainers do."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_gpu = trained[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True, capturable=is_gpu)

    def step() -> Tensor:
        loss = training_pass()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _count_trainable(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M trainable"


def _case(name: str, model: str, tokens: int, vocab: int | None = None, *, devices: tuple[str, ...]) -> Case:
    sizes = {"tokens": tokens, "batch": 1, "vocab": model_shape(model, vocab).vocab_size}
    return Case(name, sizes, model=model, tokens=tokens, devices=devices)


BENCHMARKS = (
    Benchmark(
        name="train_step",
        summary="one optimizer step of ladder and xladder against QLoRA (transformers, peft, bitsandbytes)",
        cases=(
            _case("Qwen2.5-0.5B-v32000-t512", "Qwen2.5-0.5B", 512, 32000, devices=("cpu",)),
            _case("Qwen2.5-0.5B-t2048", "Qwen2.5-0.5B", 2048, devices=("cuda",)),
            _case("Llama-3.2-1B-t2048", "Llama-3.2-1B", 2048, devices=("cuda",)),
            _case("Qwen2.5-7B-t2048", "Qwen2.5-7B", 2048, devices=("cuda",)),
            _case("Llama-3.1-8B-t2048", "Llama-3.1-8B", 2048, devices=("cuda",)),
        ),
        toy=_case(TOY, "toy", 24, devices=("cpu", "cuda")),
        implementations=(
            Implementation("ladder", _ladder("ladder"), "ours"),
            Implementation("xladder", _ladder("xladder"), "ours"),
            Implementation("ladder_graphed", _ladder("ladder"), "ours", ("cuda",), graphed=True),
            Implementation("ladder_cuda_graph", _ladder("ladder", cuda_graph=True), "ours", ("cuda",)),
            Implementation("ladder_deterministic", _deterministic(_ladder("ladder")), "ours", ("cuda",)),
            Implementation("qlora", _qlora(torch.bfloat16, checkpointing=True)),
            Implementation("qlora_kept", _qlora(torch.bfloat16, checkpointing=False)),
            Implementation("qlora_fp32", _qlora(torch.float32, checkpointing=True), devices=("cpu",)),
            Implementation("qlora_fp32_kept", _qlora(torch.float32, checkpointing=False), devices=("cpu",)),
        ),
        isolated=True,
        seconds=60.0,
        prepare=prepare_checkpoint,
    ),
)
