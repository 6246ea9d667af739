"""Training steps in little memory: under the limit of a 12 GB or 6 GB card, and streamed against resident.

`memory_limit` takes the placement that `memory_budget` gives on a card of that size, builds it, lets torch's allocator
have no more than such a card has left, and trains. What it was planned to hold stands in `details`, what it held in
`build_and_step_mib`. Weights are random and made layer by layer, without that limit: the step is what is measured.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import torch

from benchmarks.measure import FLUSH_BYTES
from benchmarks.models import random_backbone
from benchmarks.registry import TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape
from benchmarks.train_step import REDUCTION_FACTOR, ladder_step
from engine.backbone.families import backbone_config
from engine.backbone.residency import Placement
from engine.config import LadderConfig
from engine.dtypes import compute_dtype
from engine.memory.planner import Planner
from engine.memory.workload import Workload
from engine.model.causal_lm import LadderForCausalLM
from engine.training.preflight import place_backbone

_CONTEXT_BYTES = 400 * 10**6  # of a card, what CUDA's context takes before torch allocates anything
CONFIG = LadderConfig.preset("ladder", reduction_factor=REDUCTION_FACTOR)


def _limited(case: Case, context: Context) -> Runnable:
    """The step as `memory_budget` places it on a card of `card_mb`."""
    shape, card_mb = model_shape(case.model, case.sizes["vocab"]), case.sizes["card_mb"]
    planner = Planner(backbone_config(shape.config()), CONFIG)
    itemsize = compute_dtype(context.device).itemsize
    work = Workload(case.sizes["tokens"], case.sizes["batch"], 1, context.device.type, itemsize)
    plan, options = place_backbone(planner, work, f"{card_mb}MB")
    backbone = random_backbone(shape, context.device, placement=Placement(**options))
    model = LadderForCausalLM.from_backbone(backbone, CONFIG)
    model.side_network.tap_policy = plan.policies.taps
    runnable = ladder_step(model, case, context)
    _limit(context.device, card_mb * 10**6 - _CONTEXT_BYTES + FLUSH_BYTES)
    planned = f"planned {plan.peak_bytes / 2**20:.1f} MiB ({plan.peak_phase}): {plan.policies.describe()}"
    return dataclasses.replace(
        runnable, details=f"{planned}; {runnable.details}", cleanup=lambda: _limit(context.device, None)
    )


def _limit(device: torch.device, size: int | None) -> None:
    """Let torch hold so many bytes of a GPU, None for all of it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(1.0 if size is None else min(1.0, size / total), device)


def _placed(residency: str) -> Callable[[Case, Context], Runnable]:
    """A builder of the step with all layers on the device, or all of them streamed."""

    def build(case: Case, context: Context) -> Runnable:
        shape = model_shape(case.model, case.sizes["vocab"])
        backbone = random_backbone(shape, context.device, placement=Placement(residency))
        return ladder_step(LadderForCausalLM.from_backbone(backbone, CONFIG), case, context)

    return build


def _case(name: str, model: str, tokens: int, devices: tuple[str, ...] = ("cuda",), **sizes: int) -> Case:
    sizes |= {"tokens": tokens, "batch": 1, "vocab": model_shape(model).vocab_size}
    return Case(name, sizes, model=model, tokens=tokens, devices=devices)


BENCHMARKS = (
    Benchmark(
        name="streamed_step",
        summary="one optimizer step with layers streamed from host memory against all of them on the device",
        cases=(_case("Qwen2.5-7B-t4096", "Qwen2.5-7B", 4096),),
        toy=_case(TOY, "toy", 24, ("cpu", "cuda")),
        implementations=(
            Implementation("ladder_streamed", _placed("host"), "ours"),
            Implementation("ladder_resident", _placed("device"), "ours"),
        ),
        isolated=True,
        seconds=20.0,
    ),
    Benchmark(
        name="memory_limit",
        summary="one optimizer step as memory_budget places it, under the memory limit of a smaller card",
        cases=(
            _case("Qwen2.5-7B-t2048-12GB", "Qwen2.5-7B", 2048, card_mb=12000),
            _case("Qwen2.5-7B-t2048-6GB", "Qwen2.5-7B", 2048, card_mb=6000),
            _case("Qwen2.5-32B-t2048-12GB", "Qwen2.5-32B", 2048, card_mb=12000),
        ),
        toy=_case(TOY, "toy", 24, ("cpu", "cuda"), card_mb=12000),
        implementations=(Implementation("ladder", _limited, "ours"),),
        isolated=True,
        seconds=5.0,
    ),
)
