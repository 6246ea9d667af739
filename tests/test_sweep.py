"""Several side networks on one backbone pass: the bits of each alone, one pass for all, and each with its own end."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import batch, ladder_model
from sweeps import NAMES, ROWS, SWEEP, TEXTS, StopAt, alone, arguments, assert_same_bits, trainer
from torch import Tensor
from transformers import TrainerCallback

from engine import LadderConfig, LadderForCausalLM, LadderTrainer
from engine.backbone import Backbone
from engine.model.tap_store import _HostCopy
from engine.training.guards import DivergedError
from engine.training.lockstep import Lockstep
from engine.training.out_of_memory import TrainingMemoryError
from engine.training.sweep_entries import cartesian, sweep_entries

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass of the backbone, in order."""
    seen: list[int] = []
    stock = Backbone.hidden_states

    def counted(self: Backbone, input_ids: Tensor, *rest: Any) -> Iterator[tuple[int, Tensor]]:
        seen.append(len(input_ids))
        return stock(self, input_ids, *rest)

    monkeypatch.setattr(Backbone, "hidden_states", counted)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_tokens": 1, "taps": "host"},
        {"data": TEXTS, "packing": True, "max_length": 48, "per_device_train_batch_size": 1, "longest_first": True},
    ],
    ids=["grouped", "one by one, taps on the host", "packed"],
)
def test_every_member_has_the_bits_of_training_it_alone(
    tmp_path: Path, passes: list[int], options: dict[str, Any]
) -> None:
    made = trainer(tmp_path / "sweep", **options)
    torch.manual_seed(5)
    outputs = made.train()
    of_all = list(passes)
    assert list(outputs) == NAMES and [result.name for result in made.sweep.results] == NAMES
    for number, member in enumerate(made.sweep.members):
        passes.clear()
        single = alone(tmp_path / "alone", number, **options)
        torch.manual_seed(5)
        single.train()
        assert passes == of_all, "one pass serves all members"
        assert_same_bits(member, single)
        lines = [json.loads(line) for line in (tmp_path / "sweep" / NAMES[number] / "metrics.jsonl").open()]
        assert [line["step"] for line in lines] == [line["step"] for line in single.state.log_history]


def test_what_a_sweep_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, disable_tqdm=False)
    first = made.model
    assert first is made.sweep.members[0].model and made.sweep.best is None
    made.train()
    result = json.loads((tmp_path / "sweep.json").read_text())
    losses = {row["name"]: row["eval_loss"] for row in result["members"]}
    assert list(losses) == NAMES and result["best"] == min(losses, key=lambda name: losses[name]) != "base"
    best = made.sweep.members[NAMES.index(result["best"])]
    assert made.model is best.model and made.evaluate()["eval_loss"] == pytest.approx(losses[result["best"]])
    printed = capsys.readouterr().out
    assert "Memory plan of 4 side networks" in printed and f"\n*  {result['best']}" in printed
    assert printed.count("Memory plan") == 1 and f"{NAMES[2]}: {{'loss'" in printed
    loaded = LadderForCausalLM.from_pretrained(tmp_path / NAMES[2], backbone=first.backbone)
    for name, weight in made.sweep.members[2].model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_hidden_states_are_kept_once_and_a_member_frees_its_own() -> None:
    first = ladder_model()
    models = [first, first.beside(LadderConfig.preset("xladder", reduction_factor=2)), first.beside(LadderConfig())]
    ids, width = batch(1, 40), first.backbone.config.hidden_size
    kept: dict[int, int] = {}
    freed: list[bool] = []
    states: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == (40, width) and not tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = kept.get(tensor.untyped_storage().data_ptr(), 0) + 1
        return tensor

    def step(model: LadderForCausalLM) -> Callable[[], None]:
        def run() -> None:
            freed.extend(state() is None for state in states)
            passed = model.run_ahead([{"input_ids": ids}])
            freed.extend(state() is None for state in states)
            states.append(weakref.ref(passed[0][1]))
            loss = model(input_ids=ids, labels=ids, passed=passed.pop()).loss
            loss.backward()
            del loss
            gc.collect()

        return run

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outcomes = Lockstep(first.model).run([step(model) for model in models])
    assert all(outcome.error is None for outcome in outcomes)
    layers = first.backbone.config.num_layers
    assert len(kept) == layers and sum(kept.values()) == layers + models[1].side_network.num_side_layers // 2 + layers
    assert freed == [True, True, True], "the states of those before, at each turn after the pass"


def test_hidden_states_on_the_host_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, ids = ladder_model(), batch(1, 30)
    models = [first, first.beside(LadderConfig.preset("qst", reduction_factor=4)), first.beside(LadderConfig())]
    copies: list[int] = []
    stock = _HostCopy.__init__

    def counted(self: _HostCopy, tensor: Tensor, before: Any) -> None:
        copies.append(len(tensor))
        stock(self, tensor, before)

    monkeypatch.setattr(_HostCopy, "__init__", counted)
    gradients: list[dict[str, Tensor | None]] = []
    for policy in ("device", "host"):
        for model in models:
            model.zero_grad()
            model.side_network.tap_policy = policy
        jobs = [lambda model=model: model(input_ids=ids, labels=ids).loss.backward() for model in models]
        assert all(outcome.error is None for outcome in Lockstep(first.model).run(jobs))
        gradients.append({f"{n}.{k}": p.grad for n, model in enumerate(models) for k, p in model.named_parameters()})
    assert len(copies) == first.backbone.config.num_layers + 1, "every block and, for qst, the embeddings"
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items() if value is not None)


def test_one_stops_early_and_the_others_go_on(tmp_path: Path, passes: list[int]) -> None:
    made = trainer(tmp_path / "sweep", callbacks=[StopAt(1, 3e-2)])
    made.train()
    assert [member.state.global_step for member in made.sweep.members] == [4, 1, 4, 4]
    assert made.sweep.results[1].eval_loss is not None, "it was evaluated where it stopped"
    steps, whole_set, of_one = 4, 2, 1
    assert len(passes) == steps + whole_set + of_one
    for number in (0, 2):
        single = alone(tmp_path / "alone", number)
        single.train()
        assert_same_bits(made.sweep.members[number], single)


def test_one_diverges_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path / "sweep", [SWEEP[0], {"learning_rate": 1e39}, SWEEP[2]], max_skipped_steps=1, max_steps=5)
    outputs = made.train()
    assert list(outputs) == [NAMES[0], NAMES[2]]
    failed = made.sweep.results[1]
    assert failed.error.startswith("DivergedError: 1 steps in a row") and failed.steps < 5
    assert "member 1-learning_rate=1e+39 ended at step" in caplog.text and "DivergedError" in made.sweep.table()
    single = alone(tmp_path / "alone", 0, max_skipped_steps=1, max_steps=5)
    single.train()
    assert_same_bits(made.sweep.members[0], single)
    with pytest.raises(DivergedError):
        trainer(tmp_path / "all", [{"learning_rate": 1e39}], max_skipped_steps=1).train()


def test_memory_that_runs_out_in_the_pass_is_everyones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    made = trainer(tmp_path, SWEEP[:3])
    monkeypatch.setattr("engine.training.lockstep.run_pass", full)
    with pytest.raises(TrainingMemoryError, match=r"2 of the sweep's 3 networks"):
        made.train()
    assert all(result.error.startswith("TrainingMemoryError") for result in made.sweep.results)


def test_other_errors_are_not_hidden_behind_the_others(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and args.learning_rate == 3e-2:
                raise KeyError("of a callback")

    made = trainer(tmp_path, SWEEP[:2], callbacks=[Broken()])
    with pytest.raises(KeyError, match="of a callback"):
        made.train()
    assert made.sweep.members[0].state.global_step == 4 and (tmp_path / "sweep.json").exists()


def test_other_batches_are_noticed_and_served_one_by_one(caplog: pytest.LogCaptureFixture, passes: list[int]) -> None:
    first = ladder_model()
    models = [first, first.beside(LadderConfig(reduction_factor=4)), first.beside(LadderConfig(reduction_factor=4))]

    def steps(model: LadderForCausalLM, seed: int) -> Callable[[], list[float]]:
        def run() -> list[float]:
            with torch.no_grad():
                before = float(model(input_ids=batch(1, 9), labels=batch(1, 9)).loss)
            losses = [
                model(input_ids=ids, labels=ids).loss.detach()
                for ids in (batch(1, 12, seed=seed + n) for n in range(3))
            ]
            return [before, *map(float, losses)]

        return run

    jobs = [steps(model, seed) for model, seed in zip(models, (0, 0, 7), strict=True)]
    outcomes = Lockstep(first.model).run(jobs)
    assert passes == [9] + 6 * [12]
    assert "1 of 3 trainings of the sweep ask for other batches" in caplog.text and len(caplog.records) == 1
    assert [outcome.value for outcome in outcomes] == [job() for job in jobs]


@pytest.mark.parametrize(
    ("sweep", "options", "message"),
    [
        ([], {}, "expected a list of one mapping per side network"),
        ({"learning_rate": 1e-3}, {}, "expected a list of one mapping"),
        (["learning_rate"], {}, "member 0: expected names and values, got 'learning_rate'"),
        (
            [{}, {"lerning_rate": 1}],
            {},
            r"member 1 \(1-lerning_rate=1\): 'lerning_rate' unknown; members may differ in",
        ),
        ([{"per_device_train_batch_size": 1}], {}, "is the same for all members, which share their batches"),
        ([{"max_steps": 9}], {}, "'max_steps' is the same for all members"),
        ([{"data_seed": 9}], {}, "'data_seed' is the same for all members"),
        ([{"learning_rate": "fast"}], {}, "learning_rate must be a finite number of at least 0, got 'fast'"),
        ([{"weight_decay": float("nan")}], {}, "weight_decay must be a finite number"),
        ([{"lr_scheduler_type": "steep"}], {}, r"member 0 .*: steep is not a valid SchedulerType"),
        ([{"preset": "snake"}], {}, r"member 0 .*: unknown preset 'snake'"),
        ([{"reduction_factor": 0}], {}, "reduction_factor must be an integer from 1"),
        ([{"num_taps": 2}], {}, "num_taps=2 belongs to connection='xladder'"),
        ([{"name": "a"}, {"name": "a"}], {}, "the name 'a' is given twice"),
        ([{"name": "../a"}], {}, "the name becomes a folder: expected letters, digits"),
        ([{"name": "checkpoint-3"}], {}, "not beginning with checkpoint-"),
        ([{"name": "sweep.json"}], {}, "the name becomes a folder"),
        ([{"name": "_training.lock"}], {}, "the name becomes a folder"),
        ([{}], {"taps": "int8"}, "does not support taps='int8'"),
        ([{}], {"auto_find_batch_size": True}, "does not support auto_find_batch_size=True"),
        ([{}], {"report_to": ["wandb"]}, r"does not support report_to=\['wandb'\]"),
    ],
)
def test_what_cannot_be_swept_is_refused(tmp_path: Path, sweep: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep_entries(sweep, LadderConfig(), arguments(tmp_path, **options))


def test_what_members_cannot_share_is_refused(tmp_path: Path) -> None:
    model, args = ladder_model(), arguments(tmp_path, eval_strategy="no")
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="cannot share optimizers: leave that out"):
        LadderTrainer(model, args, train_dataset=ROWS, optimizers=(optimizer, None), sweep=[{}])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter(ROWS)

    with pytest.raises(ValueError, match="needs training data with a length"):
        LadderTrainer(model, args, train_dataset=Stream(), sweep=[{}])


def test_a_preset_leaves_what_was_chosen_beside_it(tmp_path: Path) -> None:
    base = LadderConfig.preset("lst", reduction_factor=8, seed=5)
    entry, other = sweep_entries([{"preset": "xladder", "seed": 6}, {}], base, arguments(tmp_path))
    assert entry.config == LadderConfig.preset("xladder", reduction_factor=8, seed=6) and other.config == base
    assert cartesian({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_a_member_without_a_finite_loss_is_never_the_best(tmp_path: Path) -> None:
    """Its skipped steps are logged with a loss of zero, and its held-out loss is not a number."""
    sweep = [{"name": "sound"}, {"name": "ruined", "learning_rate": 1e39}]
    options = {"max_skipped_steps": 99, "warmup_steps": 0}
    made = trainer(tmp_path / "held-out", sweep, **options)
    made.train()
    sound = made.sweep.members[0]
    assert made.sweep.best is sound and made.model is sound.model
    assert made.sweep.results[1].eval_loss is None and made.sweep.results[1].loss is None
    without = LadderTrainer(
        ladder_model(), arguments(tmp_path / "none", eval_strategy="no", **options), train_dataset=ROWS, sweep=sweep[1:]
    )
    without.train()
    assert without.sweep.best is None


def test_a_sweep_goes_on_from_the_weights_that_it_is_given(tmp_path: Path) -> None:
    """And with what is frozen there; another configuration is another network."""
    model = ladder_model()
    with torch.no_grad():
        model.side_network.side_up.normal_(0, 0.1)
    model.side_network.tap_policy = "none"
    args = arguments(tmp_path)
    sweep: list[dict[str, Any]] = [{}, {"learning_rate": 1e-4}, {"seed": 5}]
    made = LadderTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:5], sweep=sweep)
    same, also, new = (member.model.side_network for member in made.sweep.members)
    for network in (same, also):
        assert network.tap_policy == "none"
        for own, given in zip(network.parameters(), model.side_network.parameters(), strict=True):
            assert own is not given and torch.equal(own, given) and own.requires_grad == given.requires_grad
    assert not torch.equal(new.side_up, model.side_network.side_up)


def test_callbacks_are_copied_to_every_member(tmp_path: Path) -> None:
    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps += 1

    made = trainer(tmp_path, SWEEP[:2])
    made.add_callback(Recorder())
    made.train()
    found = [one for member in made.sweep.members for one in member.callback_handler.callbacks]
    assert [one.steps for one in found if isinstance(one, Recorder)] == [4, 4]
    held = Recorder()
    held.lock = threading.Lock()
    with pytest.raises(ValueError, match="a copy of each callback, and Recorder cannot be copied"):
        trainer(tmp_path, SWEEP[:2], callbacks=[held])
