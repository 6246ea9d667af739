"""`python -m benchmarks memory`: its rows, and that the shipped ones are what the plan says today."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks import memory_table
from benchmarks.memory_table import CASES, MEMORY_CSV, PEAK, RIVALS, TrackedCase
from benchmarks.shapes import model_shape
from engine.backbone.families import backbone_config
from engine.config import LadderConfig
from engine.memory.plan import plan_memory
from engine.memory.workload import Workload


def test_rows_of_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours and a rival at a toy shape: the peak is the largest phase and the sum of its parts; the CSV holds it all."""
    rows = [row for method in ("ladder", "qlora") for row in memory_table.track(TrackedCase("toy", 64, method))]
    for method in ("ladder", "qlora"):
        own = {row["phase"]: row for row in rows if row["method"] == method}
        peak = own.pop(PEAK)
        assert int(peak["bytes"]) == max(int(row["bytes"]) for row in own.values())
        assert int(peak["bytes"]) == sum(int(part.partition("=")[2]) for part in peak["parts"].split())
        assert bool(peak["planned_bytes"]) == (method == "ladder")
    memory_table.write_csv(tmp_path / "memory.csv", rows)
    memory_table.write_csv(tmp_path / "memory.csv", rows)
    with (tmp_path / "memory.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    (line,) = memory_table.ratio_lines(rows)
    peaks = {row["method"]: int(row["bytes"]) for row in rows if row["phase"] == PEAK}
    assert f"{peaks['ladder'] / peaks['qlora']:.2f} x qlora" in line


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["memory", "--cases", "GPT*"]) == memory_table.EXIT_USAGE
    assert "Qwen2.5-7B-t2048-ladder" in capsys.readouterr().err


def test_every_case_has_a_shape() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert model_shape(case.model) and (case.method in RIVALS or LadderConfig.preset(case.method))


def test_the_shipped_table_is_complete_and_planned() -> None:
    """At real shapes: every case is there, and today's plan is within 5 % of what was tracked, phase by phase."""
    with MEMORY_CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_case = {(row["model"], row["tokens"], row["method"], row["phase"]): int(row["bytes"]) for row in rows}
    for case in CASES:
        key = (case.model, str(case.tokens), case.label)
        assert (*key, PEAK) in by_case, f"{case.name} is missing: run python -m benchmarks memory"
        if case.method in RIVALS:
            continue
        config = LadderConfig.preset(case.method, reduction_factor=case.reduction_factor)
        plan = plan_memory(
            backbone_config(model_shape(case.model).config()), config, Workload(case.tokens), case.policies
        )
        # Copies on their way exist beside the computation on a GPU only.
        in_flight = plan.phases["loss"]["taps"] if case.policies.taps == "host" else 0
        assert plan.peak_bytes - in_flight == pytest.approx(by_case[*key, PEAK], rel=0.05), case.name
        for phase in plan.phases.keys() - {"load"}:
            planned = plan.phase_bytes(phase) - (in_flight if "taps" in plan.phases[phase] else 0)
            assert planned == pytest.approx(by_case[*key, phase], rel=0.05), (case.name, phase)
