"""Training passes as replays, on a CPU through a tape of operations: the same bits, whatever happens in between."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_tape import Dispatched, TapeGraphs
from ladders import ladder_model, trained
from torch import Tensor
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from engine import LadderArguments, LadderForCausalLM, LadderTrainer
from engine.data.collator import Collator
from engine.training import step_graph
from engine.training.step_graph import EAGER_PASSES, StepGraphs, check_arguments

FIXED = Collator(pad_to=12, row_bucket=48)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Samples(torch.utils.data.Dataset):
    """Random documents of 4 to 11 tokens, half of whose tokens are supervised; the last ones repeat their lengths."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.samples = []
        for index in range(count):
            input_ids = torch.randint(0, 256, (4 + 5 * index % 8,), generator=generator)
            labels = input_ids.clone()
            labels[: len(labels) // 2] = -100
            self.samples.append({"input_ids": input_ids, "labels": labels})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


class EagerTrainer(LadderTrainer):
    """The trainer without graphs, on the operations that the tape has."""

    def training_step(self, *args: Any) -> Tensor:
        with Dispatched():
            return super().training_step(*args)


def new_model(preset: str = "ladder") -> LadderForCausalLM:
    return trained(ladder_model(preset)).train()


def trainer(folder: Path, graphed: bool, collator: Collator = FIXED, **overrides: Any) -> LadderTrainer:
    """14 samples in batches of 4: the last batch of an epoch has two."""
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "log_level": "error",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = LadderArguments(output_dir=str(folder), **(settings | overrides))
    kind = LadderTrainer if graphed else EagerTrainer
    made = kind(new_model(), args, collator, Samples(14), Samples(7))
    made.group_tokens = 1  # graphs are of single micro-batches; a group's products round differently
    if graphed:
        made.step_graphs = StepGraphs(made.model, TapeGraphs())
    return made


def maker_of(made: LadderTrainer) -> TapeGraphs:
    assert made.step_graphs is not None
    return made.step_graphs._maker


def assert_same_run(one: LadderTrainer, other: LadderTrainer) -> None:
    """Every logged loss, gradient norm and evaluation, and all trained parameters, bit for bit."""

    def numbers(made: LadderTrainer) -> list[dict[str, float]]:
        wanted = ("loss", "grad_norm", "eval_loss")
        return [{name: line[name] for name in wanted if name in line} for line in made.state.log_history]

    assert numbers(one) == numbers(other)
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_graphed_run_is_the_eager_run(tmp_path: Path, accumulation: int) -> None:
    """Three epochs, whose last batch is smaller and gets its own graph, and whose last step may have fewer batches."""
    runs = []
    for graphed in (False, True):
        made = trainer(tmp_path, graphed, gradient_accumulation_steps=accumulation, num_train_epochs=3, max_steps=-1)
        made.train()
        runs.append(made)
    assert_same_run(*runs)
    maker = maker_of(runs[1])
    assert len(maker.tapes) == 2 and maker.runs == 2 * EAGER_PASSES
    assert maker.replays == 3 * 4 - 2 * EAGER_PASSES
    assert runs[0].clock.tokens == runs[1].clock.tokens


def test_evaluation_between_steps_and_resume_change_nothing(tmp_path: Path) -> None:
    """Evaluation needs more scratch memory than a pass; the second half is another process's, from a checkpoint."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 7,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 7,
    }
    whole = trainer(tmp_path / "eager", False, **options)
    whole.train()
    first = trainer(tmp_path / "graphed", True, **options)
    stop = _StopAt(4)
    first.add_callback(stop)
    first.train()
    assert maker_of(first).replays > 0 and stop.seen == [True] * 4
    second = trainer(tmp_path / "graphed", True, **options)
    second.train(resume_from_checkpoint=True)
    assert maker_of(second).replays > 0
    assert_same_run(whole, second)


class _StopAt(TrainerCallback):
    """Ends training at a step; sees at every one whether the model was in training mode."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(kwargs["model"].training)
        control.should_training_stop = state.global_step >= self.step


def test_ragged_batches_run_without_graphs_and_say_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graph, "REMEMBERED_SHAPES", 4)
    runs = []
    for graphed in (False, True):
        made = trainer(tmp_path, graphed, Collator())
        with caplog.at_level(logging.WARNING, "engine.training.step_graph"):
            made.train()
        runs.append(made)
    assert_same_run(*runs)
    assert len(runs[1].step_graphs._passes) <= 4
    warnings = [record.getMessage() for record in caplog.records if record.name == "engine.training.step_graph"]
    assert len(warnings) == 1
    assert "data_collator=Collator(pad_to=max_length, row_bucket=max_length)" in warnings[0]


def batch_of(*lengths: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return Collator()([{"input_ids": torch.randint(0, 256, (length,), generator=generator)} for length in lengths])


def one_pass(model: LadderForCausalLM) -> Any:
    def training_pass(batch: Any) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss

    return training_pass


def expected_pass(model: LadderForCausalLM, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    with Dispatched():
        loss = model(**batch).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("preset", ["xladder", "lst", "qst", "rejoin"])
def test_replays_follow_inputs_and_parameters(preset: str) -> None:
    """Other tokens, other weights, other supervised rows within the bucket."""
    model = new_model(preset)
    graphs = StepGraphs(model, TapeGraphs())
    for seed in range(EAGER_PASSES + 3):
        batch = batch_of(9, 6, seed=seed)
        batch["supervised_targets"][: seed + 1] = -100
        trained(model, seed=seed)
        expected_loss, expected = expected_pass(model, batch)
        assert torch.equal(graphs(one_pass(model), batch), expected_loss)
        for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient), name
        model.zero_grad()
    assert graphs._maker.replays == 3


def test_another_layout_of_as_many_tokens_is_another_shape() -> None:
    """Every tensor has the shape of before; only the host's document lengths differ."""
    model = new_model()
    graphs = StepGraphs(model, TapeGraphs())
    for lengths in ((9, 6), (7, 8)):
        batch = batch_of(*lengths)
        expected_loss, _ = expected_pass(model, batch)
        for _ in range(EAGER_PASSES + 1):
            assert torch.equal(graphs(one_pass(model), batch), expected_loss)
    assert len(graphs._captured) == 2


@pytest.mark.parametrize("how", ["none", "zero", "replaced", "kept"])
def test_gradients_are_added_to_what_is_there(how: str) -> None:
    """After a replay and whatever somebody did to `.grad`, the next pass adds to what is there, as autograd does."""
    model, batch = new_model(), batch_of(8)
    graphs = StepGraphs(model, TapeGraphs())
    for _ in range(EAGER_PASSES + 1):
        model.zero_grad()
        graphs(one_pass(model), batch)
    _, gradients = expected_pass(model, batch)
    start = {"none": 0, "zero": 0, "replaced": 3, "kept": 1}[how]
    if how in ("none", "zero"):
        model.zero_grad(set_to_none=how == "none")
    if how == "replaced":
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = 3 * gradient
    loss = graphs(one_pass(model), batch)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, start * gradient + gradient)
    graphs(one_pass(model), batch_of(8, seed=1))
    assert torch.equal(loss, expected_pass(model, batch)[0]), "a loss outlives the next replay"


def test_moved_and_frozen_parameters_get_another_graph() -> None:
    model, batch = new_model(), batch_of(8)
    graphs = StepGraphs(model, TapeGraphs())

    def passes(count: int) -> None:
        for _ in range(count):
            model.zero_grad()
            graphs(one_pass(model), batch)

    passes(EAGER_PASSES + 1)
    side_up = model.side_network.side_up
    side_up.data = 2 * side_up.data  # as a move to another device and back does
    passes(1)
    assert torch.equal(side_up.grad, expected_pass(model, batch)[1][[*model.parameters()].index(side_up)])
    passes(EAGER_PASSES)
    assert len(graphs._maker.tapes) == 2
    side_up.requires_grad_(False)
    passes(EAGER_PASSES + 2)
    assert side_up.grad is None and len(graphs._maker.tapes) == 3
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_graphs_and_their_memory_are_bounded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many graphs, whose own tensors are the batch and the loss; the gradients exist once."""
    monkeypatch.setattr(step_graph, "MAX_GRAPHS", 2)
    model = new_model()
    graphs = StepGraphs(model, TapeGraphs())
    for length in range(4, 8):
        for _ in range(EAGER_PASSES + 1):
            graphs(one_pass(model), batch_of(length))
    assert len(graphs._captured) == len(graphs._maker.tapes) == 2
    assert [record.name for record in caplog.records] == ["engine.training.step_graph"]
    trainable = {id(parameter): parameter.grad for parameter in model.parameters()}
    assert {id(parameter): gradient for parameter, gradient in graphs._gradients.items()}.keys() == trainable.keys()
    assert all(graphs._gradients[parameter] is parameter.grad for parameter in model.parameters())
    for captured in graphs._captured.values():
        batch = batch_of(captured.inputs["input_ids"].numel())
        expected = {name: value.shape for name, value in batch.items() if isinstance(value, Tensor)}
        assert {name: value.shape for name, value in captured.inputs.items()} == expected


def test_memory_that_a_graph_knows_outlives_its_owner() -> None:
    """A larger pass replaces scratch memory, and a moved model its parameters: the old ones must not be given away."""
    model = new_model()
    graphs = StepGraphs(model, TapeGraphs())
    for _ in range(EAGER_PASSES + 1):
        graphs(one_pass(model), batch_of(8))
    graphs._maker.tapes.clear()
    (captured,) = graphs._captured.values()
    buffers = model.scratch()
    assert buffers
    alive = [weakref.ref(buffer) for buffer in buffers]
    del buffers
    model.model._shared.workspace.clear()
    model.backbone._workspace.clear()
    gc.collect()
    assert all(reference() is not None for reference in alive)
    pointers = {tensor.data_ptr() for tensor in captured.kept}
    assert all(parameter.data_ptr() in pointers for parameter in model.parameters())


def test_a_pass_that_reads_the_device_is_reported() -> None:
    model = new_model()
    graphs = StepGraphs(model, TapeGraphs())

    def curious(batch: Any) -> Tensor:
        loss = one_pass(model)(batch)
        assert loss.item() > 0
        return loss

    for _ in range(EAGER_PASSES):
        graphs(curious, batch_of(8))
    before = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"cannot be captured.*Leave cuda_graph out.*not permitted when stream"):
        graphs(curious, batch_of(8))
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_lengths": None}, "a batch has no document_lengths, so that the host would have to look into it"),
        ({"supervised_rows": None, "supervised_targets": None}, "no supervised_rows, supervised_targets"),
        ({"attention_mask": torch.ones(1, 8)}, "a batch has an attention_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, r"cu_seq_lens_q must be int32, got torch\.int64"),
        ({"labels": torch.empty(1, 8, device="meta")}, "labels must be on cpu, as the model is, got meta"),
    ],
)
def test_batches_that_the_host_would_read_are_refused(change: dict[str, Any], message: str) -> None:
    model = new_model()
    with pytest.raises(ValueError, match=message):
        StepGraphs(model, TapeGraphs())(one_pass(model), batch_of(8) | change)


def test_hooks_on_gradients_are_refused() -> None:
    """LOMO and layer-wise optimizers step in them, with the learning rate of the capture for ever."""
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        model = new_model()
        getattr(model.side_network.side_up, register)(lambda *_: None)
        with pytest.raises(ValueError, match="a parameter has hooks on its gradient, which a graph cannot call"):
            StepGraphs(model, TapeGraphs())(one_pass(model), batch_of(8))


def test_arguments_that_cannot_be_captured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cuda_graph=True needs an NVIDIA GPU, this run is on cpu: leave it out"):
        trainer(tmp_path, False, cuda_graph=True)
    good = {
        "parallel_mode": ParallelMode.NOT_PARALLEL,
        "world_size": 1,
        "device": torch.device("cuda"),
        "torch_empty_cache_steps": None,
        "torch_compile": False,
    }
    check_arguments(SimpleNamespace(**good))
    for change, message in (
        ({"parallel_mode": ParallelMode.DISTRIBUTED, "world_size": 4}, "one of 4 started together: start it without"),
        ({"torch_empty_cache_steps": 10}, "torch_empty_cache_steps is set"),
        ({"torch_compile": True}, "torch_compile is set"),
    ):
        with pytest.raises(ValueError, match=message):
            check_arguments(SimpleNamespace(**(good | change)))
    assert not LadderArguments(str(tmp_path), cuda_graph=True, use_cpu=True).logging_nan_inf_filter
