"""Rows carry their origin, ratios are what they say, figures are drawn from clean rows only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import measure, plot, results
from benchmarks.registry import TOY, Benchmark, Case, Implementation, Runnable

FACTS = {"date": "2026-01-02T03:04:05+00:00", "device": "cpu", "cpu": "test cpu", "threads": "1", "commit": "0" * 40}


def _measurement(name: str, kind: str, samples: tuple[float, ...], step_mib: float) -> measure.Measurement:
    implementation = Implementation(name, lambda case, context: Runnable(lambda: None), kind)  # type: ignore[arg-type]
    kernels = "reference" if kind == "ours" else ""
    return measure.Measurement(implementation, measure.Prepared(step_mib, 2 * step_mib, None, "", kernels), samples)


@pytest.fixture
def result() -> measure.CaseResult:
    """Ours takes 2 ms and 10 MiB; the rivals 6 ms and 40 MiB, 4 ms and 80 MiB, the bound 1 ms and nothing."""
    measurements = (
        _measurement("ours", "ours", (1.0, 2.0, 3.0), 10.0),
        _measurement("slow", "baseline", (6.0, 5.0, 9.0), 40.0),
        _measurement("fat", "baseline", (4.0, 4.0, 4.0), 80.0),
        _measurement("bound", "bound", (1.0, 1.0, 1.0), 0.0),
    )
    case = Case("case", {"m": 2, "n": 3}, torch.float32, flops=4_000_000_000, bytes_moved=6_000_000, tokens=100)
    implementations = tuple(m.implementation for m in measurements)
    benchmark = Benchmark("fake", "", (case,), replace(case, name=TOY), implementations, isolated=True)
    return measure.CaseResult(benchmark, case, measurements, foreign_percent=1.5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=20), st.floats(0, 100))
def test_percentiles_are_numpys(samples: list[float], percent: float) -> None:
    import numpy as np

    measurement = _measurement("x", "ours", tuple(samples), 1.0)
    assert measurement.percentile_ms(percent) == pytest.approx(float(np.percentile(samples, percent)), rel=1e-12)


def test_ratios(result: measure.CaseResult) -> None:
    ours, slow, fat, bound = result.measurements
    assert measure.speed_ratio(ours, slow) == 3.0
    assert measure.speed_ratio(ours, fat) == 2.0
    assert measure.speed_ratio(ours, bound) == 0.5
    assert measure.memory_ratio(ours, slow) == 0.25
    assert measure.memory_ratio(ours, bound) is None


def test_metrics_have_the_units_they_name(result: measure.CaseResult) -> None:
    values = results.metrics(result, result.measurements[0])
    assert values == {
        "p20_ms": pytest.approx(1.4),
        "p50_ms": 2.0,
        "p80_ms": pytest.approx(2.6),
        "samples": 3.0,
        "step_mib": 10.0,
        "build_and_step_mib": 20.0,
        "tokens_per_second": pytest.approx(50_000.0),
        "gb_s": pytest.approx(3.0),
        "tflop_s": pytest.approx(2.0),
    }
    assert set(values) == set(results.UNITS)


def test_csv_rows(result: measure.CaseResult) -> None:
    ours, slow, *_ = results.csv_rows(result, FACTS)
    assert tuple(ours) == results.COLUMNS
    assert ours["speed_ratios"] == "slow=3 fat=2 bound=0.5"
    assert ours["memory_ratios"] == "slow=0.25 fat=0.125"
    assert (ours["sizes"], ours["dtype"], ours["mark"], ours["samples"]) == ("m=2 n=3", "fp32", "", "3")
    assert (ours["kernels"], slow["kernels"]) == ("reference", "")
    assert slow["speed_ratios"] == "fat=0.6667 bound=0.1667"
    assert ours["commit"] == FACTS["commit"]


def test_a_mark_of_the_caller_goes_before_that_of_the_load(result: measure.CaseResult) -> None:
    assert {row["mark"] for row in results.csv_rows(result, FACTS, "dry_run")} == {"dry_run"}


def test_csv_is_appended_with_one_header(result: measure.CaseResult, tmp_path: Path) -> None:
    path = tmp_path / "new" / "fake.csv"
    rows = results.csv_rows(result, FACTS)
    results.append_csv(path, rows)
    first = path.read_bytes()
    results.append_csv(path, rows)
    assert path.read_bytes().startswith(first)
    assert results.read_csv(path) == rows + rows


def test_csv_with_another_header_is_refused_and_left_alone(result: measure.CaseResult, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("benchmark,case,time\nx,y,1\n")
    with pytest.raises(
        ValueError, match=r"other\.csv: expected the header benchmark,case,model.*got benchmark,case,time"
    ):
        results.append_csv(path, results.csv_rows(result, FACTS))
    assert path.read_text() == "benchmark,case,time\nx,y,1\n"


def test_json_rows(result: measure.CaseResult, tmp_path: Path) -> None:
    results.write_json(tmp_path / "rows.json", [result, result])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 4 * len(results.UNITS)
    for row in rows:
        assert set(row) == {"benchmark", "case", "impl", "metric", "value", "unit", "ratios", "mark"}
        assert isinstance(row["value"], float) and row["unit"] == results.UNITS[row["metric"]]
    found = {row["metric"]: row for row in rows if row["impl"] == "ours"}
    assert found["tokens_per_second"]["ratios"] == {"slow": 3.0, "fat": 2.0, "bound": 0.5}
    assert found["step_mib"]["ratios"] == {"slow": 0.25, "fat": 0.125}
    assert found["p50_ms"]["ratios"]["slow"] == pytest.approx(1 / 3)
    assert found["samples"]["ratios"] == {}


def test_table_quotes_the_fastest_and_the_leanest(result: measure.CaseResult) -> None:
    text = results.table(result)
    assert "ours [reference]" in text
    assert "ours / slow: 3.00 x the speed, 0.25 x the memory growth" in text
    assert "ours / fastest (fat), leanest (slow): 2.00 x the speed, 0.25 x the memory growth" in text


def _train_step_csv(result: measure.CaseResult, path: Path) -> None:
    for date, mark, factor in (("2026-01-01", "", 1), ("2026-01-02", "", 2), ("2026-01-03", "foreign_load", 3)):
        rows = results.csv_rows(result, FACTS | {"date": date, "torch": "2.13"})
        for row in rows:
            row |= {"mark": mark, "tokens_per_second": str(100 * factor)}
        results.append_csv(path, [row for row in rows if row["kind"] != "bound"])


def test_figures_come_from_the_newest_clean_run(result: measure.CaseResult, tmp_path: Path) -> None:
    path = tmp_path / "train_step.csv"
    _train_step_csv(result, path)
    rows = plot.latest_run(results.read_csv(path))
    assert {row["date"] for row in rows} == {"2026-01-02"} and len(rows) == 3
    assert plot.main([str(path)]) == 0
    assert (tmp_path / "train_step.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_not_drawn_from_marked_rows(
    result: measure.CaseResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train_step.csv"
    results.append_csv(path, results.csv_rows(replace(result, foreign_percent=50.0), FACTS))
    assert plot.main([str(path)]) == 2
    assert "expected at least one unmarked row, got none among 4" in capsys.readouterr().err
    assert not (tmp_path / "train_step.png").exists()
