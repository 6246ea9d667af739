"""Non-finite gradients and losses in a training: skipped, counted, recorded, stopped; and the watch for spikes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import ladder_model
from torch import Tensor
from transformers import TrainerCallback

from engine import LadderArguments, LadderTrainer
from engine.training.guards import SPIKE_PATIENCE, DivergedError, SpikeWatch

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"input_ids": list(range(start, start + 20)), "labels": list(range(start, start + 20))} for start in range(16)]


class Faulty(LadderTrainer):
    """Spoils the loss or a gradient of chosen steps."""

    def __init__(self, *args: Any, faults: dict[int, float], in_gradient: bool = False, **others: Any) -> None:
        super().__init__(*args, **others)
        self.faults, self.in_gradient = faults, in_gradient

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        fault = self.faults.get(self.state.global_step + 1)
        if fault is None:
            return loss
        if self.in_gradient:
            assert isinstance(loss, Tensor)
            loss.register_hook(lambda gradient: gradient * fault)
            return loss
        return loss * fault


class Weights(TrainerCallback):
    """Weights and learning rates after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        self.seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        self.rates.append(lr_scheduler.get_last_lr()[0])


def trainer(folder: Path, faults: dict[int, float], **options: Any) -> tuple[Faulty, Weights]:
    in_gradient = options.pop("in_gradient", False)
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    settings |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "warmup_steps": 0} | options
    weights = Weights()
    made = Faulty(
        ladder_model("ladder", reduction_factor=1).train(),
        LadderArguments(output_dir=str(folder), **settings),
        train_dataset=ROWS,
        callbacks=[weights],
        faults=faults,
        in_gradient=in_gradient,
    )
    return made, weights


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("in_gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: float, in_gradient: bool
) -> None:
    made, weights = trainer(tmp_path, {3: fault, 5: fault}, in_gradient=in_gradient)
    made.train()
    assert made.guarded_step.skipped == 2 and made.state.global_step == 6
    moved = [not equal(*pair) for pair in zip(weights.seen, weights.seen[1:], strict=False)]
    assert moved == [True, False, True, False, True]
    assert all(bool(weight.isfinite().all()) for weight in weights.seen[-1].values())
    _, undisturbed = plain_run(tmp_path / "plain")
    assert weights.rates == undisturbed.rates, "the schedule advances"
    lines = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5] and lines[0].keys() == {
        "step",
        "samples",
        "process",
        "loss",
        "gradient_norm",
    }
    assert "step 3 was skipped: its gradient is not finite" in caplog.text


def plain_run(folder: Path) -> tuple[Faulty, Weights]:
    made, weights = trainer(folder, {})
    made.train()
    assert made.guarded_step.skipped == 0 and not (folder / "skipped_steps.jsonl").exists()
    return made, weights


def test_the_record_names_the_samples(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, {2: math.nan})
    made.train_dataset = Numbered()
    made.train()
    line = json.loads((tmp_path / "skipped_steps.jsonl").read_text())
    assert [len(batch) for batch in line["samples"]] == [2, 2]
    assert len({number for batch in line["samples"] for number in batch}) == 4


class Numbered(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: torch.tensor(values) for name, values in ROWS[index].items()} | {"sample_id": 100 + index}


def test_too_many_in_a_row_stop_training_with_the_last_good_weights(tmp_path: Path) -> None:
    made, weights = trainer(tmp_path, dict.fromkeys(range(3, 99), math.nan), max_steps=20, max_skipped_steps=4)
    with pytest.raises(DivergedError, match=r"4 steps in a row .* the last at step 6 .*skipped_steps\.jsonl"):
        made.train()
    assert equal({name: p.detach() for name, p in made.model.named_parameters()}, weights.seen[1])
    assert made.state.global_step == 5


def test_single_ones_do_not_add_up(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, {2: math.nan, 4: math.nan, 6: math.nan}, max_skipped_steps=2)
    made.train()
    assert made.guarded_step.skipped == 3


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "skipped_steps.jsonl").mkdir()
    made, _ = trainer(tmp_path, {2: math.nan})
    made.train()
    assert made.guarded_step.skipped == 1 and "could not be written" in caplog.text


def test_limits_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_skipped_steps is 0; expected at least 1"):
        LadderArguments(output_dir=str(tmp_path), max_skipped_steps=0, use_cpu=True)


def reports(losses: list[float]) -> list[int]:
    watch = SpikeWatch()
    return [step for step, loss in enumerate(losses) if watch(step, loss)]


def test_spikes_are_reported_once_each() -> None:
    calm = [5 * math.exp(-step / 30) + 1 + 0.2 * math.sin(step) for step in range(120)]
    assert reports(calm) == []
    assert reports([8.0, 20.0, 3.0, 30.0, 5.0, 9.0, *calm]) == [], "no alarm while training warms up"
    assert reports(calm + [9.0] * (SPIKE_PATIENCE - 1) + calm[-20:]) == []
    last = len(calm) + SPIKE_PATIENCE - 1
    assert reports(calm + [9.0] * 50) == [last]
    assert reports(calm + [math.nan] * 50) == [last]
    assert len(reports(calm + [9.0] * 9 + calm[-20:] + [9.0] * 9)) == 2
