"""Packing against its definition: every document once, in bins as full as they can be, alone in what it sees."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladders import ladder_model, tiny_backbone, trained
from samples import prepared
from test_trainer import arguments, side_weights

from engine import LadderTrainer
from engine.data.collator import Collator
from engine.data.dataset import TokenizedDataset
from engine.data.packing import PackedDataset, best_fit_decreasing
from engine.data.records import DataError
from engine.training.preflight import longest_sample

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = settings(deadline=None, max_examples=150)
TEXTS = [{"text": "ab" * (1 + (7 * i) % 11)} for i in range(24)]


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, in n^2: the longest first, into the fullest bin that takes it, of equals the latest opened."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [members for members in bins if sum(members) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """The optimum, by trying every partition of a few items."""
    for count in range(1, len(lengths) + 1):
        for places in itertools.product(range(count), repeat=len(lengths)):
            loads = [0] * count
            for place, length in zip(places, lengths, strict=True):
                loads[place] += length
            if max(loads) <= capacity:
                return count
    return 0


@PROPERTY
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=40))))
def test_every_document_once_and_no_bin_overfull(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in members) for members in bins]
    assert all(load <= capacity for load in loads) and all(members == sorted(members) for members in bins)
    # No two bins could be one, and as many bins as by the definition.
    assert all(a + b > capacity for a, b in itertools.combinations(loads, 2))
    assert len(bins) == len(naive_best_fit(lengths, capacity)) >= math.ceil(sum(lengths) / capacity)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_close_to_the_fewest_bins_possible(lengths: list[int]) -> None:
    fewest = fewest_bins(lengths, 12)
    assert fewest <= len(best_fit_decreasing(lengths, 12)) <= fewest + fewest // 2


def test_many_short_documents_leave_almost_nothing_empty() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int).clip(2, 2048)
    bins = best_fit_decreasing(lengths, 2048)
    assert len(bins) == math.ceil(lengths.sum() / 2048)


def test_a_document_that_fits_no_bin() -> None:
    with pytest.raises(ValueError, match="document 1 has 9 tokens, and a packed row takes 8; cut it"):
        best_fit_decreasing([3, 9], 8)


def test_rows_hold_whole_samples_in_a_seeded_order(caplog: pytest.LogCaptureFixture) -> None:
    data = prepared(TEXTS)
    with caplog.at_level(logging.INFO):
        packed = PackedDataset(data, 64, seed=1)
    rows = [packed[i] for i in range(len(packed))]
    numbers = [[sample["sample_id"] for sample in row] for row in rows]
    assert sorted(itertools.chain(*numbers)) == list(range(1, 25))
    assert [sum(len(sample["input_ids"]) for sample in row) for row in rows] == packed.lengths.tolist()
    assert packed.longest == packed.lengths.max() and packed.num_tokens == packed.lengths.sum() == data.num_tokens
    assert packed.fill == data.num_tokens / (64 * len(packed))
    assert f"24 samples in {len(packed)} rows of 64 tokens, {100 * packed.fill:.1f}% full" in caplog.text
    assert packed[-1][0]["sample_id"] == rows[-1][0]["sample_id"]
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_digest_tells_order_and_content_apart() -> None:
    packed = PackedDataset(prepared(TEXTS), 64, seed=1)
    assert packed.digest() == PackedDataset(prepared(TEXTS), 64, seed=1).digest()
    others = [PackedDataset(prepared(TEXTS), 64, seed=2), PackedDataset(prepared(TEXTS), 80, seed=1)]
    others.append(PackedDataset(prepared([*TEXTS[:-1], {"text": "x"}]), 64, seed=1))
    assert len({packed.digest(), *(other.digest() for other in others)}) == 4


def documents_of(data: TokenizedDataset) -> list[dict[str, Any]]:
    return [data[i] for i in range(len(data))]


def without_ids(batch: dict[str, Any]) -> dict[str, Any]:
    batch.pop("sample_ids")
    return batch


def test_packed_loss_and_gradients_are_those_of_the_documents_alone() -> None:
    """fp64: nothing of one document reaches another, forward or backward."""
    model = trained(ladder_model("xladder", tiny_backbone(dtype=torch.float64, quantize=False)).double())
    data = prepared([{"prompt": "q" * (1 + i), "completion": "ab" * (5 - i)} for i in range(5)])
    packed = PackedDataset(data, 64)
    assert len(packed) < len(data)
    losses = []
    for row in packed:
        model.zero_grad()
        together = model(**without_ids(Collator()([row])), num_items_in_batch=1).loss
        together.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        alone = [model(**without_ids(Collator()([document])), num_items_in_batch=1).loss for document in row]
        torch.stack(alone).sum().backward()
        losses.append((together.item(), sum(loss.item() for loss in alone)))
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9, msg=name)
    for together, alone in losses:
        assert together == pytest.approx(alone, rel=1e-9)


def test_collator_joins_the_documents_of_rows() -> None:
    data = documents_of(prepared(TEXTS[:4]))
    nested, flat = Collator()([data[:3], data[3:]]), Collator()(data)
    assert nested.keys() == flat.keys() and nested["sample_ids"] == [1, 2, 3, 4]
    assert all(torch.equal(torch.as_tensor(nested[name]), torch.as_tensor(flat[name])) for name in flat)
    with pytest.raises(ValueError, match="pad_to cannot make one"):
        Collator(pad_to=64)([data])


def test_training_on_packed_rows(tmp_path: Path) -> None:
    """A batch size counts rows; a run resumed in its second pass over the data ends in the same bits."""

    def trainer(**settings: Any) -> LadderTrainer:
        settings = {"packing": True, "max_steps": 7, "per_device_train_batch_size": 2, "save_steps": 1} | settings
        args = arguments(tmp_path, save_strategy="steps", save_total_limit=9, **settings)
        return LadderTrainer(ladder_model(), args, train_dataset=TEXTS, eval_dataset=TEXTS[:3])

    whole = trainer()
    packed = whole.train_dataset
    assert isinstance(packed, PackedDataset) and packed.max_length == 64
    assert len(packed) == math.ceil(packed.num_tokens / 64) == len(whole.get_train_dataloader()) * 2 - len(packed) % 2
    assert longest_sample(whole) == packed.longest
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected = side_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in side_weights(resumed.model).items())
    assert isinstance(whole.eval_dataset, TokenizedDataset)


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

    with pytest.raises(ValueError, match="packing=True needs the length of every sample, which a Samples does not"):
        LadderTrainer(ladder_model(), arguments(tmp_path, packing=True), train_dataset=Samples())
    with pytest.raises(ValueError, match="leave out cuda_graph"):
        arguments(tmp_path, packing=True, cuda_graph=True)
    with pytest.raises(DataError, match="record 1, field `text`"):
        LadderTrainer(ladder_model(), arguments(tmp_path, packing=True), train_dataset=[{"text": ""}])
