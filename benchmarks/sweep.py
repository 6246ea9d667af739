"""A step of four side networks from one backbone pass, against a step of one, and of four one after the other.

The step is that of `train_step` (forward, loss, backward, AdamW; preset ladder, four seeds), on the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.models import case_backbone
from benchmarks.registry import TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape, prepare_checkpoint
from benchmarks.train_step import REDUCTION_FACTOR, ladder_step


def _networks(count: int, in_turn: bool = False) -> Callable[[Case, Context], Runnable]:
    """A builder of one step of each of `count` networks: in lockstep, or each with a backbone pass of its own."""

    def build(case: Case, context: Context) -> Runnable:
        from engine import LadderConfig, LadderForCausalLM
        from engine.training.lockstep import Lockstep

        configs = [LadderConfig(reduction_factor=REDUCTION_FACTOR, seed=seed) for seed in range(count)]
        first = LadderForCausalLM.from_backbone(case_backbone(case, context), configs[0])
        models = [first, *(first.beside(config) for config in configs[1:])]
        steps = [ladder_step(model, case, context) for model in models]
        lockstep = Lockstep(first.model)

        def call() -> object:
            if in_turn:
                return [step.call() for step in steps]
            outcomes = lockstep.run([step.call for step in steps])
            for outcome in outcomes:
                if outcome.error is not None:
                    raise outcome.error
            return [outcome.value for outcome in outcomes]

        kernels = "" if in_turn else steps[0].kernels  # the same in all; those in turn are what is compared with
        return dataclasses.replace(steps[0], call=call, details=f"{count} x {steps[0].details}", kernels=kernels)

    return build


def _case(name: str, model: str, tokens: int, vocab: int | None = None, *, devices: tuple[str, ...]) -> Case:
    sizes = {"tokens": tokens, "batch": 1, "vocab": model_shape(model, vocab).vocab_size}
    return Case(name, sizes, model=model, tokens=tokens, devices=devices)


BENCHMARKS = (
    Benchmark(
        name="sweep",
        summary="one optimizer step of four side networks from one backbone pass, of one, and of four in turn",
        cases=(
            _case("Qwen2.5-0.5B-v32000-t512", "Qwen2.5-0.5B", 512, 32000, devices=("cpu",)),
            _case("Qwen2.5-0.5B-t2048", "Qwen2.5-0.5B", 2048, devices=("cuda",)),
            _case("Qwen2.5-7B-t2048", "Qwen2.5-7B", 2048, devices=("cuda",)),
        ),
        toy=_case(TOY, "toy", 24, devices=("cpu", "cuda")),
        implementations=(
            Implementation("four_together", _networks(4), "ours"),
            Implementation("one", _networks(1, in_turn=True)),
            Implementation("four_in_turn", _networks(4, in_turn=True)),
        ),
        isolated=True,
        seconds=60.0,
        prepare=prepare_checkpoint,
    ),
)
