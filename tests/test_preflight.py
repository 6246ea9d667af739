"""What training chooses by itself beside a budget: taps, groups of micro-batches, and which layers are streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from test_memory_plan import CONFIG, SEVEN_B, THIRTY_TWO_B

from engine import LadderArguments, LadderTrainer
from engine.memory import GB, MemoryPolicies, Workload
from engine.planner import Planner
from engine.preflight import TAPS, MemoryPlanError, fit_training, place_backbone

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
    assert fit_training(PLANNER, WORK, MemoryPolicies(), "auto", 0)[0].policies.taps == "host"
    assert fit_training(PLANNER, WORK, MemoryPolicies(), "device", 0)[0].policies.taps == "device"
    assert fit_training(PLANNER, WORK, MemoryPolicies(), "auto", None) == (PLANNER.plan(WORK, MemoryPolicies()), 1)


def test_groups_are_as_large_as_the_memory() -> None:
    groups = [fit_training(PLANNER, WORK, MemoryPolicies(), "device", n * GB)[1] for n in (1, 2, 3, 100)]
    assert groups == sorted(groups) and groups[0] < groups[2] and groups[-1] == WORK.accumulation


def test_a_budget_says_where_layers_go() -> None:
    assert place_backbone(PLANNER, WORK, "24GB")[1] == {}
    plan, options = place_backbone(Planner(THIRTY_TWO_B, CONFIG), WORK, "12GB")
    assert plan.policies.residency == "host" and plan.peak_bytes <= 11 * GB
    assert options["residency"] == "auto" and 0 < options["memory_budget"] < 11 * GB
    with pytest.raises(MemoryPlanError, match=r"memory_budget 1GB: of it 0\.92 GB can be used.*\n.*: \d+\.\d\d GB"):
        place_backbone(PLANNER, WORK, "1GB")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"taps": "disk"}, "taps must be one of device, int8, host, none"), ({"memory_budget": "much"}, "such as 12GB")],
)
def test_wrong_arguments_are_explained(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LadderArguments(output_dir=str(tmp_path), use_cpu=True, **options)  # type: ignore[arg-type]


def test_a_budget_reaches_the_loader(tmp_path: Path) -> None:
    args = LadderArguments(output_dir=str(tmp_path / "out"), use_cpu=True, memory_budget="1KB")
    with pytest.raises(MemoryPlanError, match="memory_budget 1KB"):
        LadderTrainer(str(tiny_checkpoint(tmp_path, "llama2")), args)
