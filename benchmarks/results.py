"""Results as CSV rows with provenance, as JSON metrics, and as a printed table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measure import SMALLEST_DIVISOR_MIB, CaseResult, Measurement, memory_ratio, speed_ratio
from benchmarks.provenance import mark_of
from benchmarks.registry import DTYPE_NAMES

RESULTS_FOLDER = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "benchmark", "case", "model", "sizes", "dtype", "impl", "kind", "kernels", "p20_ms", "p50_ms", "p80_ms", "samples",
    "tokens_per_second", "step_mib", "build_and_step_mib", "gb_s", "tflop_s", "speed_ratios", "memory_ratios",
    "mark", "foreign_cpu_percent", "details", "date", "device", "cpu", "threads", "python", "torch", "transformers",
    "triton", "bitsandbytes", "peft", "ladder_engine", "commit", "dirty",
)  # fmt: skip
UNITS = {
    "p20_ms": "ms",
    "p50_ms": "ms",
    "p80_ms": "ms",
    "samples": "count",
    "tokens_per_second": "tokens/s",
    "step_mib": "MiB",
    "build_and_step_mib": "MiB",
    "gb_s": "GB/s",
    "tflop_s": "TFLOP/s",
}


def metrics(result: CaseResult, measurement: Measurement) -> dict[str, float]:
    """Every number of one implementation by its column name, without those the case has no meaning for.

    `gb_s` and `tflop_s` divide the declared bytes (1e9) and floating-point operations (1e12) by the median time.
    """
    case, prepared = result.case, measurement.prepared
    seconds = measurement.percentile_ms(50) / 1e3
    values = {
        "p20_ms": measurement.percentile_ms(20),
        "p50_ms": measurement.percentile_ms(50),
        "p80_ms": measurement.percentile_ms(80),
        "samples": float(len(measurement.samples_ms)),
        "step_mib": prepared.step_mib,
    }
    if result.benchmark.isolated:
        values["build_and_step_mib"] = prepared.build_and_step_mib
    if case.tokens is not None:
        values["tokens_per_second"] = case.tokens / seconds
    bytes_moved = case.bytes_moved if prepared.bytes_moved is None else prepared.bytes_moved
    if bytes_moved is not None:
        values["gb_s"] = bytes_moved / seconds / 1e9
    if case.flops is not None:
        values["tflop_s"] = case.flops / seconds / 1e12
    return values


def competitors(result: CaseResult, measurement: Measurement) -> list[Measurement]:
    """Baselines and bounds of the same run that `measurement` is compared with."""
    return [
        other
        for other in result.measurements
        if other.implementation.kind != "ours" and other.implementation.name != measurement.implementation.name
    ]


def csv_rows(result: CaseResult, facts: Mapping[str, str], mark: str = "") -> list[dict[str, str]]:
    """One row per implementation, marked with `mark` or else where foreign load spoilt it.

    Ratio columns read `name=value`: `speed_ratios` how many times faster this row is than that competitor of the run,
    `memory_ratios` this row's `step_mib` as a share of the competitor's.
    """
    rows = []
    for measurement in result.measurements:
        others = competitors(result, measurement)
        speed = [(other, speed_ratio(measurement, other)) for other in others]
        memory = [(other, memory_ratio(measurement, other)) for other in others]
        case = result.case
        row = dict.fromkeys(COLUMNS, "") | dict(facts)
        row |= {name: f"{value:.6g}" for name, value in metrics(result, measurement).items()}
        row |= {
            "benchmark": result.benchmark.name,
            "case": case.name,
            "model": case.model,
            "sizes": " ".join(f"{key}={value}" for key, value in case.sizes.items()),
            "dtype": "own" if case.dtype is None else DTYPE_NAMES[case.dtype],
            "impl": measurement.implementation.name,
            "kind": measurement.implementation.kind,
            "kernels": measurement.prepared.kernels,
            "speed_ratios": " ".join(f"{other.implementation.name}={value:.4g}" for other, value in speed),
            "memory_ratios": " ".join(
                f"{other.implementation.name}={value:.4g}" for other, value in memory if value is not None
            ),
            "mark": mark or mark_of(result.foreign_percent),
            "foreign_cpu_percent": "" if result.foreign_percent is None else f"{result.foreign_percent:.1f}",
            "details": measurement.prepared.details,
        }
        rows.append(row)
    return rows


def append_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Append rows, writing the header first where the file is new; nothing is ever overwritten.

    Raises:
        ValueError: the file has another header, so its rows would mean something else.
    """
    exists = path.exists() and path.stat().st_size > 0
    if exists:
        check_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerows(rows)


def check_header(path: Path) -> None:
    """Refuse a results file that these columns do not describe.

    Raises:
        ValueError: naming the file, what was expected and what to do.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS:
        raise ValueError(
            f"{path}: expected the header {','.join(COLUMNS)}, got {','.join(header)}; "
            "results are only ever appended, so name another file with --out or move this one away"
        )


def read_csv(path: Path) -> list[dict[str, str]]:
    """Every row of a results file, checked against the header."""
    check_header(path)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def json_rows(result: CaseResult) -> list[dict[str, object]]:
    """One object per implementation and metric.

    `ratios` maps each baseline and bound of the run to this value divided by theirs, so for `tokens_per_second` more is
    better and for `p50_ms` or `step_mib` less.
    """
    values = {m.implementation.name: metrics(result, m) for m in result.measurements}
    rows: list[dict[str, object]] = []
    for measurement in result.measurements:
        name = measurement.implementation.name
        rivals = [other.implementation.name for other in competitors(result, measurement)]
        for metric, value in values[name].items():
            rows.append(
                {
                    "benchmark": result.benchmark.name,
                    "case": result.case.name,
                    "impl": name,
                    "metric": metric,
                    "value": value,
                    "unit": UNITS[metric],
                    "ratios": _ratios(metric, value, {rival: values[rival] for rival in rivals}),
                    "mark": mark_of(result.foreign_percent),
                }
            )
    return rows


def _ratios(metric: str, value: float, others: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    smallest = SMALLEST_DIVISOR_MIB if metric.endswith("_mib") else 0.0
    if metric == "samples":
        return {}
    return {
        name: value / other[metric] for name, other in others.items() if metric in other and other[metric] > smallest
    }


def write_json(path: Path, results: Sequence[CaseResult]) -> None:
    """All metrics of a run as one list of objects."""
    rows = [row for result in results for row in json_rows(result)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table(result: CaseResult) -> str:
    """The case as text: one line per implementation, then what our own are against each baseline and bound."""
    lines = [["implementation", "p20 ms", "p50 ms", "p80 ms", "n", "tok/s", "MiB", "+build MiB", "GB/s", "TFLOP/s"]]
    for measurement in result.measurements:
        values = metrics(result, measurement)
        kernels = measurement.prepared.kernels
        label = measurement.implementation.name + (f" [{kernels}]" if kernels else "")
        lines.append([label, *(_number(values[name]) if name in values else "" for name in UNITS)])
    shown = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    text = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in zip(*shown, strict=True))
    ]
    return "\n".join([f"{result.benchmark.name}: {result.case.name}", *text, *_verdicts(result)])


def _verdicts(result: CaseResult) -> list[str]:
    """Our ratios, the strictest last: speed against the fastest baseline, memory against the leanest."""
    lines = []
    baselines = [m for m in result.measurements if m.implementation.kind == "baseline"]
    for ours in (m for m in result.measurements if m.implementation.kind == "ours"):
        name = ours.implementation.name
        for other in competitors(result, ours):
            lines.append(f"  {name} / {other.implementation.name}: {_ratio_text(ours, other, other)}")
        if not baselines:
            continue
        fastest = min(baselines, key=lambda m: m.percentile_ms(50))
        leanest = min(baselines, key=lambda m: m.prepared.step_mib)
        if fastest is not leanest:
            names = f"fastest ({fastest.implementation.name}), leanest ({leanest.implementation.name})"
            lines.append(f"  {name} / {names}: {_ratio_text(ours, fastest, leanest)}")
    return lines


def _ratio_text(ours: Measurement, timed: Measurement, weighed: Measurement) -> str:
    memory = memory_ratio(ours, weighed)
    text = f"{speed_ratio(ours, timed):.2f} x the speed"
    return text if memory is None else f"{text}, {memory:.2f} x the memory growth"


def _number(value: float) -> str:
    """Four significant digits, never in exponent notation for what people read as counts."""
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
