"""Task 1: the one-line docstring of a function, as shipped with the quickstart, through the product's own data path."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.tasks.samples import Sample, TaskData
from engine.data.dataset import prepare_dataset
from engine.quickstart.defaults import QUICKSTART, heldout_path, train_path


def docstring_task(tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """3,430 functions to train on, in the seed's order, and 300 held out; the loss is on the docstring."""
    train = _samples(train_path(), tokenizer)
    random.Random(seed).shuffle(train)
    return TaskData(train, _samples(heldout_path(), tokenizer), [])


def _samples(path: str, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    dataset = prepare_dataset(path, tokenizer, max_length=QUICKSTART.max_length, vocab_size=len(tokenizer))
    return [Sample(item["input_ids"].tolist(), item["labels"].tolist()) for item in dataset]
