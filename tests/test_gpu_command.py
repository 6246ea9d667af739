"""`python -m benchmarks gpu`: parts that fail or hang cost only themselves, the summary says what rows say, no more."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import gpu, provenance, results
from benchmarks.gpu import Part
from benchmarks.gpu_summary import TARGETS, Outcome, Target, summary
from benchmarks.registry import find_benchmark

FACTS = provenance.provenance(torch.device("cpu")) | {"device": "test card", "commit": "0" * 40}
PLANNED = {"details": "planned 1000.0 MiB (loss): all layers on the device"}


def _python(name: str, code: str, seconds: float, **others: str) -> Part:
    return Part(name, (sys.executable, "-c", code), seconds, **others)


def _run(tmp_path: Path, *steps: Part) -> tuple[list[Outcome], str]:
    path = tmp_path / "run.log"
    with path.open("ab") as log:
        outcomes = gpu.run_parts(steps, log)
    return outcomes, path.read_text()


def test_a_part_that_fails_hangs_or_cannot_run_costs_only_itself(tmp_path: Path) -> None:
    outcomes, log = _run(
        tmp_path,
        _python("fails", "print('FAILED early')\nfor i in range(40): print('line', i)\nraise SystemExit(7)", 30),
        _python("absent", "raise AssertionError", 0, absent="no such tool"),
        _python("loaded", "raise SystemExit(3)", 0),
        _python("works", "print('done')", 0),
    )
    assert [(item.name, item.status) for item in outcomes] == [
        ("fails", "failed with 7"),
        ("absent", "absent"),
        ("loaded", "passed, other processes took CPU time"),
        ("works", "passed"),
    ]
    assert [item.failed for item in outcomes] == [True, False, False, False]
    lines = outcomes[0].lines.splitlines()
    assert (lines[0], lines[1], lines[-1]) == ("FAILED early", "line 25", "line 39")
    assert outcomes[1].lines == "no such tool"
    assert "line 0\n" in log and "done" in log and "AssertionError" not in log


def test_a_part_out_of_time_is_killed_with_its_children(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    start = time.monotonic()
    (hangs, works), _ = _run(
        tmp_path, _python("hangs", f"{child}print(p.pid, flush=True)\ntime.sleep(60)", 3), _python("works", "", 30)
    )
    assert (hangs.status, works.status) == ("timed out", "passed") and hangs.failed
    assert 3 <= hangs.seconds < 20 and time.monotonic() - start < 40
    pid = int(hangs.lines)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline, "the child of a killed part is still alive"
        time.sleep(0.05)


def test_time_that_one_part_saves_is_the_next_ones(tmp_path: Path) -> None:
    (_, slow), _ = _run(tmp_path, _python("fast", "", 30), _python("slow", "import time; time.sleep(0.5)", 0.1))
    assert slow.status == "passed" and slow.seconds > slow.planned_seconds


def test_the_plan_ends_in_time() -> None:
    assert sum(gpu.SECONDS.values()) <= gpu.LIMIT_SECONDS - 10
    for dry_run in (True, False):
        steps = gpu.parts(Path("rows.csv"), dry_run)
        assert [step.name for step in steps] == list(gpu.SECONDS)
        assert [step.seconds for step in steps] == list(gpu.SECONDS.values())


def _planned_cases() -> dict[str, set[str]]:
    """Case names by benchmark, of the real run, as the command line will read its own arguments."""
    planned: dict[str, set[str]] = {}
    for step in gpu.parts(Path("rows.csv"), dry_run=False):
        if step.command[1:3] == ("-m", "benchmarks"):
            options = command_line._parser().parse_args(step.command[3:])
            assert options.keep_going and not options.mark and options.device == "cuda"
            for name in options.names:
                cases = command_line.select_cases(find_benchmark(name), "cuda", options.cases)
                assert cases and all("cuda" in case.devices for case in cases)
                planned[name] = {case.name for case in cases}
    return planned


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.benchmark}-{target.other}-{target.kind}")
def test_every_target_is_measured_by_a_part(target: Target) -> None:
    benchmark = find_benchmark(target.benchmark)
    assert set(target.cases) <= _planned_cases()[target.benchmark]
    ours = target.ours or benchmark.implementations[0].name
    assert benchmark.implementation(ours).kind == "ours"
    assert "cuda" in benchmark.implementation(target.other).devices
    if target.kind == "bandwidth":
        assert all(benchmark.case(case).bytes_moved for case in target.cases)


def _row(case: str, impl: str, **values: str) -> dict[str, str]:
    row = dict.fromkeys(results.COLUMNS, "")
    return row | {"benchmark": "nf4_linear", "case": case, "impl": impl, "p50_ms": "1.0", "gb_s": "1.0"} | values


@pytest.mark.parametrize(
    ("kind", "bound", "ours", "other", "expected"),
    [
        ("speed", 2.0, {"p50_ms": "1.0"}, {"p50_ms": "2.5"}, "**2.5 x** met"),
        ("speed", 3.0, {"p50_ms": "1.0"}, {"p50_ms": "2.5"}, "**2.5 x** missed"),
        ("time", 1.15, {"p50_ms": "1.2"}, {"p50_ms": "1.0"}, "**1.2 x** missed"),
        ("time", 1.25, {"p50_ms": "1.2"}, {"p50_ms": "1.0"}, "**1.2 x** met"),
        ("time", None, {"p50_ms": "1.2"}, {"p50_ms": "1.0"}, "1.2 x"),
        ("bandwidth", 0.85, {"gb_s": "3.5"}, {"gb_s": "4.0"}, "**0.875 x** met"),
        ("extra", 0.5, {"step_mib": "400"}, {}, "**0.419 GB** met"),
        ("extra", 0.4, {"step_mib": "400"}, {}, "**0.419 GB** missed"),
        ("plan", 0.1, PLANNED | {"build_and_step_mib": "930"}, {}, "**0.07 of the plan** met"),
        ("plan", 0.1, PLANNED | {"build_and_step_mib": "1110.5"}, {}, "**0.111 of the plan** missed"),
        ("plan", 0.1, {"build_and_step_mib": "1000", "details": "no plan"}, {}, "**inf of the plan** missed"),
        (
            "speed",
            1.0,
            {"kernels": "reference", "mark": "foreign_load"},
            {},
            "**1 x** met; kernels: reference; marked ",
        ),
    ],
)
def test_a_target_is_met_or_missed(
    kind: str, bound: float | None, ours: dict[str, str], other: dict[str, str], expected: str
) -> None:
    target = Target("item", "nf4_linear", ("a",), "dense", kind, bound)  # type: ignore[arg-type]
    rows = [_row("a", "ladder_kernels", **ours), _row("a", "dense", **other), _row("b", "dense", p50_ms="99")]
    assert target.reached(rows).startswith(expected)


def test_of_several_cases_the_worst_counts() -> None:
    target = Target("item", "nf4_linear", ("a", "b"), "dense", "speed", 1.0)
    rows = [_row(case, "ladder_kernels") for case in "ab"]
    rows += [_row("a", "dense", p50_ms="3.0"), _row("b", "dense", p50_ms="0.5")]
    assert target.reached(rows) == "**0.5 x** missed at b"


def test_what_has_no_row_is_not_measured() -> None:
    target = Target("item", "nf4_linear", ("a", "b"), "dense", "speed", 1.0)
    assert target.reached([_row("a", "ladder_kernels")]) == "not measured: no row of a for dense"
    assert target.reached([_row("a", "dense")]) == "not measured: no row of a for our side"
    text = summary(FACTS, [Outcome("tests", "timed out", 9, 9.4, "last words")], [], dry_run=False)
    assert text.count("| not measured: ") == len(TARGETS)
    assert "# GPU run on test card" in text and "### tests: timed out\n\n```\nlast words\n```" in text


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line.main(["gpu", "--out", str(tmp_path / "out")]) == gpu.EXIT_USAGE
    assert "expected a CUDA device, torch finds none; --dry-run runs on a CPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_part_fails_the_command_and_is_in_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = [_python("tests", "raise RuntimeError('injected')", 30), _python("memcheck", "", 30, absent="no tool")]
    monkeypatch.setattr(gpu, "parts", lambda csv, dry_run: faulty)
    assert command_line.main(["gpu", "--out", str(tmp_path), "--dry-run"]) == gpu.EXIT_FAILED
    text = (tmp_path / "summary.md").read_text()
    assert "### tests: failed with 1" in text and "RuntimeError: injected" in text
    assert "### memcheck: absent\n\n```\nno tool\n```" in text


def test_the_commit_of_a_bare_source_tree_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_REPOSITORY", tmp_path)
    monkeypatch.delenv("LADDER_COMMIT", raising=False)
    assert provenance._git_state() == ("unknown", "unknown")
    monkeypatch.setenv("LADDER_COMMIT", "abc")
    assert provenance._git_state() == ("abc", "unknown")


def test_dry_run_from_end_to_end(tmp_path: Path) -> None:
    """Every part runs on a CPU; rows are appended and marked, and no number is claimed."""
    earlier = dict.fromkeys(results.COLUMNS, "") | {"benchmark": "earlier"}
    results.append_csv(tmp_path / "rows.csv", [earlier])
    assert command_line.main(["gpu", "--out", str(tmp_path), "--dry-run"]) == 0, (tmp_path / "run.log").read_text()
    first, *rows = results.read_csv(tmp_path / "rows.csv")
    assert first == earlier
    assert {row["mark"] for row in rows} == {gpu.DRY_RUN_MARK}
    assert {row["case"] for row in rows} == {"toy"}
    assert {row["benchmark"] for row in rows} == set(_planned_cases())
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# Dry run on a CPU: nothing here is a measurement")
    assert text.count("| dry run |") == len(TARGETS) and "tokens/s" not in text
    for name in gpu.SECONDS:
        assert f"| {name} | passed" in text
        assert f"===== {name}: " in (tmp_path / "run.log").read_text()
