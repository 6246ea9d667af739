"""What training chooses by itself beside a budget: taps, groups of micro-batches, and which layers are streamed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from ladders import ladder_model
from test_memory_plan import CONFIG, SEVEN_B, THIRTY_TWO_B

from engine import LadderArguments, LadderTrainer
from engine.backbone import load_backbone
from engine.memory.planner import Planner
from engine.memory.workload import GB, MemoryPolicies, Workload
from engine.training.preflight import (
    GROUP_SHARE,
    TAPS,
    MemoryPlanError,
    fit_training,
    place_backbone,
    policies_of,
    read_shape,
    tap_policies,
)

PLANNER = Planner(SEVEN_B, CONFIG)
WORK = Workload(2048, accumulation=8)


def test_taps_go_where_they_first_fit() -> None:
    needed = {}
    for taps in TAPS:
        plan = PLANNER.plan(WORK, MemoryPolicies(taps=taps))
        needed[taps] = plan.peak_bytes - plan.loaded_bytes
    assert needed["device"] > needed["int8"] > needed["host"]
    for taps, free in needed.items():
        plan, group = fit_training(PLANNER, WORK, MemoryPolicies(), "auto", free)
        assert (plan.policies.taps, group) == (taps, 1)
        plan, _ = fit_training(PLANNER, WORK, MemoryPolicies(), "auto", free - 1)
        assert plan.policies.taps != taps or taps == "host"
    assert fit_training(PLANNER, WORK, MemoryPolicies(), "auto", 0)[0].policies.taps == "host"
    assert fit_training(PLANNER, WORK, MemoryPolicies(), "device", 0)[0].policies.taps == "device"
    assert fit_training(PLANNER, WORK, MemoryPolicies(), "auto", None) == (PLANNER.plan(WORK, MemoryPolicies()), 1)


def test_groups_leave_a_share_of_the_memory_alone() -> None:
    groups = [fit_training(PLANNER, WORK, MemoryPolicies(), "device", n * GB)[1] for n in (1, 3, 4, 100)]
    assert groups == sorted(groups) and groups[0] < groups[2] and groups[-1] == WORK.accumulation
    together = PLANNER.plan(dataclasses.replace(WORK, group=groups[2]), MemoryPolicies())
    assert together.peak_bytes - together.loaded_bytes <= GROUP_SHARE * 4 * GB


def test_groups_with_taps_on_the_host_fit_there(monkeypatch: pytest.MonkeyPatch) -> None:
    one = PLANNER.plan(WORK, MemoryPolicies(taps="host")).host["taps"]
    monkeypatch.setattr("engine.training.preflight.available_bytes", lambda: int(3.5 * one / GROUP_SHARE))
    assert fit_training(PLANNER, WORK, MemoryPolicies(), "host", 100 * GB)[1] == 3


def test_host_memory_is_no_choice_of_a_cpu() -> None:
    assert tap_policies(Workload(64, device_type="cpu"), "auto") == ("device", "int8")
    taken = [
        PLANNER.plan(Workload(2048, device_type="cpu"), MemoryPolicies(taps=taps)).phase_bytes("loss")
        for taps in ("device", "host")
    ]
    assert taken[1] >= taken[0]


def test_a_budget_says_where_layers_go() -> None:
    assert place_backbone(PLANNER, WORK, "24GB")[1] == {}
    plan, options = place_backbone(Planner(THIRTY_TWO_B, CONFIG), WORK, "12GB")
    assert plan.policies.residency == "host" and plan.peak_bytes <= 11 * GB
    assert options["residency"] == "auto" and 0 < options["layer_budget"] < 11 * GB
    with pytest.raises(MemoryPlanError, match=r"memory_budget 1GB: of it 0\.92 GB can be used.*\n.*: \d+\.\d\d GB"):
        place_backbone(PLANNER, WORK, "1GB")


def test_a_budget_is_met_with_the_head_and_the_optimizer_as_they_are() -> None:
    settled = MemoryPolicies(head_dtype="nf4", optimizer="adamw_8bit")
    plan, _ = place_backbone(PLANNER, WORK, "6GB", settled=settled)
    assert (plan.policies.head_dtype, plan.policies.optimizer) == ("nf4", "adamw_8bit")
    dense, _ = place_backbone(PLANNER, WORK, "6GB")
    assert (dense.policies.head_dtype, dense.policies.optimizer) == ("dense", "adamw")
    assert plan.policies.resident_layers > dense.policies.resident_layers or plan.policies.residency == "device"


def test_training_is_planned_for_the_longest_sample(tmp_path: Path) -> None:
    model = ladder_model()
    args = LadderArguments(output_dir=str(tmp_path), use_cpu=True, max_length=1024, per_device_eval_batch_size=2)
    rows = [{"input_ids": list(range(1, n)), "labels": list(range(1, n))} for n in (9, 31, 14)]
    trainer = LadderTrainer(model, args, train_dataset=rows[:1], eval_dataset={"a": rows[1:], "b": rows[:1]})
    trainer._fit_memory()
    _, work, _ = trainer._fitted
    assert (work.tokens, work.eval_batch) == (30, 2)
    trainer = LadderTrainer(model, args, train_dataset=Raw())
    trainer._fit_memory()
    _, work, _ = trainer._fitted
    assert (work.tokens, work.eval_batch) == (1024, 0)


class Raw(torch.utils.data.Dataset):
    """Samples of which nobody knows the lengths."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}


@pytest.mark.parametrize("layers", [0, 1])
def test_the_loader_keeps_as_many_layers_as_were_planned(tmp_path: Path, layers: int) -> None:
    folder = tiny_checkpoint(tmp_path, "llama2")
    planner = Planner(read_shape(folder), CONFIG)
    work = Workload(64)
    leanest = MemoryPolicies("host", resident_layers=layers, taps="host")
    budget = str(-(-planner.plan(work, leanest).peak_bytes * 12 // 11) + 12)
    plan, options = place_backbone(planner, work, budget, "host")
    assert plan.policies.resident_layers == layers
    backbone = load_backbone(folder, **options)
    assert policies_of(backbone).resident_layers == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": "disk"}, "taps must be one of device, int8, host, none"),
        ({"memory_budget": "much"}, "such as 12GB"),
        ({"optim": "adamw_torch_8bit"}, r"needs torchao: pip install 'ladder-engine\[adamw8bit\]'"),
    ],
)
def test_wrong_arguments_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.setattr("engine.training.arguments.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        LadderArguments(output_dir=str(tmp_path), use_cpu=True, **options)  # type: ignore[arg-type]


def test_a_budget_reaches_the_loader(tmp_path: Path) -> None:
    args = LadderArguments(output_dir=str(tmp_path / "out"), use_cpu=True, memory_budget="1KB")
    with pytest.raises(MemoryPlanError, match="memory_budget 1KB"):
        LadderTrainer(str(tiny_checkpoint(tmp_path, "llama2")), args)
