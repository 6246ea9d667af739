"""What the quality benchmark compares is comparable: answers, hyperparameters, adapters, peaks, and what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from checkpoints import tiny_checkpoint
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.quality import accuracy, training
from benchmarks.quality import run as quality_run
from benchmarks.quality.accuracy import accuracies
from benchmarks.quality.figures import cost_figure, delta_figure
from benchmarks.quality.low_rank import LowRankModel
from benchmarks.quality.methods import METHODS, SideTuning
from benchmarks.quality.rows import FACTS, Row, Run
from benchmarks.quality.run import Bench
from benchmarks.quality.tasks.samples import Example, Sample, TaskData
from benchmarks.quality.training import BATCH, Samples
from engine.backbone import Backbone, load_backbone
from engine.data.collator import Collator

LENGTHS = (17, 9, 40, 5, 23)
OF_TRAINERS = ("output_dir", "accelerator_config", "ddp_find_unused_parameters")
"""Arguments that a trainer may set for itself: none of them matters in one process."""
SIDE = [name for name, method in METHODS.items() if isinstance(method, SideTuning)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder, dtype=torch.float32)


@pytest.fixture
def bench(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose only backbone is a tiny one, and whose task has samples of LENGTHS."""
    data = TaskData([Sample([7] * length, [7] * length) for length in LENGTHS], [], [])
    monkeypatch.setattr(quality_run, "backbone_folder", lambda *_: folder)
    monkeypatch.setattr(quality_run, "TASKS", {"docstring": lambda *_: data})
    return Bench(tmp_path)  # another in each test: nothing is kept


@pytest.fixture
def open_figures() -> Iterator[None]:
    yield
    plt.close("all")


class _Parrot(nn.Module):
    """Goes on with what it was told for each prompt, then with 99; only for prompts padded on the left."""

    def __init__(self, told: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self._told = told
        self.batches: list[int] = []

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        assert not self.training and options["do_sample"] is False and options["eos_token_id"] is None
        assert input_ids.shape == attention_mask.shape
        self.batches.append(len(input_ids))
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            length = sum(mask)
            assert mask == [0] * (len(mask) - length) + [1] * length, "expected padding on the left"
            assert ids[: len(ids) - length] == [0] * (len(ids) - length)
            told = self._told[tuple(ids[len(ids) - length :])]
            rows.append([*ids, *(told + [99] * max_new_tokens)[:max_new_tokens]])
        return torch.tensor(rows)


def test_accuracy_is_the_share_of_prompts_that_are_continued_by_all_of_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over batches of prompts and answers of several lengths; the order of examples is not that of batches."""
    monkeypatch.setattr(accuracy, "BATCH", 3)
    drawn = [  # prompt, answer, what is generated, group
        ([5, 6, 7, 8], [1], [1], "one"),
        ([5, 6], [2], [3], "one"),
        ([9], [4], [4, 5], "one"),  # what follows the answer does not count
        ([5, 6, 7], [1, 2, 3], [1, 2, 3], "three"),
        ([8, 8, 8, 8, 8], [1, 2, 3], [1, 2, 4], "three"),  # not all of it
        ([8, 8], [1, 2, 3], [2, 1, 3], "three"),
        ([4], [3, 3, 3], [99, 3, 3, 3], "three"),  # late
        ([3, 3, 3], [6, 6], [6, 6], "right"),
        ([2], [6, 7], [6, 7], "right"),
        ([1, 1, 1, 1], [8, 8], [9, 9], "wrong"),
    ]
    model = _Parrot({tuple(prompt): told for prompt, _, told, _ in drawn}).train()
    examples = [Example(prompt, answer, group) for prompt, answer, _, group in drawn]
    found = accuracies(model, examples, torch.device("cpu"))
    assert found == {"one": 0.6667, "right": 1.0, "three": 0.25, "wrong": 0.0}
    assert model.batches == [3, 3, 3, 1]


def test_every_method_trains_with_the_same_hyperparameters(backbone: Backbone, tmp_path: Path) -> None:
    """But for the learning rate, which each is tried with; models are built, for it may depend on them."""
    given = {}
    for name, method in METHODS.items():
        model = method.build(backbone, seed=3)
        arguments = training._arguments(str(tmp_path), method, model, learning_rate=2e-3, steps=40, seed=3)
        given[name] = arguments.to_dict()
    first = given["qlora_r16"]
    assert {name: values for name, values in given.items() if values != first} == {}
    chosen = {
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.05,
        "max_steps": 40,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "seed": 3,
        "bf16": False,
    }
    assert {name: first[name] for name in chosen} == chosen


def test_every_trainer_takes_the_same_steps(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments and its optimizer's settings as each step begins, also of side networks trained together."""
    seen: list[tuple[dict[str, Any], type, dict[str, Any]]] = []

    def watched(self: Any, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        first, *others = ({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
        assert others == [first] * len(others)
        arguments = {k: v for k, v in args.to_dict().items() if k not in OF_TRAINERS}
        seen.append((arguments, type(getattr(optimizer, "optimizer", optimizer)), first))

    monkeypatch.setattr(training._Watch, "on_step_begin", watched)
    samples, steps = [Sample([7] * 4, [7] * 4)], []
    for name, members in (("qlora_r16", 1), ("ladder", 1), ("ladder", 2)):
        model, data = METHODS[name].build(backbone, seed=3), TaskData(samples * BATCH, samples, [])
        training.train(METHODS[name], model, data, [2e-3] * members, steps=6, seed=3)
        steps += [seen[member::members] for member in range(members)]
        seen.clear()
    rates = [settings["lr"] for _, _, settings in steps[0]]
    assert rates == pytest.approx([0, 2e-3, 1.6e-3, 1.2e-3, 8e-4, 4e-4])
    assert {(kind, settings["weight_decay"]) for _, kind, settings in steps[0]} == {(torch.optim.AdamW, 0.0)}
    assert len(steps) == 4 and all(others == steps[0] for others in steps)


@pytest.mark.parametrize("rank", [4, 16])
def test_an_adapted_linear_adds_twice_the_product_of_its_adapters(backbone: Backbone, rank: int) -> None:
    """Every linear of every block, against fp64."""
    model, drawn = LowRankModel(backbone, rank), torch.Generator().manual_seed(1)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            nn.init.normal_(module.lora_B["default"].weight, std=0.1, generator=drawn)  # it adds nothing else
            module.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0], output)))
    with torch.no_grad():
        model(**Collator()(Samples([Sample(list(range(1, 9)), list(range(1, 9)))])))
        assert len(seen) == 7 * backbone.config.num_layers
        for module, inputs, output in seen:
            a, b = (getattr(module, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
            assert a.shape[0] == b.shape[1] == rank
            base, added = inputs.double() @ module.base_layer.weight.double().T, inputs.double() @ a.T @ b.T
            assert added.norm() > 0.01 * base.norm()
            torch.testing.assert_close(output.double(), base + 2 * added, rtol=1e-4, atol=1e-4)


def test_peaks_of_adapters_are_given_with_and_without_checkpointing(bench: Bench) -> None:
    kept, again = (bench.peaks(name, "3.0M", "docstring") for name in ("qlora_r16", "qlora_r16_checkpointing"))
    assert kept.checkpointing is not None and kept.checkpointing < kept.plain
    assert (again.plain, again.checkpointing) == (kept.checkpointing, None)


@pytest.mark.parametrize("name", SIDE)
def test_a_side_network_has_one_peak(name: str, bench: Bench) -> None:
    peaks = bench.peaks(name, "3.0M", "docstring")
    assert peaks.plain > 0 and peaks.checkpointing is None


@pytest.mark.parametrize("name", METHODS)
def test_the_peak_is_that_of_a_batch_of_the_longest_sample(
    name: str, bench: Bench, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tracked is tested above: here, of which step."""
    monkeypatch.setattr(type(METHODS[name]), "peaks", lambda self, config, tokens, batch: (tokens, batch))
    assert bench.peaks(name, "3.0M", "docstring") == (max(LENGTHS), BATCH)


def _row(method: str, loss: float, seed: int = 0, size: str = "3.0M", budget: str = "flops=1e9", **values: Any) -> Row:
    values = {"flops": 1e9, "peak_bytes": 2**20, "peak_bytes_checkpointing": None, "seconds": 1.0} | values
    return Row(
        run=Run(method, size, "docstring", budget, 1e-3, seed),
        steps=3,
        tokens=100,
        trained_parameters=10,
        cpu_seconds=50.0,
        curve=[(0, 5.0), (3, loss)],
        loss=loss,
        accuracy={},
        mark="",
        facts=dict.fromkeys(FACTS, "x"),
        **values,
    )


def _drawn(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of every line with error bars, by its label."""
    lines = {container.get_label(): container.lines[0] for container in axis.containers}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in lines.items()}


def _axes(figure: Figure | None, count: int) -> list[Axes]:
    assert figure is not None and len(figure.axes) == count
    return figure.axes


@pytest.mark.usefixtures("open_figures")
def test_the_figure_over_delta_has_each_variant_at_its_tapped_blocks() -> None:
    """A size of 8 blocks, half of which are tapped by default; means over two seeds."""
    losses = {"xladder:num_taps=6": 2.0, "xladder": 3.0, "xladder:num_taps=1": 4.0, "ladder": 3.5}
    rows = [_row(method, loss + 0.25 * seed, seed) for method, loss in losses.items() for seed in (0, 2)]
    rows.append(_row("xladder:num_taps=2,seed=1", 9.0))  # something else was changed too
    (axis,) = _axes(delta_figure(rows), 1)
    assert _drawn(axis) == {"xladder": ([1, 4, 6], [4.25, 3.25, 2.25])}
    (across,) = (line for line in axis.lines if line.get_label() == "ladder")
    assert set(across.get_ydata()) == {3.75}


@pytest.mark.usefixtures("open_figures")
def test_the_figure_of_costs_has_flops_mebibytes_and_mean_seconds() -> None:
    """Means over seeds, of seconds those that are known; other sizes, budgets in steps and variants are left out."""
    both = {"peak_bytes": 6 * 2**20, "peak_bytes_checkpointing": 5 * 2**19}
    rows = [
        _row("qlora_r16", 3.0, 0, flops=1e9, seconds=2.0, **both),
        _row("qlora_r16", 3.5, 1, flops=2e9, seconds=8.0, **both),
        _row("qlora_r16", 2.5, 2, flops=3e9, seconds=None, **both),
        _row("qlora_r16", 2.0, 0, budget="flops=4e9", flops=4e9, seconds=16.0, **both),
        _row("ladder", 2.75, 0, flops=1.5e9, seconds=3.0, peak_bytes=3 * 2**19),
        _row("qlora_r16", 1.0, 0, budget="steps=9"),
        _row("ladder", 1.0, 0, size="0.8M"),
        _row("ladder:merge=sum", 1.0, 0),
    ]
    flops, memory, seconds = _axes(cost_figure(rows), 3)
    assert _drawn(flops) == {"qlora_r16": ([2e9, 4e9], [3.0, 2.0]), "ladder": ([1.5e9], [2.75])}
    assert _drawn(memory) == {"qlora_r16": ([6.0, 6.0], [3.0, 2.0]), "ladder": ([1.5], [2.75])}
    assert _drawn(seconds) == {"qlora_r16": ([5.0, 16.0], [3.0, 2.0]), "ladder": ([3.0], [2.75])}
    hollow = [line for line in memory.lines if line.get_markerfacecolor() == "none"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in hollow] == [(2.5, 3.0), (2.5, 2.0)]
    assert "FLOPs" in flops.get_xlabel() and "MiB" in memory.get_xlabel() and "seconds" in seconds.get_xlabel()
