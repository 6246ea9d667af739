"""Checkpoints of real trainings: killed while saving, damaged, incomplete, on a full disk; then resumed to the bit."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from transformers import TrainerCallback

from engine import LadderArguments, LadderConfig, LadderForCausalLM, LadderTrainer, load_backbone
from engine.checkpoints import state as training_state
from engine.checkpoints import store
from engine.checkpoints.store import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [{"prompt": f"{i} plus {j} is ", "completion": str(i + j) * (1 + i)} for i in range(6) for j in range(4)]
PARTS = {"optimizer.json", "optimizer.safetensors", "scheduler.json", "random-0.json", "trainer_state.json"}
STEPS = 5  # of three an epoch


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2")


@pytest.fixture(scope="module")
def make(backbone_folder: Path) -> Callable[..., LadderTrainer]:
    def trainer(folder: Path, data: Any = PAIRS, callbacks: Any = None, **options: Any) -> LadderTrainer:
        settings = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_length": 64,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": None,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        } | options
        model = LadderForCausalLM.from_backbone(
            load_backbone(backbone_folder, dtype=torch.float32), LadderConfig.preset("xladder", reduction_factor=2)
        )
        heldout = settings.pop("eval_dataset", None)
        arguments = LadderArguments(output_dir=str(folder), **settings)
        return LadderTrainer(model, arguments, train_dataset=data, eval_dataset=heldout, callbacks=callbacks)

    return trainer


@pytest.fixture(scope="module")
def whole(make: Callable[..., LadderTrainer], tmp_path_factory: pytest.TempPathFactory) -> LadderTrainer:
    """A training that was never disturbed, with a checkpoint of every step."""
    trainer = make(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def assert_same_end(resumed: LadderTrainer, whole: LadderTrainer) -> None:
    """Weights, moments and schedule, to the bit."""
    for (name, weight), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    ours, theirs = (trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole))
    for index, state in theirs.items():
        for name, value in state.items():
            assert torch.equal(ours[index][name], value), f"{name} of {index}"
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (resumed, whole)]
    assert losses[0] == losses[1]


def copy(whole: LadderTrainer, folder: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(Path(whole.args.output_dir) / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def test_a_checkpoint_has_every_part_and_no_pickle(whole: LadderTrainer) -> None:
    for step in range(1, STEPS + 1):
        manifest = store.verify(Path(whole.args.output_dir) / f"checkpoint-{step}")
        assert manifest.step == step and set(manifest.files) >= PARTS | {"ladder.safetensors", "ladder_config.json"}
        assert all(Path(name).suffix not in (".pt", ".pth", ".bin", ".pkl") for name in manifest.files)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_every_step_resumes_to_the_bit(
    make: Callable[..., LadderTrainer], whole: LadderTrainer, tmp_path: Path, step: int
) -> None:
    """In the middle of an epoch, at its end (3) and behind it."""
    torch.manual_seed(step)  # what a new process would have drawn by then
    resumed = make(copy(whole, tmp_path, step))
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, whole)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_resumed_at_its_end(make: Callable[..., LadderTrainer], whole: LadderTrainer, tmp_path: Path) -> None:
    """Nothing is left to do; the stock Trainer would take one step more."""
    resumed = make(copy(whole, tmp_path, STEPS))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_same_end(resumed, whole)


def test_resumed_twice(make: Callable[..., LadderTrainer], whole: LadderTrainer, tmp_path: Path) -> None:
    copy(whole, tmp_path, 1)
    make(tmp_path, callbacks=[StopAt(3)]).train(resume_from_checkpoint=True)
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_end(resumed, whole)


def test_packed_rows_resume(make: Callable[..., LadderTrainer], tmp_path: Path) -> None:
    options = {"packing": True, "per_device_train_batch_size": 1}
    first = make(tmp_path / "whole", **options)
    first.train()
    resumed = make(copy(first, tmp_path / "parts", 2), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, first)


class KilledError(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def test_killed_while_saving(whole: LadderTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every change on the disk, with the newest file cut in half: step 4 in full, or step 5 in full."""
    expected = store.read_manifest(Path(whole.args.output_dir) / f"checkpoint-{STEPS}").files.keys()
    at, done = 0, False
    while not done:
        at += 1
        folder = copy(whole, tmp_path / str(at), STEPS - 1)
        count = 0

        def counted(call: Callable[..., Any], folder: Path = folder, at: int = at) -> Callable[..., Any]:
            def event(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == at:
                    for path in [path for path in folder.glob(".staging-*/*") if path.is_file()][-1:]:
                        os.truncate(path, path.stat().st_size // 2)
                    raise KilledError
                return call(*arguments, **options)

            return event

        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "rename"),
                (os, "replace"),
                (store, "_sync"),
                (Path, "write_text"),
                (training_state, "save_file"),
            ):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            patch.setattr(whole.args, "output_dir", str(folder))
            try:
                whole._save_checkpoint(whole.model, None)
                done = True
            except KilledError:
                pass
        store.sweep(folder)
        found = store.newest_valid(folder)
        assert found.name in ((f"checkpoint-{STEPS}",) if done else (f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"))
        assert store.verify(found).files.keys() == expected
        assert not list(folder.glob(".*"))
    assert at > 20


def test_the_newest_whole_one_is_resumed(
    make: Callable[..., LadderTrainer], whole: LadderTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy(whole, tmp_path, 2, 3, 4)
    weights = tmp_path / "checkpoint-4" / "ladder.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1  # safetensors itself would load this
    weights.write_bytes(content)
    (tmp_path / "checkpoint-3" / "optimizer.safetensors").unlink()
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4/ladder.safetensors: its sha256 is" in caplog.text
    assert "checkpoint-3/optimizer.safetensors: is missing" in caplog.text
    assert_same_end(resumed, whole)
    with pytest.raises(CheckpointError, match=r"checkpoint-3/optimizer\.safetensors: is missing"):
        make(copy(whole, tmp_path / "other", 2)).train(resume_from_checkpoint=str(broken(whole, tmp_path / "one")))


def broken(whole: LadderTrainer, folder: Path) -> Path:
    copy(whole, folder, 3)
    (folder / "checkpoint-3" / "optimizer.safetensors").unlink()
    return folder / "checkpoint-3"


def test_nothing_starts_over_silently(make: Callable[..., LadderTrainer], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no valid checkpoint to resume from: it holds none"):
        make(tmp_path).train(resume_from_checkpoint=True)
    model_only = make(tmp_path, save_only_model=True, callbacks=[StopAt(1)])
    model_only.train()
    with pytest.raises(CheckpointError, match=r"optimizer\.json: is missing, and training would silently go on"):
        make(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 2 and is 1"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4 and is 2"),
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"data": PAIRS[::-1]}, "data was '"),
        ({"learning_rate": 1e-9}, r"learning_rate was 0\.003 and is 1e-09"),
        ({"max_steps": 50}, "max_steps was 5 and is 50"),
        ({"warmup_steps": 5}, r"warmup_steps was 0\.03 and is 5"),
        ({"adam_beta1": 0.5}, r"adam_beta1 was 0\.9 and is 0\.5"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs was "),
        ({"optim": "adamw_torch_8bit"}, "optim was 'adamw_torch_fused' and is"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy was 'random' and is 'sequential'"),
        ({"taps": "none"}, "taps was 'exact' and is 'none'"),
        ({"taps": "int8"}, "taps was 'exact' and is 'int8'"),
    ],
)
def test_another_training_is_not_resumed(
    make: Callable[..., LadderTrainer], whole: LadderTrainer, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    copy(whole, tmp_path, 2)
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, **options).train(resume_from_checkpoint=True)
    if "seed" in options:
        make(tmp_path, ignore_data_skip=True, **options).train(resume_from_checkpoint=True)


class Samples(torch.utils.data.Dataset):
    """Tokens of which the trainer sees only what it is given."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = list(range(index + 1, index + 9))
        return {"input_ids": torch.tensor([self.first, *ids]), "labels": [5, *ids]}


def test_data_that_were_not_tokenized_here_are_compared_by_samples(
    make: Callable[..., LadderTrainer], tmp_path: Path
) -> None:
    make(tmp_path, Samples(1), callbacks=[StopAt(1)]).train()
    with pytest.raises(CheckpointError, match=r"data was '16:.* and is '16:"):
        make(tmp_path, Samples(2)).train(resume_from_checkpoint=True)
    assert make(tmp_path, Samples(1), max_steps=STEPS).train(resume_from_checkpoint=True).global_step == STEPS


@pytest.fixture
def free(make: Callable[..., LadderTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free, and what is needed with either policy."""
    trainer, given = make(tmp_path / "unused"), {"now": 1 << 40}
    monkeypatch.setattr("engine.training.preflight.free_bytes", lambda device: given["now"])
    for policy in ("device", "int8"):
        trainer._fit_memory(policy)
        planner, work, chosen = trainer._fitted
        plan = planner.plan(replace(work, group=1), chosen.policies)
        given[policy] = plan.peak_bytes - plan.loaded_bytes
    assert given["int8"] < given["device"]
    return given


def test_resuming_keeps_the_taps_that_were_chosen(
    make: Callable[..., LadderTrainer], tmp_path: Path, free: dict[str, int]
) -> None:
    """Chosen when little memory was free: with more of it "auto" would choose other bits."""
    expected = make(tmp_path / "whole", taps="int8")
    expected.train()
    free["now"] = free["int8"]
    first = make(tmp_path, callbacks=[StopAt(2)])
    first.train()
    assert first.model.side_network.tap_policy == "int8"
    free["now"] = 1 << 40
    with pytest.raises(CheckpointError, match="taps was 'int8' and is 'exact'"):
        make(tmp_path, taps="device").train(resume_from_checkpoint=True)
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.side_network.tap_policy == "int8"
    assert_same_end(resumed, expected)


def test_taps_that_fit_no_more_go_on_leaner_with_a_warning(
    make: Callable[..., LadderTrainer],
    whole: LadderTrainer,
    tmp_path: Path,
    free: dict[str, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    free["now"] = free["int8"]
    resumed = make(copy(whole, tmp_path, 2))
    resumed.train(resume_from_checkpoint=True)
    assert "taps were exact when" in caplog.text and "and go on int8: training would need" in caplog.text
    assert (resumed.state.global_step, resumed.model.side_network.tap_policy) == (STEPS, "int8")
    assert store.read_manifest(tmp_path / f"checkpoint-{STEPS}").settings["taps"] == "int8"


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
@pytest.mark.parametrize("limit", [9_000, 100_000, 250_000], ids=["random", "weights", "optimizer"])
def test_a_full_disk_costs_a_warning(
    make: Callable[..., LadderTrainer],
    whole: LadderTrainer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    limit: int,
) -> None:
    """Writes fail in whichever file is larger; training ends with the same weights and the checkpoint from before."""

    class Full(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make(tmp_path, callbacks=[Full()])
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "checkpoint of step 2 could not be written" in caplog.text and "training goes on" in caplog.text
    assert [step for step, _ in store.checkpoints(tmp_path)] == [1, 4, 5]
    assert not list(tmp_path.glob(".*"))
    assert_same_end(trainer, whole)


def test_rotation_keeps_the_best(make: Callable[..., LadderTrainer], tmp_path: Path) -> None:
    best = make(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=2,
        greater_is_better=True,  # the first step is the best one
        metric_for_best_model="loss",
        eval_dataset=PAIRS[:5],
    )
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert [step for step, _ in store.checkpoints(tmp_path)] == [1, STEPS]


def test_the_last_one_stays_beside_the_best_also_with_a_limit_of_one(
    make: Callable[..., LadderTrainer], tmp_path: Path
) -> None:
    """The stock Trainer would delete it at the end, and everything else that is named like a checkpoint."""
    (tmp_path / "checkpoint-77").mkdir()
    best = make(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
        greater_is_better=True,
        metric_for_best_model="loss",
        eval_dataset=PAIRS[:5],
    )
    best.train()
    assert [step for step, _ in store.checkpoints(tmp_path)] == [1, STEPS, 77]


def test_a_damaged_one_on_top_does_not_outlive_the_good_ones(
    make: Callable[..., LadderTrainer], whole: LadderTrainer, tmp_path: Path
) -> None:
    copy(whole, tmp_path, 3, STEPS)
    (tmp_path / f"checkpoint-{STEPS}" / "optimizer.json").write_text("{}")
    make(tmp_path, callbacks=[StopAt(4)], save_total_limit=1).train(resume_from_checkpoint=True)
    assert store.newest_valid(tmp_path).name == "checkpoint-4"
