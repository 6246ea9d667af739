"""Rows of runs: a method, trained on a task beside a backbone, with what it cost and what it learned.

The loss is the mean over all supervised tokens of the whole held-out set.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from benchmarks.provenance import foreign_load_percent, mark_of, provenance, read_cpu_times
from benchmarks.quality.accuracy import accuracies
from benchmarks.quality.backbones import backbone_folder
from benchmarks.quality.flops import count_flops
from benchmarks.quality.methods import Peaks, find_method
from benchmarks.quality.rows import Row, Run, parsed_budget
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.samples import Sample, TaskData
from benchmarks.quality.training import BATCH, Samples, train
from engine.backbone import Backbone, load_backbone
from engine.data.collator import Collator
from engine.dtypes import compute_dtype

COUNTED_BATCHES = 2
"""Batches of training samples whose FLOPs are counted; a step's are theirs per token."""


@dataclass(frozen=True)
class Bench:
    """Backbones, tasks and what was found out about them, each made once.

    Attributes:
        cache: where pretrained backbones are kept.
        device: where runs train. FLOPs are counted on the CPU, where every product is an op that the counter sees.
    """

    cache: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @functools.cache  # noqa: B019, there is one bench in a process
    def backbone(self, size: str, device: torch.device | None = None) -> Backbone:
        """The NF4 backbone: fp32 on a CPU, where runs are small enough for it, else the compute dtype of the card."""
        device = self.device if device is None else device
        dtype = torch.float32 if device.type == "cpu" else compute_dtype(device.type)
        return load_backbone(backbone_folder(size, self.cache, self.device), dtype=dtype, device=device)

    @functools.cache  # noqa: B019
    def task(self, name: str, size: str, seed: int) -> TaskData:
        """A task in the tokens of a backbone."""
        return TASKS[name](AutoTokenizer.from_pretrained(backbone_folder(size, self.cache, self.device)), seed)

    @functools.cache  # noqa: B019
    def flops_per_token(self, method: str, size: str, task: str) -> float:
        """Of forward and backward, over the first batches of the task's first seed."""
        model = find_method(method).build(self.backbone(size, torch.device("cpu")), seed=0)
        samples = self.task(task, size, 0).train[: COUNTED_BATCHES * BATCH]
        flops = tokens = 0
        for begin in range(0, len(samples), BATCH):
            batch = Collator()(Samples(samples[begin : begin + BATCH]))
            flops += count_flops(model, batch)
            tokens += batch["input_ids"].numel()
        return flops / tokens

    @functools.cache  # noqa: B019
    def peaks(self, method: str, size: str, task: str) -> Peaks:
        """Of a step over the longest samples there are, so of the largest step that can come."""
        longest = max(len(sample.input_ids) for sample in self.task(task, size, 0).train)
        config = self.backbone(size, torch.device("cpu")).hf_config
        return find_method(method).peaks(config, longest, BATCH)


def run_together(runs: Sequence[Run], bench: Bench) -> list[Row]:
    """Train, evaluate and describe runs that differ in the learning rate alone; see `grid.next_runs`.

    Raises:
        ValueError: an unknown method, size, task or budget.
    """
    run = runs[0]
    method, data = find_method(run.method), bench.task(run.task, run.size, run.seed)
    flops_per_token = bench.flops_per_token(run.method, run.size, run.task)
    peaks = bench.peaks(run.method, run.size, run.task)
    steps = steps_of(run.budget, flops_per_token, data.train)
    set_seed(run.seed)
    model = method.build(bench.backbone(run.size), run.seed)
    before = read_cpu_times()
    trainings = train(method, model, data, [one.learning_rate for one in runs], steps, run.seed)
    foreign = foreign_load_percent(before, read_cpu_times())
    return [
        Row(
            run=one,
            steps=steps,
            tokens=trained.tokens,
            flops=float(f"{flops_per_token * trained.tokens:.6g}"),
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            peak_bytes=peaks.plain,
            peak_bytes_checkpointing=peaks.checkpointing,
            seconds=_rounded(trained.seconds),
            cpu_seconds=_rounded(trained.cpu_seconds),
            curve=[(step, round(value, 5)) for step, value in trained.curve if math.isfinite(value)],
            loss=round(trained.curve[-1][1], 5) if trained.converged else math.inf,
            accuracy=accuracies(trained.model, data.examples, bench.device) if trained.converged else {},
            mark=mark_of(foreign),
            facts=provenance(bench.device),
        )
        for one, trained in zip(runs, trainings, strict=True)
    ]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def steps_of(budget: str, flops_per_token: float, train: Sequence[Sample]) -> int:
    """Optimizer steps of a budget, at least one.

    Raises:
        ValueError: neither "flops=NUMBER" nor "steps=NUMBER".
    """
    kind, amount = parsed_budget(budget)
    if kind == "steps":
        return max(round(amount), 1)
    tokens_per_step = BATCH * sum(len(sample.input_ids) for sample in train) / len(train)
    return max(round(amount / (flops_per_token * tokens_per_step)), 1)
