"""What people know from `transformers.Trainer` works the same: schedules, clipping, stopping, callbacks, logs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_model
from ladders import checkpoint_folder, ladder_model, tiny_backbone
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from engine import LadderArguments, LadderTrainer, load_backbone
from engine.data.collator import Collator
from engine.data.dataset import prepare_dataset
from engine.memory.cards import CARDS, pass_flops

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [{"prompt": f"{i} plus {j} is ", "completion": str(i + j)} for i in range(4) for j in range(4)]
STEPS, WARMUP, DECAY, PEAK = 6, 2, 2, 1e-2
LOOP = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def arguments(folder: Path, **overrides: Any) -> LadderArguments:
    return LadderArguments(output_dir=str(folder), **(LOOP | {"max_length": 64, "max_steps": STEPS} | overrides))


def train(folder: Path, callbacks: list[TrainerCallback] | None = None, **overrides: Any) -> LadderTrainer:
    trainer = LadderTrainer(
        ladder_model(), arguments(folder, **overrides), None, PAIRS, PAIRS[:2], callbacks=callbacks or []
    )
    trainer.train()
    return trainer


def logged(trainer: LadderTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if "loss" in line]


def _after_warmup(step: int) -> float:
    """Share of the steps after the warm-up that lie behind."""
    return (step - WARMUP) / (STEPS - WARMUP)


SCHEDULES = {
    "constant": lambda step: 1.0,
    "linear": lambda step: 1 - _after_warmup(step),
    "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * _after_warmup(step))),
    "constant_with_warmup": lambda step: 1.0,
    "warmup_stable_decay": lambda step: 0.5 * (1 + math.cos(math.pi * max(step - (STEPS - DECAY), 0) / DECAY)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_and_warmup(schedule: str, tmp_path: Path) -> None:
    """The rate of every step is the formula's, and a step of SGD moves the weights by just that."""

    class Moves(TrainerCallback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            self.before = model.side_network.side_up.detach().clone()

        def on_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            weight = model.side_network.side_up
            self.rates.append(((self.before - weight).norm() / weight.grad.norm()).item())

    moves = Moves()
    trainer = train(
        tmp_path,
        [moves],
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs={"num_decay_steps": DECAY} if schedule == "warmup_stable_decay" else {},
        warmup_steps=WARMUP,
        learning_rate=PEAK,
        optim="sgd",
    )
    factor = SCHEDULES[schedule]
    warm = 0 if schedule == "constant" else WARMUP
    expected = [PEAK * (step / WARMUP if step < warm else factor(step)) for step in range(STEPS)]
    assert logged(trainer, "learning_rate") == pytest.approx(expected, rel=1e-9)
    assert moves.rates == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_reduce_on_plateau(tmp_path: Path) -> None:
    """Nothing counts as better by 10 nats, so that the rate falls after every evaluation beyond the first."""
    trainer = train(
        tmp_path,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"factor": 0.5, "patience": 0, "threshold": 10.0, "threshold_mode": "abs"},
        warmup_steps=0,
        learning_rate=PEAK,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
    )
    assert logged(trainer, "learning_rate") == pytest.approx([PEAK, *(PEAK * 0.5**n for n in range(STEPS - 1))])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_clipping(accumulation: int, tmp_path: Path) -> None:
    """The logged norm is that of all gradients of the step before clipping, and the step is cut to the limit."""
    model, limit = ladder_model(), 0.01
    data = prepare_dataset(PAIRS[:4], model.backbone.tokenizer(), max_length=64, vocab_size=288)
    model(**Collator()([data[i] for i in range(4)])).loss.backward()
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt().item()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    args = arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=1.0,
        warmup_steps=0,
        max_grad_norm=limit,
    )
    trainer = LadderTrainer(model, args, train_dataset=data)
    trainer.train()
    assert norm > 10 * limit
    assert logged(trainer, "grad_norm") == pytest.approx([norm], rel=1e-5)
    for name, p in model.named_parameters():
        moved = before[name] - p.detach()
        torch.testing.assert_close(moved, gradients[name] * (limit / norm), rtol=1e-2, atol=1e-6, msg=name)


def test_early_stopping_ends_with_the_best_model(tmp_path: Path) -> None:
    """At a rate at which the held-out loss only rises, the first checkpoint is the best and two more end it."""
    trainer = train(
        tmp_path,
        [EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        lr_scheduler_type="constant",
        learning_rate=1.0,
        max_grad_norm=0.0,
    )
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    best = losses.index(min(losses))
    assert trainer.state.global_step == len(losses) == best + 3 < STEPS
    assert trainer.state.best_metric == losses[best]
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best + 1}"
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "ladder.safetensors")
    weights = trainer.model.side_network.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))


class Events(TrainerCallback):
    """Writes down every event, of all callbacks that share a list."""

    def __init__(self, name: str, events: list[tuple[str, str]]) -> None:
        for event in EVENTS:
            setattr(self, event, partial(self._note, events, (name, event)))

    @staticmethod
    def _note(events: list[tuple[str, str]], entry: tuple[str, str], *args: Any, **kwargs: Any) -> None:
        events.append(entry)


def test_callbacks_are_called_as_the_stock_trainer_calls_them(tmp_path: Path) -> None:
    """Two callbacks, in their order, at every event of a training with accumulation, evaluation and checkpoints."""
    loop = LOOP | {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    ids = torch.arange(3, 11)
    samples = [{"input_ids": ids, "labels": ids} for _ in range(8)]
    stock_events, events = [], []

    def pair(kept: list[tuple[str, str]]) -> list[TrainerCallback]:
        return [Events("first", kept), Events("second", kept)]

    stock_args = TrainingArguments(output_dir=str(tmp_path / "stock"), **loop)
    stock = Trainer(
        tiny_model("llama2"), stock_args, default_data_collator, samples, samples[:2], callbacks=pair(stock_events)
    )
    stock.train()

    class Samples(torch.utils.data.Dataset):
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return samples[index]

    ours = LadderTrainer(
        ladder_model(),
        LadderArguments(output_dir=str(tmp_path / "ours"), **loop),
        None,
        Samples(8),
        Samples(2),
        callbacks=pair(events),
    )
    ours.train()
    assert events == stock_events
    assert ("first", "on_substep_end") in events and ("second", "on_save") in events
    assert [name for name, _ in events] == ["first", "second"] * (len(events) // 2)


def test_control_from_a_callback_is_obeyed(tmp_path: Path) -> None:
    class Orders(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_evaluate = control.should_log = state.global_step == 2
            control.should_training_stop = state.global_step == 4

    trainer = train(tmp_path, [Orders()], logging_strategy="no")
    assert trainer.state.global_step == 4
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [2]
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [2]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_evaluation_never_builds_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("logits were built")

    monkeypatch.setattr(type(tiny_backbone()), "logits", refuse)
    trainer = train(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    assert math.isfinite(trainer.evaluate()["eval_loss"]) and math.isfinite(trainer.predict(PAIRS).metrics["test_loss"])
    with pytest.raises(AssertionError, match="logits were built"):
        trainer.model(input_ids=torch.arange(4)[None])


def test_gates_reach_the_log(tmp_path: Path) -> None:
    """As sigmoid(gate_logit / T): all one half at the start, and moved by training."""
    trainer = train(tmp_path, warmup_steps=0, learning_rate=PEAK, lr_scheduler_type="constant")
    network = trainer.model.side_network
    expected = [torch.sigmoid(tap.gate_logit / 0.1).item() for tap in network.taps if tap.gate_logit is not None]
    assert len(expected) > 1 and min(expected) < max(expected)
    assert logged(trainer, "gate_min")[-1] == pytest.approx(min(expected))
    assert logged(trainer, "gate_max")[-1] == pytest.approx(max(expected))
    assert logged(trainer, "gate_mean")[-1] == pytest.approx(sum(expected) / len(expected))
    assert abs(logged(trainer, "gate_mean")[0] - 0.5) < 0.05

    def without_gates(folder: Path) -> LadderTrainer:
        return LadderTrainer(ladder_model("ladder", merge="sum"), arguments(folder, max_steps=1), train_dataset=PAIRS)

    ungated = without_gates(tmp_path / "sum")
    ungated.train()
    assert not [name for line in ungated.state.log_history for name in line if name.startswith("gate")]


@pytest.mark.parametrize("foreign", [False, True])
def test_mfu_is_the_arithmetic_of_the_steps_over_that_of_the_card(
    foreign: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of batches of one shape, mfu over tokens per second is the arithmetic of a token over the card's."""
    card = replace(CARDS[0], flops=1e8)
    monkeypatch.setattr("engine.training.trainer.card_of", lambda device: card)
    backbone = load_backbone(checkpoint_folder(), dtype=torch.bfloat16)
    args = arguments(tmp_path, max_steps=2)
    data = [{"text": "a" * 19} for _ in range(8)]
    trainer = LadderTrainer(ladder_model(backbone=backbone), args, Padded() if foreign else None, train_dataset=data)
    trainer.train()
    lengths = [20] * 4
    supervised = 80 if foreign else 128  # the collator fills 4 x 19 rows up to a multiple of 64
    config = trainer.model.ladder_config
    per_token = pass_flops(trainer.model.backbone.config, config, lengths, supervised) / 80
    for mfu, speed in zip(logged(trainer, "mfu"), logged(trainer, "tokens_per_second"), strict=True):
        assert mfu == pytest.approx(speed * per_token / card.flops, rel=1e-2, abs=1e-4)
    slow = LadderTrainer(ladder_model(), args, train_dataset=data)
    assert slow.clock.card_flops is None, "data sheets give 16-bit arithmetic, and this backbone computes in fp32"


class Padded:
    """A collator of transformers' kind."""

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, report_to=["tensorboard"])
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert files
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    names = ["loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_mib", "gate_mean", "gate_max"]
    for name in [*(f"train/{name}" for name in names), "eval/loss"]:
        assert [event.step for event in events.Scalars(name)] == [1, 2], name


def test_other_integrations_get_the_same_log(tmp_path: Path) -> None:
    """Whatever `report_to` names is a callback with `on_log`: it sees what metrics.jsonl gets."""
    seen: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            seen.append({**logs, "step": state.global_step})

    train(tmp_path, [Reporter()], max_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "loss" in line] == [line for line in seen if "loss" in line]
