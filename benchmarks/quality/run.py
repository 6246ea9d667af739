"""One run: a method trains on a task beside a backbone, and its row.

Both sides get the same data in the same order, batches of documents side by side, AdamW without decay, clipping at 1,
and a linear decay to zero behind a short warm-up, each run to its own end. The loss is the mean over all supervised
tokens of the whole held-out set.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainerCallback, set_seed

from benchmarks.provenance import foreign_load_percent, mark_of, provenance, read_cpu_times
from benchmarks.quality.accuracy import accuracies
from benchmarks.quality.backbones import backbone_folder
from benchmarks.quality.flops import count_flops
from benchmarks.quality.methods import Method, Peaks, find_method
from benchmarks.quality.rows import Row, Run
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.samples import Sample, TaskData
from engine.backbone import Backbone, load_backbone
from engine.data.collator import Collator
from engine.dtypes import compute_dtype
from engine.training.arguments import LadderArguments
from engine.training.guards import DivergedError

BATCH = 16
WARMUP_SHARE = 0.05
CURVE_POINTS = 4
"""Held-out losses after the start, the last one at the end."""
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


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A task's samples as trainers take them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(self._samples):
            raise IndexError(index)
        sample = self._samples[index]
        return {"input_ids": torch.tensor(sample.input_ids), "labels": torch.tensor(sample.labels)}


def run_one(run: Run, bench: Bench) -> Row:
    """Train, evaluate and describe.

    Raises:
        ValueError: an unknown method, size, task or budget.
    """
    method, data = find_method(run.method), bench.task(run.task, run.size, run.seed)
    flops_per_token = bench.flops_per_token(run.method, run.size, run.task)
    peaks = bench.peaks(run.method, run.size, run.task)
    steps = steps_of(run.budget, flops_per_token, data.train)
    set_seed(run.seed)
    model = method.build(bench.backbone(run.size), run.seed)
    watch = _Watch(model, data.heldout, steps)
    before = read_cpu_times()
    converged = _train(method, model, data.train, run, steps, watch) and math.isfinite(watch.curve[-1][1])
    foreign = foreign_load_percent(before, read_cpu_times())
    return Row(
        run=run,
        steps=steps,
        tokens=watch.tokens,
        flops=float(f"{flops_per_token * watch.tokens:.6g}"),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        peak_bytes=peaks.plain,
        peak_bytes_checkpointing=peaks.checkpointing,
        seconds=round(watch.seconds, 3),
        cpu_seconds=round(watch.cpu_seconds, 3),
        curve=[(step, round(value, 5)) for step, value in watch.curve if math.isfinite(value)],
        loss=round(watch.curve[-1][1], 5) if converged else math.inf,
        accuracy=accuracies(model, data.examples, bench.device) if converged else {},
        mark=mark_of(foreign),
        facts=provenance(bench.device),
    )


def steps_of(budget: str, flops_per_token: float, train: Sequence[Sample]) -> int:
    """Optimizer steps of a budget, at least one.

    Raises:
        ValueError: neither "flops=NUMBER" nor "steps=NUMBER".
    """
    kind, _, text = budget.partition("=")
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if kind not in ("flops", "steps") or not 0 < amount < math.inf:
        raise ValueError(f"budget {budget!r}: expected flops=NUMBER or steps=NUMBER, such as flops=2e12")
    if kind == "steps":
        return max(round(amount), 1)
    tokens_per_step = BATCH * sum(len(sample.input_ids) for sample in train) / len(train)
    return max(round(amount / (flops_per_token * tokens_per_step)), 1)


def heldout_loss(model: nn.Module, heldout: Sequence[Sample]) -> float:
    """Mean cross entropy in nats over every supervised token."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(heldout), BATCH):
            batch = _on_device(Collator()(Samples(heldout[begin : begin + BATCH])), device)
            total += float(model(**batch, num_items_in_batch=1)["loss"])
            count += int((batch["labels"] != -100).sum())
    model.train(was_training)
    return total / count


def _on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors there."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _train(method: Method, model: nn.Module, train: Sequence[Sample], run: Run, steps: int, watch: _Watch) -> bool:
    """Whether training came to its end; False where it diverged."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    with tempfile.TemporaryDirectory(prefix="ladder-quality-") as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = LadderArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            learning_rate=run.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP_SHARE,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=run.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=on_cpu,
            bf16=not on_cpu and method.trainer is Trainer,  # adapters under autocast, as QLoRA's users train them
            dataloader_pin_memory=not on_cpu,
            dataloader_drop_last=True,  # every step is of as many samples
        )
        trainer = method.trainer(
            model, arguments, data_collator=Collator(), train_dataset=Samples(train), callbacks=[watch]
        )
        try:
            trainer.train()
        except DivergedError:
            return False
    return True


class _Watch(TrainerCallback):
    """Held-out losses at a few steps, and the time and tokens of the steps between them."""

    def __init__(self, model: nn.Module, heldout: Sequence[Sample], steps: int) -> None:
        self._model = model
        self._heldout = heldout
        self._points = {round(steps * part / CURVE_POINTS) for part in range(1, CURVE_POINTS + 1)} - {0}
        self._began = (0.0, 0.0)
        self.curve = [(0, heldout_loss(model, heldout))]
        self.seconds = self.cpu_seconds = 0.0
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        if model.training:
            self.tokens += inputs["input_ids"].numel()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = self._now()
        self.seconds += now[0] - self._began[0]
        self.cpu_seconds += now[1] - self._began[1]
        if state.global_step in self._points:
            self.curve.append((state.global_step, heldout_loss(self._model, self._heldout)))

    def _now(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()
