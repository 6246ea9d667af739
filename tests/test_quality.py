"""The benchmark of learning quality: both sides compute the same function, its costs, its grid, its file, its fits."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint

from benchmarks import __main__ as command_line
from benchmarks.quality import command
from benchmarks.quality import run as quality_run
from benchmarks.quality import training as quality_training
from benchmarks.quality.figures import COLORS
from benchmarks.quality.flops import count_flops
from benchmarks.quality.grid import Grid, best_rate, budget_name, next_runs, rates_of
from benchmarks.quality.low_rank import LowRankModel
from benchmarks.quality.methods import METHODS, find_method
from benchmarks.quality.rows import FACTS, Row, Run, append_row, drop_torn_line, read_rows
from benchmarks.quality.run import Bench, run_together, steps_of
from benchmarks.quality.scaling import fit, intervals
from benchmarks.quality.summary import cells, scalings
from benchmarks.quality.tasks.samples import Example, Sample, TaskData
from benchmarks.quality.training import BATCH, Samples
from engine.backbone import Backbone, load_backbone
from engine.config import LadderConfig
from engine.data.collator import Collator
from engine.memory.cards import layer_parameters
from engine.model.causal_lm import LadderForCausalLM

GRID = Grid(
    ("3.0M", "0.8M"),
    ("docstring", "hops"),
    ("qlora_r16", "ladder", "xladder"),
    2,
    2,
    (1e9, 2e9, 4e9),
    3,
    ("xladder:num_taps=1",),
)
TOY = replace(GRID, sizes=("3.0M",), tasks=("docstring",), methods=("qlora_r16", "ladder"), seeds=1, budgets=(2e8, 4e8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder, dtype=torch.float32)


@pytest.fixture
def bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose only backbone is a tiny one, and whose task is to repeat a token."""
    monkeypatch.setattr(quality_run, "backbone_folder", lambda *_: folder)
    monkeypatch.setattr(quality_run, "TASKS", {"hops": _repeat, "docstring": _repeat})
    return Bench(folder)  # the same in all tests: what it found out about costs is kept


def _repeat(_: Any, seed: int) -> TaskData:
    drawn = random.Random(seed)
    rows = [[drawn.randrange(7, 10)] * drawn.randrange(3, 9) for _ in range(40)]
    examples = [Example([7] * length, [7, 7], f"length={length}") for length in (2, 5)]
    return TaskData([Sample(row, row) for row in rows], [Sample([9] * 5, [-100, -100, 9, 9, 9])] * 3, examples)


def _row(run: Run, loss: float, flops: float = 1e9, **changed: Any) -> Row:
    row = Row(
        run, 3, 100, flops, 10, 2**20, None, 1.0, 2.0, [(0, 5.0), (3, loss)], loss, {}, "", dict.fromkeys(FACTS, "x")
    )
    return replace(row, **changed)


def _batch(lengths: tuple[int, ...] = (9, 4, 6)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return Collator()(Samples([_sample(length, generator) for length in lengths]))


def _sample(length: int, generator: torch.Generator) -> Sample:
    ids = torch.randint(1, 200, (length,), generator=generator).tolist()
    return Sample(ids, ids)


def test_both_sides_start_as_the_same_function(backbone: Backbone) -> None:
    """Loss of a ragged batch, and greedy tokens of left-padded prompts."""
    ours = LadderForCausalLM.from_backbone(backbone, LadderConfig()).eval()
    theirs = LowRankModel(backbone, rank=4).eval()
    batch = _batch()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(**batch)["loss"], ours(**batch, num_items_in_batch=1)["loss"], rtol=2e-5, atol=0
        )
    prompts = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    options = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(model.generate(input_ids=prompts, **options)[:, 4:] for model in (ours, theirs)))
    with torch.no_grad():  # generation leaves nothing behind
        torch.testing.assert_close(
            theirs(**batch)["loss"], ours(**batch, num_items_in_batch=1)["loss"], rtol=2e-5, atol=0
        )


def test_documents_of_a_batch_do_not_see_each_other(backbone: Backbone) -> None:
    model = LowRankModel(backbone, rank=4)
    generator = torch.Generator().manual_seed(2)
    samples = [_sample(length, generator) for length in (5, 8)]
    with torch.no_grad():
        apart = sum(float(model(**Collator()(Samples([sample])))["loss"]) for sample in samples)
        assert float(model(**Collator()(Samples(samples)))["loss"]) == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize("top_blocks", [None, 1])
def test_flops_of_low_rank_adapters(backbone: Backbone, top_blocks: int | None) -> None:
    """2N forward, 2N for the gradient to inputs and 6n for the adapters; below the first adapter only 2N.

    The lowest adapted linears that read the hidden state need no gradient to it: neither of W nor of A.
    """
    config, rank, lengths = backbone.config, 4, (9, 4, 6)
    model, batch, rows = LowRankModel(backbone, rank, top_blocks), _batch(lengths), sum(lengths)
    adapted = config.num_layers if top_blocks is None else top_blocks
    weights = layer_parameters(config)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kv = config.num_kv_heads * config.head_dim
    entry = config.hidden_size * (config.num_heads * config.head_dim + 2 * kv)
    scores = sum(length**2 for length in lengths) * config.num_heads * config.head_dim
    head = len(batch["supervised_rows"]) * config.vocab_size * config.hidden_size
    expected = (
        2 * rows * (config.num_layers + adapted) * weights
        - 2 * rows * (entry + 3 * rank * config.hidden_size)
        + 6 * rows * adapters
        + (4 * config.num_layers + 10 * adapted) * scores
        + 4 * head
    )
    assert count_flops(model, batch) == expected


def test_checkpointing_costs_another_forward_and_changes_no_gradient(backbone: Backbone) -> None:
    """But for what backward does not ask for again: each block's last product."""
    config, lengths, gradients, flops = backbone.config, (9, 4, 6), [], []
    for checkpointing in (False, True):
        model = LowRankModel(backbone, rank=4, checkpointing=checkpointing)
        flops.append(count_flops(model, _batch()))
        model(**_batch())["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    adapters = sum(gradient.numel() for gradient in gradients[0])
    scores = sum(length**2 for length in lengths) * config.num_heads * config.head_dim
    forward = 2 * sum(lengths) * (config.num_layers * layer_parameters(config) + adapters)
    forward += 4 * config.num_layers * scores
    assert 0.8 * forward < flops[1] - flops[0] <= forward


@pytest.mark.parametrize("rejoin", [0.0, 0.5])
def test_flops_of_a_side_network(backbone: Backbone, rejoin: float) -> None:
    """2N for the backbone, and the side network's: forward, again in backward (not taps and side_up), and gradients.

    Blocks that gradients come through take as much again twice, and side_up then has all rows.
    """
    config, batch = backbone.config, _batch((9, 4, 6))
    model = LadderForCausalLM.from_backbone(backbone, LadderConfig(rejoin=rejoin))
    rows, supervised = 19, len(batch["supervised_rows"])
    side = model.side_network
    above = config.num_layers - side.joins_at
    layers = sum(p.numel() for layer in side.layers for p in layer.parameters() if p.dim() == 2)
    taps = sum(tap.weight.numel() for tap in side.taps)
    scores = (81 + 16 + 36) * config.num_heads * config.head_dim
    side_scores = (81 + 16 + 36) * side.dims.num_heads * side.dims.head_dim * side.num_side_layers
    expected = (
        2 * rows * (config.num_layers + 2 * above) * layer_parameters(config)
        + (4 * config.num_layers + 14 * above) * scores
        + rows * (8 * layers + 4 * taps)
        + 18 * side_scores
        + 6 * (rows if above else supervised) * side.side_up.numel()
        + 4 * supervised * config.vocab_size * config.hidden_size
    )
    assert count_flops(model, batch) == pytest.approx(expected, rel=0.03)


def test_nothing_is_back_propagated_below_the_top_blocks(backbone: Backbone) -> None:
    model = LowRankModel(backbone, rank=4, top_blocks=1)
    seen: list[bool] = []
    for layer in model.model.get_base_model().model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model(**_batch())["loss"].backward()
    assert seen == [False] * (len(seen) - 1) + [True]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_method_has_as_many_tries_as_every_other_and_less_memory_at_the_top(bench: Bench) -> None:
    assert len({len(method.learning_rates) for method in METHODS.values()}) == 1
    whole, top, ours = (bench.peaks(name, "3.0M", "hops") for name in ("qlora_r16", "lora_top_quarter", "ladder"))
    assert top.plain < whole.plain
    assert whole.checkpointing is not None and ours.checkpointing is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorax", "qlora_r16"),
        ("ladder:merge", "SETTING=VALUE"),
        ("ladder:merge=max", "lst, sum"),
        ("ladder:depth=2", "depth"),
        ("qlora_r16:rank=0", "rank >= 1"),
        ("qlora_r16:alpha=1", "alpha"),
    ],
)
def test_an_unknown_method_or_setting_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_method(text)


def test_a_grid_is_trained_stopped_and_gone_on_with(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The smoke grid: rows come one by one, a torn line is done again, nothing is trained twice, figures are drawn."""
    out = tmp_path / "rows.csv"
    monkeypatch.setattr(command, "FULL", TOY)
    monkeypatch.setattr(command, "Bench", lambda *_: bench)
    arguments = ["quality", "--out", str(out), "--json", str(tmp_path / "s.json")]
    assert command_line.main([*arguments, "--minutes", "0"]) == 0
    assert not out.exists()
    assert command_line.main(arguments) == 0
    rows, text = read_rows(out), out.read_text()
    assert len(rows) == len({row.run for row in rows})
    budgets = Counter(row.run.budget for row in rows)
    assert budgets.pop(TOY.middle) >= 6 and set(budgets.values()) == {2}  # of two methods: rates; one run of each other
    for row in rows:
        assert row.curve[0][0] == 0 and row.curve[-1] == (row.steps, row.loss)
        assert row.accuracy.keys() == {"length=2", "length=5"}
        assert row.loss < row.curve[0][1] or row.run.learning_rate > 0.03
        if row.run.budget.startswith("flops"):
            assert row.flops == pytest.approx(float(row.run.budget[6:]), rel=0.3)
    assert {row.steps for row in rows if row.run.budget == "steps=3"} == {3}
    out.write_text(text[:-30])
    assert command_line.main(arguments) == 0
    again = read_rows(out)
    assert "cut off" in capsys.readouterr().out
    assert again[:-1] == rows[:-1] and again[-1].loss == rows[-1].loss
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["quality_accuracy.png", "quality_cost.png"]


def test_both_trainers_see_the_same_batches_in_the_same_order(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[list[int]]] = {}

    def watched(self: Any, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        if model.training:
            seen.setdefault(type(model).__name__, []).append(inputs["input_ids"].flatten().tolist())

    monkeypatch.setattr(quality_training._Watch, "_count", watched)
    for method in ("qlora_r16", "ladder"):
        run_together([Run(method, "3.0M", "hops", "steps=4", 1e-3, 5)], bench)
    first, second = seen.values()
    assert first == second and len(first) == 4


def test_a_training_that_diverges_is_a_row_with_an_infinite_loss(bench: Bench, tmp_path: Path) -> None:
    (row,) = run_together([Run("qlora_r16", "3.0M", "hops", "steps=6", 1e30, 0)], bench)
    assert row.loss == math.inf and row.accuracy == {}
    append_row(tmp_path / "rows.csv", row)
    assert read_rows(tmp_path / "rows.csv") == [row]
    assert cells([row]) == []


@pytest.mark.parametrize("method", ["ladder", "rejoin"])
def test_learning_rates_of_a_side_network_share_the_passes_of_the_backbone(
    bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses to the bit of each trained alone, one that diverges included; only their times are not known."""
    runs = [Run(method, "3.0M", "hops", "steps=4", rate, 1) for rate in (1e-3, 1e38, 1e-2)]
    passes = []
    hidden_states = Backbone.hidden_states

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        return hidden_states(*arguments)

    monkeypatch.setattr(Backbone, "hidden_states", counted)
    together = run_together(runs, bench)
    shared = len(passes)
    alone = [run_together([run], bench) for run in runs]
    assert [replace(row, facts={}, mark="", seconds=None, cpu_seconds=None) for (row,) in alone] == [
        replace(row, facts={}, mark="") for row in together
    ]
    assert [row.loss == math.inf for row in together] == [False, True, False]
    assert all(row.seconds for (row,) in alone) and 2 * shared < len(passes)


def test_steps_of_a_budget() -> None:
    train = [Sample([0] * 10, [0] * 10)]
    assert steps_of("flops=8e5", 100.0, train) == round(8e5 / (100 * 10 * BATCH))
    assert steps_of("flops=1", 100.0, train) == 1
    assert steps_of("steps=7", 100.0, train) == 7
    for budget in ("7", "flops=", "flops=nan", "steps=-1", "tokens=5"):
        with pytest.raises(ValueError, match="expected flops=NUMBER"):
            steps_of(budget, 100.0, train)


def test_the_order_of_a_grid_and_its_choice_of_learning_rates() -> None:
    rows: list[Row] = []
    low, high = rates_of("ladder", 2)
    sweeps = 0
    while together := next_runs(GRID, rows):
        assert not {row.run for row in rows}.intersection(together)
        assert len({(run.method, run.seed) for run in together}) == 1
        sweeps += len(together) > 1
        rows += [_row(run, 4.0 if run.learning_rate == high else 5.0) for run in together]
    assert sweeps == 6  # of both side networks on both tasks, and of two variants on hops
    runs = [row.run for row in rows]
    # Two rates of each method, then the one beyond its better one; of equally good ones the lower.
    assert [run.budget for run in runs[:9]] == [GRID.middle] * 9 and {run.seed for run in runs[:9]} == {0}
    assert len({(run.method, run.learning_rate) for run in runs[:9]}) == 9
    beyond = {run.method: run.learning_rate for run in runs[6:9]}
    assert beyond == {"qlora_r16": 3e-4, "ladder": 3e-2, "xladder": 3e-2}
    later = [run for run in runs[9:] if run.task == "docstring"]
    assert {run.learning_rate for run in later if run.method != "qlora_r16"} == {high}
    assert {run.budget for run in later} == {budget_name(flops) for flops in GRID.budgets} | {"steps=3"}
    stages = [stage for stage, _ in groupby((run.task, run.size) for run in runs)]
    first, other_task, other_size = ("docstring", "3.0M"), ("hops", "3.0M"), ("docstring", "0.8M")
    assert stages == [first, other_task, first, other_size, first]
    assert sum(run.method == "xladder:num_taps=1" for run in runs) == GRID.seeds
    assert {low, high} < {run.learning_rate for run in runs if run.method == "xladder:num_taps=6"}
    assert best_rate(GRID, rows[:1], "xladder", "docstring") in rates_of("xladder", 2)
    assert low < high


DAMAGES = {
    "cell": (lambda line: line.replace("3.0M,", "", 1), "expected .* values"),
    "number": (lambda line: line.replace(",1e-03,", ",fast,").replace(",0.001,", ",fast,"), "learning_rate"),
    "negative": (lambda line: line.replace(",100,", ",-100,", 1), "tokens"),
    "curve": (lambda line: line.replace("[[0, 5.0]", "[[0, 5.0", 1), "curve"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_named(tmp_path: Path, damage: str) -> None:
    """In the middle of the file it is an error with its line; only a last line without an end is cut off."""
    path, (change, message) = tmp_path / "rows.csv", DAMAGES[damage]
    for seed in range(3):
        append_row(path, _row(Run("ladder", "3.0M", "docstring", "steps=3", 1e-3, seed), 4.0))
    header, first, *rest = path.read_text().splitlines()
    damaged = change(first)
    assert damaged != first
    path.write_text("\n".join([header, damaged, *rest]) + "\n")
    assert not drop_torn_line(path)
    with pytest.raises(ValueError, match=rf"line 2: .*{message}"):
        read_rows(path)
    assert command_line.main(["quality", "--out", str(path)]) == command.EXIT_USAGE


def test_a_file_of_other_columns_and_a_row_that_is_there_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append_row(path, _row(Run("ladder", "3.0M", "docstring", "steps=3", 1e-3, 0), 4.0))
    text = path.read_text()
    path.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(ValueError, match=r"line 3: .*there already"):
        read_rows(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the header"):
        read_rows(path)


@pytest.mark.parametrize(("coefficient", "slope", "floor"), [(1e5, 0.4, 2.0), (30.0, 0.1, 0.5), (1e12, 1.0, 1.5)])
def test_a_fit_finds_what_the_losses_were_made_of(coefficient: float, slope: float, floor: float) -> None:
    flops = np.repeat(np.array([0.5, 1, 2, 4, 8]) * 1e12, 3)
    losses = coefficient / flops**slope + floor
    found = fit(flops, losses)
    assert (found.coefficient, found.slope, found.floor) == pytest.approx((coefficient, slope, floor), rel=1e-3)
    noisy = losses + np.random.default_rng(0).normal(0, 0.003, len(flops))
    around = intervals(flops, noisy)
    assert around["slope"].low < slope < around["slope"].high
    assert around["slope"].high - around["slope"].low < slope


def test_a_fit_needs_three_budgets_and_finite_losses() -> None:
    for flops, losses in (([1e9, 2e9], [3.0, 2.0]), ([1e9, 2e9, 4e9], [3.0, math.inf, 2.0]), ([0, 1, 2], [3, 2, 1])):
        with pytest.raises(ValueError, match="expected"):
            fit(flops, losses)
    with pytest.raises(ValueError, match="more than 3"):
        intervals([1e9, 2e9, 4e9], [3.0, 2.5, 2.0])


def test_cells_and_figures_of_a_whole_grid(tmp_path: Path) -> None:
    """Synthetic rows of every stage: all figures are drawn, and the fit at the best size finds what made the rows."""
    rows: list[Row] = []
    while runs := next_runs(GRID, rows):
        for run in runs:
            flops = float(run.budget[6:]) if run.budget.startswith("flops") else 3e9
            loss = 2 + 4e3 / flops**0.4 + 0.01 * run.seed + (run.size == "0.8M") * 0.5
            accuracy = {"hops=1": 0.5, "hops=2": 0.2} if run.task == "hops" else {}
            seconds = None if len(runs) > 1 else 2.0
            rows.append(_row(run, loss, flops, accuracy=accuracy, seconds=seconds))
    found = {(cell.method, cell.size, cell.task, cell.budget): cell for cell in cells(rows)}
    middle = found["ladder", "3.0M", "docstring", GRID.middle]
    assert (middle.seeds, middle.seconds) == (GRID.seeds, 2.0)
    scaling = {(one.method, one.task): one for one in scalings(rows)}["ladder", "docstring"]
    assert set(scaling.sizes) == {"3.0M", "0.8M"} and max(scaling.losses) < 3.2
    assert scaling.fit.slope == pytest.approx(0.4, rel=0.2)
    assert COLORS.keys() == METHODS.keys()
    drawn = [path.name for path in command.draw_all(rows, tmp_path)]
    assert drawn == [f"quality_{name}.png" for name in ("cost", "isoflop", "delta", "accuracy")]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in drawn)
