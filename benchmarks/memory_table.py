"""`python -m benchmarks memory`: what a training step holds at real shapes, by phase and part, ours beside QLoRA's.

Tracked, not measured: the storages that a GPU's code makes, on fake tensors (`benchmarks.tracker`). Rows depend on the
code and torch's version only, so the CSV is written anew. Beside every tracked peak of ours stands the plan's.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.results import RESULTS_FOLDER
from benchmarks.shapes import model_shape
from benchmarks.tracked_qlora import QLoRA, track_qlora
from benchmarks.tracked_step import track_ladder
from engine.backbone.families import backbone_config
from engine.config import LadderConfig
from engine.memory.plan import plan_memory
from engine.memory.workload import GB, MemoryPolicies, Workload

MEMORY_CSV = RESULTS_FOLDER / "memory.csv"
COLUMNS = (
    "model", "tokens", "batch", "method", "policies", "phase", "bytes", "planned_bytes", "host_bytes", "parts", "torch",
)  # fmt: skip
PEAK = "peak"
RIVALS = {
    "qlora": QLoRA(checkpointing=False),
    "qlora_checkpointing": QLoRA(checkpointing=True),
    "qlora_fp32_adapters": QLoRA(checkpointing=False, autocast=False),
    "qlora_checkpointing_our_loss": QLoRA(checkpointing=True, has_our_loss=True),
}
EXIT_USAGE = 2
WORKERS = 2

Row = dict[str, str]


@dataclass(frozen=True)
class TrackedCase:
    """A method at a shape: a key of `RIVALS`, or a preset of `LadderConfig` with its reduction factor."""

    model: str
    tokens: int
    method: str
    reduction_factor: int = 16
    policies: MemoryPolicies = field(default_factory=MemoryPolicies)

    @property
    def name(self) -> str:
        """What --cases matches."""
        return f"{self.model}-t{self.tokens}-{self.label}"

    @property
    def label(self) -> str:
        """The method, and what is not the default of it."""
        differences = [
            f"r{self.reduction_factor}" if self.reduction_factor != 16 else "",
            "host" if self.policies.residency == "host" else "",
            f"{self.policies.taps}-taps" if self.policies.taps != "device" else "",
            self.policies.head_dtype if self.policies.head_dtype != "dense" else "",
        ]
        return "-".join((self.method, *filter(None, differences)))


STREAMED = MemoryPolicies(residency="host", taps="host", head_dtype="nf4")
CASES = (
    *(TrackedCase("Qwen2.5-7B", 2048, method) for method in ("ladder", "xladder", "rejoin", "lst", "qst", *RIVALS)),
    TrackedCase("Qwen2.5-7B", 2048, "ladder", policies=MemoryPolicies(taps="int8")),
    TrackedCase("Qwen2.5-7B", 2048, "ladder", policies=STREAMED),
    TrackedCase("Qwen2.5-7B", 32768, "ladder", policies=STREAMED),
    *(TrackedCase("Qwen2.5-14B", 2048, method) for method in ("ladder", *RIVALS)),
    TrackedCase("Qwen2.5-14B", 2048, "ladder", policies=STREAMED),
    *(TrackedCase("Qwen2.5-32B", 2048, method) for method in ("ladder", *RIVALS)),
    TrackedCase("Qwen2.5-32B", 2048, "ladder", policies=STREAMED),
    TrackedCase("Llama-3.1-70B", 2048, "ladder", reduction_factor=64, policies=STREAMED),
)


def track(case: TrackedCase) -> list[Row]:
    """One row per phase, and one of the peak over all of them."""
    hf_config = model_shape(case.model).config()
    planned: dict[str, int] = {}
    if case.method in RIVALS:
        tracker = track_qlora(hf_config, RIVALS[case.method], case.tokens)
    else:
        config = LadderConfig.preset(case.method, reduction_factor=case.reduction_factor)
        tracker = track_ladder(hf_config, config, case.tokens, policies=case.policies)
        plan = plan_memory(backbone_config(hf_config), config, Workload(case.tokens), case.policies)
        planned = {phase: plan.phase_bytes(phase) for phase in plan.phases} | {PEAK: plan.peak_bytes}
    common = {
        "model": case.model,
        "tokens": str(case.tokens),
        "batch": "1",
        "method": case.label,
        "policies": "" if case.method in RIVALS else case.policies.describe(),
        "torch": torch.__version__.partition("+")[0],
    }
    return [
        common
        | {
            "phase": phase,
            "bytes": str(peak.device_bytes),
            "planned_bytes": str(planned.get(phase, "")),
            "host_bytes": str(max(peak.host_bytes for peak in tracker.peaks.values())),
            "parts": " ".join(f"{part.replace(' ', '_')}={size}" for part, size in peak.parts.most_common() if size),
        }
        for phase, peak in (tracker.peaks | {PEAK: tracker.peak}).items()
    ]


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns 0, or 2 for a pattern that matches nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="MODEL-tTOKENS-METHOD, wildcards allowed")
    parser.add_argument(
        "--out", type=Path, default=MEMORY_CSV, metavar="CSV", help="written anew; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    patterns = options.cases or ["*"]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in CASES):
            known = "\n  ".join(case.name for case in CASES)
            print(f"error: --cases: {pattern!r} matches none of\n  {known}", file=sys.stderr)
            return EXIT_USAGE
    cases = [case for case in CASES if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        tracked = []
        for rows in pool.map(track, cases):
            tracked.append(rows)
            print("\n".join(phase_lines(rows)), flush=True)
    rows = [row for rows in tracked for row in rows]
    print("\n" + "\n".join(ratio_lines(rows)))
    write_csv(options.out, rows)
    print(f"\n{len(rows)} rows written to {options.out}")
    return 0


def phase_lines(rows: Sequence[Row]) -> list[str]:
    """A case as text: bytes of every phase, and the parts at the peak."""
    first = rows[0]
    lines = [
        f"\n{first['model']}, {first['tokens']} tokens, {first['method']}: {first['policies'] or 'all on the device'}"
    ]
    for row in rows:
        plan = f", plan {int(row['planned_bytes']) / GB:.3f}" if row["planned_bytes"] else ""
        lines.append(f"  {row['phase']:<14} {int(row['bytes']) / GB:>7.3f} GB{plan}")
    parts = (part.split("=") for part in rows[-1]["parts"].split())
    return [*lines, "  at the peak: " + ", ".join(f"{name} {int(size) / GB:.3f}" for name, size in parts)]


def ratio_lines(rows: Sequence[Row]) -> list[str]:
    """Every peak of ours as a share of every rival's at the same shape."""
    peaks = {(row["model"], row["tokens"], row["method"]): int(row["bytes"]) for row in rows if row["phase"] == PEAK}
    lines = []
    for (model, tokens, method), ours in peaks.items():
        if method in RIVALS:
            continue
        rivals = {rival: peaks[model, tokens, rival] for rival in RIVALS if (model, tokens, rival) in peaks}
        shares = ", ".join(f"{ours / theirs:.2f} x {rival} ({theirs / GB:.2f})" for rival, theirs in rivals.items())
        lines.append(
            f"{model}, {tokens} tokens, {method}: peak {ours / GB:.2f} GB" + (f" = {shares}" if shares else "")
        )
    return lines


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
