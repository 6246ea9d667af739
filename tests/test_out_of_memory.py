"""Memory that runs out in training: injected at every place, nothing of the interrupted step may be left."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import ladder_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import TrainerCallback
from typer.testing import CliRunner

from engine import LadderArguments, LadderForCausalLM, LadderTrainer
from engine.backbone import Backbone
from engine.cli import app
from engine.model.ladder_model import LadderModel
from engine.model.side_network import SideLayer
from engine.training.out_of_memory import TrainingMemoryError, WholeSteps, is_out_of_memory

pytestmark = pytest.mark.usefixtures("one_thread")

RECORDS = [
    {"input_ids": list(range(start, start + 20)), "labels": list(range(start, start + 20))} for start in range(8)
]
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "python": MemoryError,
}


def trainer(output: Path, **options: Any) -> LadderTrainer:
    settings = {"max_steps": 3, "warmup_steps": 0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True, "max_length": 32}
    return LadderTrainer(
        ladder_model("ladder").train(), LadderArguments(str(output), **(settings | options)), train_dataset=RECORDS
    )


def everything(training: LadderTrainer) -> dict[str, Any]:
    """Parameters, moments, step counters and schedule."""
    optimizer = training.optimizer.optimizer
    names = {parameter: name for name, parameter in training.model.named_parameters()}
    state = {
        f"{names[parameter]}.{key}": value for parameter, kept in optimizer.state.items() for key, value in kept.items()
    }
    rates = [group["lr"] for group in optimizer.param_groups]
    copies = {name: value.detach().clone() for name, value in (dict(training.model.named_parameters()) | state).items()}
    return copies | {"rates": rates, "last_epoch": training.lr_scheduler.last_epoch}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


class Steps(TrainerCallback):
    """Everything after each whole step, and at the beginning."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.training: LadderTrainer | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        with _disable_current_modes():
            self.seen.append(everything(self.training))

    on_step_end = on_train_begin


def failing(function: Callable[..., Any], after: int, error: Callable[[], Exception]) -> Callable[..., Any]:
    """The function, which runs out of memory at its call number `after`, and at no other."""
    calls = iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == after:
            raise error()
        return function(*args, **kwargs)

    return call


class FailingOp(TorchDispatchMode):
    """Runs out of memory in the op number `after` of those that allocate: in-place ones do not."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.seen = after, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        self.seen += any("Tensor" in str(one.type) and one.alias_info is None for one in returns)
        if self.seen == self.after + 1:
            self.seen += 1  # no other one fails
            raise ERRORS["cuda"]()
        return func(*args, **(kwargs or {}))


def observed(training: LadderTrainer) -> Steps:
    steps = Steps()
    steps.training = training
    training.add_callback(steps)
    return steps


def assert_usable(training: LadderTrainer, expected: dict[str, Any], folder: Path) -> None:
    """As after the last whole step, without gradients; it can be saved."""
    assert_same(everything(training), expected)
    assert all(parameter.grad is None for parameter in training.model.parameters())
    training.save_model(str(folder / "saved"))
    saved = LadderForCausalLM.from_pretrained(folder / "saved", backbone=training.model.backbone)
    assert_same(dict(saved.named_parameters()), dict(training.model.named_parameters()))


def test_whatever_op_fails_the_last_whole_step_stands(tmp_path: Path) -> None:
    training = trainer(tmp_path, max_steps=2)
    with FailingOp(10**9) as counted:
        training.train()
    ends = []
    for after in torch.linspace(0, 0.95 * counted.seen, 5).int().tolist():
        training = trainer(tmp_path, max_steps=2)
        steps = observed(training)
        with FailingOp(after), pytest.raises(TrainingMemoryError, match="CUDA out of memory"):
            training.train()
        ends.append(training.state.global_step)
        if steps.seen:
            training.remove_callback(steps)
            assert_usable(training, steps.seen[-1], tmp_path)
    assert {0, 1} <= set(ends)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("after", [3, 40])
def test_an_optimizer_step_that_ends_halfway_is_undone(tmp_path: Path, step: int, after: int) -> None:
    """AdamW one parameter after the other: at first it makes moments, later it allocates temporaries."""
    training = trainer(tmp_path, optim="adamw_torch")
    steps, modes = observed(training), []
    create = training.create_optimizer

    def create_failing() -> torch.optim.Optimizer:
        def begin(*_: Any) -> None:
            modes.append(FailingOp(after if len(modes) == step else 10**9))
            modes[-1].__enter__()

        optimizer = create()  # whose own hooks come first
        optimizer.register_step_pre_hook(begin)
        optimizer.register_step_post_hook(lambda *_: modes[-1].__exit__(None, None, None))
        return optimizer

    training.create_optimizer = create_failing  # type: ignore[method-assign]
    with pytest.raises(TrainingMemoryError, match=rf"in the phase 'optimizer' of step {step + 1}"):
        try:
            training.train()
        finally:
            modes[-1].__exit__(None, None, None)
    training.remove_callback(steps)
    assert modes[-1].seen > after and len(steps.seen) == step + 1
    training.create_optimizer = create  # type: ignore[method-assign]
    assert_usable(training, steps.seen[-1], tmp_path)
    assert training.train().global_step == training.args.max_steps


def test_fused_steps_with_moments_are_not_copied() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], fused=True)
    whole = WholeSteps(optimizer)
    copies = []
    optimizer.register_step_pre_hook(lambda *_: copies.append(whole._before is not None))
    for _ in range(2):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert copies == [True, False] and whole._before is None


def in_backward(function: Callable[..., Tensor], after: int, error: Callable[[], Exception]) -> Callable[..., Tensor]:
    """The function, the gradient of whose result runs out of memory at backward number `after`."""
    hook = failing(lambda gradient: gradient, after, error)

    def call(*args: Any, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        result.register_hook(hook)
        return result

    return call


@pytest.mark.parametrize(
    ("phase", "owner", "name", "inject", "error"),
    [
        ("backbone pass", Backbone, "_mlp", failing, "cuda"),
        ("side forward", SideLayer, "forward", failing, "cpu"),
        ("loss", sys.modules["ladder_kernels.linear_cross_entropy"], "_compute", failing, "python"),
        ("backward", LadderModel, "combined", in_backward, "cuda"),
    ],
)
def test_the_message_has_phase_plan_measurement_and_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, owner: Any, name: str, inject: Any, error: str
) -> None:
    training = trainer(tmp_path)
    original = getattr(owner, name)
    seen: list[weakref.ref[Tensor]] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        seen.extend(weakref.ref(tensor) for tensor in tensors if tensor is not training.model.backbone.head_weight)
        return original(*args, **kwargs)

    failing_one = inject(watched, 5, ERRORS[error])
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: failing_one(*args, **kwargs))
    with pytest.raises(TrainingMemoryError) as caught:
        training.train()
    text = str(caught.value)
    assert f"out of memory in the phase {phase!r} of step " in text and "batch 2 of up to 20 tokens" in text
    assert re.search(r"Planned: 0\.00 GB at the peak .*Measured: \d+\.\d\d GB\. Free now: \d+\.\d\d GB\.", text)
    remedies = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(remedies) == 3 and remedies[0].startswith("  half the group_tokens")
    assert str(ERRORS[error]()) in text
    assert seen and not [ref for ref in seen if ref() is not None], "the error keeps tensors alive"


@pytest.mark.parametrize("error", ERRORS)
def test_what_is_out_of_memory(error: str) -> None:
    assert is_out_of_memory(ERRORS[error]())
    try:
        raise RuntimeError("cuda_graph: cannot be captured") from ERRORS[error]()
    except RuntimeError as wrapped:
        assert is_out_of_memory(wrapped)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes disagree"))


def test_other_errors_pass_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "_mlp", failing(Backbone._mlp, 3, lambda: RuntimeError("shapes disagree")))
    with pytest.raises(RuntimeError, match=r"^shapes disagree$"):
        trainer(tmp_path).train()


def test_a_loss_scale_can_go_on(tmp_path: Path) -> None:
    """fp16: gradients were unscaled when memory ran out; the next step unscales its own."""
    training = trainer(tmp_path)
    training.train()
    scaler = training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = training.optimizer.optimizer
    for _ in range(2):
        loss = sum(parameter.sum() for parameter in training.model.parameters())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        training._return_to_whole_step()
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("error", [*ERRORS, "training"])
def test_the_command_ends_with_one_message(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    raised = ERRORS[error]() if error in ERRORS else TrainingMemoryError("in step 7, with all its numbers")
    monkeypatch.setattr("engine.training.finetune.finetune", failing(lambda *_: None, 0, lambda: raised))
    result = CliRunner().invoke(app, ["train"])
    assert result.exit_code == 1 and "Traceback" not in result.output and "error: " in result.output
    assert ("--batch-size" in result.output) == (error in ERRORS) and str(raised) in result.output
