"""What a GPU run says in the end: targets asked and reached, parts, and the last lines of those that failed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Row = Mapping[str, str]
_OURS = ("ladder_kernels", "ladder")
_MODEL = "Qwen2.5-7B"
_PLANNED = re.compile(r"planned ([\d.]+) MiB")


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        name: of the part.
        status: "passed" (maybe with a remark), "absent", "timed out" or "failed with CODE".
        planned_seconds, seconds: planned and used.
        lines: why it is absent, or the telling lines of its output.
    """

    name: str
    status: str
    planned_seconds: float
    seconds: float
    lines: str

    @property
    def failed(self) -> bool:
        """Whether something did not work; a tool that is not there is none of that."""
        return not self.status.startswith(("passed", "absent"))


@dataclass(frozen=True)
class Target:
    """One number that is asked for, read from rows of our implementation and of another one.

    Attributes:
        item: what it is of.
        benchmark, cases: where the rows are; of several cases the worst counts.
        other: the implementation we are compared with; for "extra" and "plan" it does not matter.
        kind: "speed" (how many times faster we are), "bandwidth" (our bytes per second as a share of theirs), "time"
            (ours as a multiple of theirs), "extra" (GB that we take) or "plan" (by how much of the planned peak the
            measured one differs from it).
        bound: at least that for the first two, at most for the others; None: the number is stated only.
        ours: name of our implementation, where it is not the first of `_OURS` that there is.
    """

    item: str
    benchmark: str
    cases: tuple[str, ...]
    other: str
    kind: Literal["speed", "bandwidth", "time", "extra", "plan"]
    bound: float | None
    ours: str = ""

    @property
    def is_lower_better(self) -> bool:
        return self.kind in ("time", "extra", "plan")

    @property
    def unit(self) -> str:
        return {"extra": "GB", "plan": "of the plan"}.get(self.kind, "x")

    @property
    def asked(self) -> str:
        """The bound in words."""
        sign = "<=" if self.is_lower_better else ">="
        return "to be stated" if self.bound is None else f"{sign} {self.bound:g} {self.unit}"

    def value(self, ours: Row, other: Row) -> float:
        """The number, from two rows of one case and run."""
        if self.kind == "extra":
            return float(ours["step_mib"]) * 2**20 / 1e9
        if self.kind == "plan":
            planned = _PLANNED.match(ours["details"])
            return abs(float(ours["build_and_step_mib"]) / float(planned[1]) - 1) if planned else math.inf
        if self.kind == "bandwidth":
            return float(ours["gb_s"]) / float(other["gb_s"])
        speed = float(other["p50_ms"]) / float(ours["p50_ms"])
        return 1 / speed if self.kind == "time" else speed

    def reached(self, rows: Sequence[Row]) -> str:
        """The worst number with its verdict and case, or that there is none."""
        found: list[tuple[float, Row]] = []
        for case in self.cases:
            by_name = {row["impl"]: row for row in rows if (row["benchmark"], row["case"]) == (self.benchmark, case)}
            ours = next((by_name[name] for name in (self.ours, *_OURS) if name in by_name), None)
            other = by_name.get(self.other)
            if ours is None or other is None:
                return f"not measured: no row of {case} for {'our side' if ours is None else self.other}"
            found.append((self.value(ours, other), ours))
        value, row = (max if self.is_lower_better else min)(found, key=lambda pair: pair[0])
        text = f"{value:.3g} {self.unit}"
        if self.bound is not None:
            is_met = value <= self.bound if self.is_lower_better else value >= self.bound
            text = f"**{text}** {'met' if is_met else 'missed'}"
        where = f" at {row['case']}" if len(self.cases) > 1 else ""
        remarks = [row["kernels"] and f"kernels: {row['kernels']}", row["mark"] and f"marked {row['mark']}"]
        return "; ".join(filter(None, (text + where, *remarks)))

    @property
    def how(self) -> str:
        """Which rows, and what is divided."""
        what = {"speed": "speed", "bandwidth": "bytes/s", "time": "time", "extra": "peak of a call above its inputs"}
        what["plan"] = "peak allocated under the memory limit of the card, against the planned one"
        against = "" if self.kind in ("extra", "plan") else f" against `{self.other}`"
        return f"{what[self.kind]}{against}; rows `{self.benchmark}`"


def _layer(*tokens: int) -> tuple[str, ...]:
    return tuple(f"{_MODEL}-layer-m{count}-bf16" for count in tokens)


_DECODE, _SIDE = (f"{_MODEL}-layer-bf16",), (f"{_MODEL}-t2048-bf16",)
_LOSS, _STEP, _LONG = (f"{_MODEL}-v152064-r2048-bf16",), (f"{_MODEL}-t2048",), (f"{_MODEL}-t8192",)
_STREAMED = (f"{_MODEL}-t4096",)
TARGETS = (
    Target("dequantize, nested, linears of a 7B block, graphed", "dequantize_nf4", _DECODE, "copy", "bandwidth", 0.85),
    Target("the same", "dequantize_nf4", _DECODE, "bitsandbytes", "speed", 1.5),
    Target("nf4_linear, all linears of a 7B block, M = 2048", "nf4_linear", _layer(2048), "dense", "speed", 0.88),
    Target("the same", "nf4_linear", _layer(2048), "bitsandbytes", "speed", 1.1),
    Target("nf4_linear, all linears of a 7B block, M = 8192", "nf4_linear", _layer(8192), "dense", "speed", 0.95),
    Target("the same", "nf4_linear", _layer(8192), "bitsandbytes", "speed", 1.1),
    Target("the same, M = 1 to 16, graphed", "nf4_linear", _layer(1, 2, 4, 8, 16), "dense", "speed", 2.5),
    Target("the same, M = 1 to 16, graphed", "nf4_linear", _layer(1, 2, 4, 8, 16), "bitsandbytes", "speed", 1.0),
    Target("side_layer forward + backward, 7B, T = 2048", "side_layer", _SIDE, "eager", "speed", 4.0),
    Target("the same", "side_layer", _SIDE, "compiled", "speed", 1.3),
    Target("linear_cross_entropy, V = 152k, 2k rows", "linear_cross_entropy", _LOSS, "two_gemms", "time", 1.15),
    Target("the same, extra memory", "linear_cross_entropy", _LOSS, "two_gemms", "extra", 0.5),
    Target("train step, 7B, 2k tokens, QLoRA with checkpointing", "train_step", _STEP, "qlora", "speed", 3.0),
    Target("the same, QLoRA without checkpointing", "train_step", _STEP, "qlora_kept", "speed", 2.2),
    Target("backbone pass at 8k tokens, share of the GEMM rate", "backbone_pass", _LONG, "products", "speed", 0.75),
    Target("backbone pass at 2k tokens, share of the GEMM rate", "backbone_pass", _STEP, "products", "speed", 0.65),
    Target("whole train step in a CUDA graph, 7B", "train_step", _STEP, "ladder", "speed", None, "ladder_graphed"),
    Target("the same, optimizer outside of it", "train_step", _STEP, "ladder", "speed", None, "ladder_cuda_graph"),
    Target("streamed train step, 7B, 4k tokens", "streamed_step", _STREAMED, "ladder_resident", "speed", 0.9),
    *(
        Target(f"train step under {card} GB, {model}, 2k tokens", "memory_limit", (case,), "ladder", "plan", 0.1)
        for model, card in (("Qwen2.5-7B", 12), ("Qwen2.5-7B", 6), ("Qwen2.5-32B", 12))
        for case in (f"{model}-t2048-{card}GB",)
    ),
    Target("deterministic mode, train step, 7B", "train_step", _STEP, "ladder", "time", None, "ladder_deterministic"),
)  # fmt: skip


def summary(facts: Mapping[str, str], outcomes: Sequence[Outcome], rows: Sequence[Row], dry_run: bool) -> str:
    """The run as Markdown.

    Args:
        facts: of `provenance`.
        outcomes: one per part, in order.
        rows: those that this run has appended.
        dry_run: nothing was measured; no number of a row is shown.
    """
    title = "# Dry run on a CPU: nothing here is a measurement" if dry_run else f"# GPU run on {facts['device']}"
    versions = ("python", "torch", "triton", "transformers", "bitsandbytes", "peft", "ladder_engine")
    origin = [f"{name} {facts[name] or 'absent'}" for name in versions]
    lines = [title, "", f"{facts['date']}, commit {facts['commit']} (changed: {facts['dirty']}); {', '.join(origin)}."]
    lines += ["", "## Targets", "", "| item | asked | reached | how measured |", "|---|---|---|---|"]
    for target in TARGETS:
        reached = "dry run" if dry_run else target.reached(rows)
        lines.append(f"| {target.item} | {target.asked} | {reached} | {target.how} |")
    if not dry_run:
        lines += _steps(rows)
    lines += ["", "## Parts", "", "| part | end | seconds | planned |", "|---|---|---|---|"]
    lines += [f"| {item.name} | {item.status} | {item.seconds:.0f} | {item.planned_seconds:.0f} |" for item in outcomes]
    for item in outcomes:
        if not item.status.startswith("passed"):
            lines += ["", f"### {item.name}: {item.status}", "", "```", item.lines, "```"]
    return "\n".join(lines) + "\n"


def _steps(rows: Sequence[Row]) -> list[str]:
    """Tokens per second and memory of every training step that was run, and what was planned for it."""
    lines = [
        "",
        "## Training steps",
        "",
        "| case | implementation | tokens/s | growth of a step, MiB | with weights, MiB | planned, MiB |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        if row["benchmark"] in ("train_step", "streamed_step", "memory_limit"):
            planned = _PLANNED.match(row["details"])
            name = row["impl"] + (f" ({row['mark']})" if row["mark"] else "")
            cells = (row["case"], name, row["tokens_per_second"], row["step_mib"], row["build_and_step_mib"])
            cells += (planned[1] if planned else "",)
            lines.append(f"| {' | '.join(cells)} |")
    return lines
