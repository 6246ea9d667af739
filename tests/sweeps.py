"""A sweep of four small members, each of them alone, and what makes one end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from ladders import ladder_model
from transformers import TrainerCallback

from engine import LadderArguments, LadderTrainer

ROWS = [{"input_ids": list(range(n, n + 8 + n % 7)), "labels": list(range(n, n + 8 + n % 7))} for n in range(24)]
TEXTS = [{"prompt": "q" * (1 + n % 5), "completion": "ab" * (1 + (7 * n) % 11)} for n in range(24)]
SWEEP: list[dict[str, Any]] = [
    {"name": "base"},
    {"learning_rate": 3e-2, "lr_scheduler_type": "linear", "weight_decay": 0.1},
    {"preset": "xladder", "seed": 3, "max_grad_norm": 0.1},
    {"preset": "qst", "reduction_factor": 4, "optim": "sgd"},
]
NAMES = [
    "base",
    "1-learning_rate=0.03,lr_scheduler_type=linear,weight_decay=0.1",
    "2-preset=xladder,seed=3,max_grad_norm=0.1",
    "3-preset=qst,reduction_factor=4,optim=sgd",
]
TIMES = {"tokens_per_second", "peak_memory_mib"}


def arguments(folder: Path, **options: Any) -> LadderArguments:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "warmup_steps": 1}
    settings |= {"use_cpu": True, "disable_tqdm": True}
    return LadderArguments(output_dir=str(folder), **(settings | options))


def trainer(
    folder: Path, sweep: list[dict[str, Any]] | None = SWEEP, data: Any = ROWS, callbacks: Any = None, **options: Any
) -> LadderTrainer:
    group_tokens = options.pop("group_tokens", None)
    made = LadderTrainer(
        ladder_model(),
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data[:5],
        callbacks=callbacks,
        sweep=sweep,
    )
    made.group_tokens = group_tokens
    return made


def alone(folder: Path, number: int, **options: Any) -> LadderTrainer:
    """A member of the sweep as somebody would train it without one."""
    settings = {key: value for key, value in SWEEP[number].items() if key != "name"}
    config = {key: settings.pop(key) for key in ("seed", "reduction_factor") if key in settings}
    model = ladder_model(settings.pop("preset", "ladder"), **config)
    data, group_tokens = options.pop("data", ROWS), options.pop("group_tokens", None)
    callbacks = options.pop("callbacks", None)
    args = arguments(folder, **(options | settings))
    made = LadderTrainer(model, args, train_dataset=data, eval_dataset=data[:5], callbacks=callbacks)
    made.group_tokens = group_tokens
    return made


def assert_same_bits(member: LadderTrainer, by_itself: LadderTrainer, resumed: bool = False) -> None:
    """Weights, optimizer, schedule and everything that was logged but times, and the mean that a resume starts anew."""
    ours, theirs = member.model.state_dict(), by_itself.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    states = [made.optimizer.state_dict()["state"] for made in (member, by_itself)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[1].items():
        assert all(torch.equal(torch.as_tensor(states[0][index][key]), torch.as_tensor(state[key])) for key in state)
    assert member.lr_scheduler.state_dict() == by_itself.lr_scheduler.state_dict()
    lines = [logged(made) for made in (member, by_itself)]
    if resumed:
        lines = [[line for line in of_one if "train_loss" not in line] for of_one in lines]
    assert lines[0] == lines[1]


def logged(made: LadderTrainer) -> list[dict[str, Any]]:
    lines = made.state.log_history
    return [
        {k: v for k, v in line.items() if k not in TIMES and "runtime" not in k and "per_second" not in k}
        for line in lines
    ]


class StopAt(TrainerCallback):
    """Stops the member with one learning rate after a step; or sends a signal there."""

    def __init__(self, step: int, learning_rate: float, number: signal.Signals | None = None) -> None:
        self.step, self.learning_rate, self.number = step, learning_rate, number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.learning_rate == self.learning_rate:
            if self.number is None:
                control.should_training_stop = True
            else:
                os.kill(os.getpid(), self.number)


class Raises(TrainerCallback):
    """In the second member."""

    def __init__(self, error: BaseException, step: int) -> None:
        self.error, self.step = error, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith(NAMES[1]) and state.global_step == self.step:
            raise self.error
