"""Streams: the same samples and messages as from a list, and a resumed run that ends in the same bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from ladders import ladder_model
from samples import CHAT, VOCAB_SIZE, learned_text, prepared, write
from test_trainer import StopAt, arguments, side_weights
from torch.utils.data import IterableDataset

from engine import LadderTrainer
from engine.data.records import DataError
from engine.data.streaming import StreamedDataset

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [{"text": "ab" * (1 + (7 * i) % 11) + str(i)} for i in range(11)]


class Stream(IterableDataset):
    """A torch stream of records, which remembers the passes it was told of."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.passes: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.passes.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def streamed(rows: Any, max_length: int = 64, **options: Any) -> StreamedDataset:
    stream = rows if isinstance(rows, IterableDataset) else Stream(rows)
    options = {"tokenizer": tiny_tokenizer(), "vocab_size": VOCAB_SIZE} | options
    return StreamedDataset(stream, max_length=max_length, **options)


@pytest.mark.parametrize(
    "rows",
    [
        TEXTS * 4,
        [{"prompt": "q" * i, "completion": "ab"} for i in range(5)],
        [CHAT] * 3,
        [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [1, 2]}],
    ],
    ids=["text", "prompt", "messages", "input_ids"],
)
def test_samples_are_those_of_a_list(rows: list[dict[str, Any]]) -> None:
    """Long texts are split, records numbered, chunks of reading leave no trace."""
    expected = prepared(rows, max_length=8)
    samples = list(streamed(rows, max_length=8))
    assert len(samples) == len(expected)
    for sample, wanted in zip(samples, expected, strict=True):
        assert sample.keys() == wanted.keys() and sample["sample_id"] == wanted["sample_id"]
        assert all(torch.equal(sample[name], wanted[name]) for name in ("input_ids", "labels"))


def test_an_endless_stream_starts_over_and_tells_the_pass() -> None:
    stream = Stream(TEXTS)
    numbers = [sample["sample_id"] for sample in islice(streamed(stream, endless=True), 25)]
    assert numbers == [*range(1, 12), *range(1, 12), 1, 2, 3]
    assert stream.passes == [0, 1, 2]
    assert len(list(streamed(stream))) == 11


def test_errors_name_the_record() -> None:
    late = [*TEXTS * 2, {"text": 3}]
    with pytest.raises(DataError) as caught:
        list(streamed(late))
    assert str(caught.value) == "stream, record 23, field `text`: expected text, got a number\n    found: 3"
    with pytest.raises(DataError, match=r"record 1: expected the fields .*; got `body`"):
        list(streamed([{"body": "x"}]))
    with pytest.raises(DataError, match="record 2: token id 260 is outside the backbone's embedding of 258 rows"):
        list(streamed([TEXTS[0], {"text": "<|assistant|>"}], vocab_size=258))
    with pytest.raises(DataError, match="record 2, field `prompt`: the prompt alone takes 10 tokens"):
        list(streamed([{"prompt": "p", "completion": "c"}, {"prompt": "p" * 10, "completion": "c"}], max_length=10))
    with pytest.raises(DataError, match=r"^stream: holds no records$"):
        next(iter(streamed([], endless=True)))
    with pytest.raises(DataError, match="holds `text`, and the backbone has no tokenizer"):
        next(iter(streamed(TEXTS, tokenizer=None)))


def test_a_stream_that_breaks_off_says_where() -> None:
    class Broken(Stream):
        def __iter__(self) -> Iterator[Any]:
            yield from self.rows
            raise OSError("connection lost")

    with pytest.raises(DataError, match=r"^stream, record 12: could not be read \(OSError: connection lost\)$"):
        list(streamed(Broken(TEXTS)))


def test_cut_samples_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        samples = list(streamed([{"prompt": "p", "completion": "y" * 20}] * 3, max_length=8))
    assert [learned_text(sample) for sample in samples] == ["y" * 7] * 3
    assert caplog.text.count("record 1: is longer than max_length 8 and was cut") == 1 == len(caplog.records)


def shuffled_stream(tmp_path: Path) -> Any:
    """A jsonl file read by `datasets` through a shuffle buffer smaller than the data."""
    datasets = pytest.importorskip("datasets")
    file = str(write(tmp_path, *TEXTS))
    stream = datasets.load_dataset("json", data_files=file, split="train", streaming=True, cache_dir=str(tmp_path))
    return stream.shuffle(seed=5, buffer_size=4)


def test_resume_is_exact_across_passes_and_through_a_shuffle_buffer(tmp_path: Path) -> None:
    """11 records, 4 a step: passes end within a step and within a micro-batch, and step 5 is in the second one."""

    def train(folder: str, steps: int, **options: Any) -> LadderTrainer:
        args = arguments(
            tmp_path / folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=1,
            lr_scheduler_type="constant",
        )
        callbacks = [StopAt(5)] if options.pop("stopped", False) else None
        trainer = LadderTrainer(ladder_model(), args, train_dataset=shuffled_stream(tmp_path), callbacks=callbacks)
        trainer.train(**options)
        return trainer

    whole = train("whole", 7)
    train("parts", 7, stopped=True)
    resumed = train("parts", 7, resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    expected = side_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in side_weights(resumed.model).items())


def test_passes_of_a_shuffled_stream_hold_every_record_in_a_new_order(tmp_path: Path) -> None:
    stream = shuffled_stream(tmp_path)
    texts = [bytes(item["input_ids"][:-1].tolist()) for item in islice(streamed(stream, endless=True), 22)]
    assert sorted(texts[:11]) == sorted(texts[11:]) and texts[:11] != texts[11:]


def test_training_and_evaluating_streams(tmp_path: Path) -> None:
    """The same losses as from lists, in training order and over the whole held-out stream, repeatedly."""
    args = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    losses = []
    for data in (Stream(TEXTS), prepared(TEXTS * 2)):
        ordered = arguments(tmp_path, train_sampling_strategy="sequential", **args)
        trainer = LadderTrainer(ladder_model(), ordered, train_dataset=data, eval_dataset=type_of(data, TEXTS[:5]))
        trainer.train()
        logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        losses.append((*logged, trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]


def type_of(data: Any, rows: list[Any]) -> Any:
    return Stream(rows) if isinstance(data, Stream) else rows


def test_what_streams_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        LadderTrainer(ladder_model(), arguments(tmp_path, max_steps=-1), train_dataset=Stream(TEXTS))
    with pytest.raises(ValueError, match="dataloader_num_workers is 2, and each would read the whole stream: set it"):
        LadderTrainer(ladder_model(), arguments(tmp_path, dataloader_num_workers=2), train_dataset=Stream(TEXTS))
    with pytest.raises(ValueError, match="packing=True needs the length of every sample, which a StreamedDataset"):
        LadderTrainer(ladder_model(), arguments(tmp_path, packing=True), train_dataset=Stream(TEXTS))
