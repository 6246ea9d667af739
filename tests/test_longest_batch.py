"""The largest step before the first one: it is the largest, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladders import ladder_model
from samples import prepared
from test_trainer import RAGGED, arguments, side_weights

from engine import LadderTrainer
from engine.model.ladder_model import LadderModel
from engine.training.longest_batch import LongestBatchFirst, _missing_moments
from engine.training.out_of_memory import TrainingMemoryError

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder: Path, **options: Any) -> LadderTrainer:
    options = {"longest_first": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | options
    return LadderTrainer(ladder_model(), arguments(folder, **options), train_dataset=RAGGED)


def outcome(training: LadderTrainer) -> dict[str, Any]:
    """All that a run leaves: weights, moments, logs without their measurements, tokens, random states."""
    weights = side_weights(training.model)
    moments = [value for state in training.optimizer.optimizer.state.values() for value in state.values()]
    measured = {"tokens_per_second", "peak_memory_mib", "train_runtime", "train_samples_per_second"}
    measured |= {"train_steps_per_second"}
    logs = [{k: v for k, v in line.items() if k not in measured} for line in training.state.log_history]
    return {
        "tensors": [*weights.values(), *moments, torch.get_rng_state()],
        "logs": logs,
        "tokens": training.clock.tokens,
    }


def draw(*_: Any) -> None:
    """A random number of every pass, as dropout would draw it."""
    torch.rand(1)


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"optim": "sgd"}], ids=["samples", "packed", "sgd"])
def test_training_gives_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    outcomes = []
    for longest_first in (False, True):
        torch.manual_seed(3)
        training = trainer(tmp_path, longest_first=longest_first, **options)
        training.model.register_forward_pre_hook(draw)
        training.train()
        outcomes.append(outcome(training))
    without, tried = outcomes
    assert all(torch.equal(a, b) for a, b in zip(without.pop("tensors"), tried.pop("tensors"), strict=True))
    assert without == tried


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = side_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in side_weights(resumed.model).items())


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 3))
def test_no_step_can_be_larger(lengths: list[int], size: int, passes: int) -> None:
    """Against every other choice: the micro-batches are the longest samples, the longest together."""
    tried: list[list[int]] = []

    class Recorded:
        train_dataset = prepared([{"input_ids": list(range(1, length + 2))} for length in lengths])
        args = arguments(Path("unused"), per_device_train_batch_size=size, gradient_accumulation_steps=passes)
        _train_batch_size = size
        data_collator = staticmethod(lambda samples: [len(sample["input_ids"]) for sample in samples])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.training.longest_batch.try_batches", lambda _, batches: tried.extend(batches))
        LongestBatchFirst(Recorded()).on_train_begin()  # type: ignore[arg-type]
    chosen = [length for batch in tried for length in batch]
    assert chosen == sorted((length + 1 for length in lengths), reverse=True)[: size * passes]
    assert [len(batch) for batch in tried[:-1]] == [size] * (len(tried) - 1) and len(tried) <= passes


def test_memory_runs_out_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the longest batch, with the weights untouched; the run can go on in smaller batches."""
    one_pass = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    training = trainer(tmp_path, **one_pass)
    before, run, seen = side_weights(training.model), LadderModel.run, []

    def limited(self: LadderModel, rows: Any, *rest: Any) -> Any:
        seen.append(len(rows.input_ids))
        if len(rows.input_ids) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, rows, *rest)

    monkeypatch.setattr(LadderModel, "run", limited)
    with pytest.raises(TrainingMemoryError):
        training.train()
    longest = sorted(training.train_dataset.lengths.tolist(), reverse=True)
    assert seen == [sum(longest[:4])] and training.state.global_step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in side_weights(training.model).items())
    assert all(parameter.grad is None for parameter in training.model.parameters())
    seen.clear()
    found = trainer(tmp_path, **one_pass, auto_find_batch_size=True)
    found.train()
    assert found._train_batch_size == 2 and found.state.global_step == 4
    assert seen[:3] == [sum(longest[:size]) for size in (4, 3, 2)] and max(seen[3:]) <= sum(longest[:2])


def test_moments_are_held_until_there_are_some(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    training.create_optimizer()
    held = sum(moments.nbytes for moments in _missing_moments(training))
    training.train()
    states = training.optimizer.optimizer.state.values()
    assert held == sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")) > 0
    assert _missing_moments(training) == []
    sgd = trainer(tmp_path, optim="sgd")
    sgd.create_optimizer()
    assert _missing_moments(sgd) == []


def test_unknown_lengths_are_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(RAGGED)

    with pytest.raises(ValueError, match="longest_first=True needs the length of every sample"):
        LadderTrainer(ladder_model(), arguments(tmp_path, longest_first=True), train_dataset=Stream())
