"""Data that is read while training: a stream of records, tokenized on the fly."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from engine.data.dataset import fitted_samples, sample_item
from engine.data.records import DataError, read_stream

logger = logging.getLogger(__name__)

READ_AHEAD = 16
"""Records that are checked and tokenized together."""


class StreamedDataset(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Samples of a stream of records, as `engine.data.dataset.prepare_dataset` would make them of a list.

    An endless one starts over where the stream ends, and tells a shuffled `datasets.IterableDataset` the number of the
    pass. So training is one pass of max_steps for the Trainer, and resuming is exact: it reads the stream from its
    beginning and skips the batches that were trained on, across the borders of passes as well. A shuffle buffer is
    filled again on the way, so nothing of it is lost, as it would be by continuing from the stream's `state_dict()`.
    What that costs is reading and tokenizing the skipped part once more; and a stream that does not give the same
    records every time cannot be resumed exactly.

    A buffer shuffles within its size only: for an exact shuffle write the data to a jsonl file, or load it into a
    `datasets.Dataset`, whose order is drawn over all records.

    Args:
        stream: iterable of records, anew each time it is iterated.
        tokenizer: the backbone's; None where the records hold `input_ids`.
        max_length: longest sample, in tokens.
        vocab_size: rows of the backbone's embedding.
        endless: start over at the end, for training.

    Raises:
        DataError: while iterating, so a malformed record ends training when it is reached; names the record (counted
            from 1 in each pass) and field. An empty stream is one.
    """

    def __init__(
        self,
        stream: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_length: int,
        vocab_size: int,
        endless: bool = False,
    ) -> None:
        self.stream, self.tokenizer, self.endless = stream, tokenizer, endless
        self.max_length, self.vocab_size = max_length, vocab_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        warned = False
        for number in itertools.count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(number)
            sample = None
            for records in read_stream(self.stream, READ_AHEAD):
                for sample in fitted_samples(
                    records, self.tokenizer, max_length=self.max_length, vocab_size=self.vocab_size
                ):
                    if sample.is_cut and not warned:
                        warned = True
                        logger.warning(
                            "stream, record %d: is longer than max_length %d and was cut there, as later ones will be; "
                            "raise it to keep them whole",
                            sample.number,
                            self.max_length,
                        )
                    yield sample_item(sample.number, np.array(sample.ids), np.array(sample.learned))
            if sample is None:
                raise DataError("holds no records", source="stream")
            if not self.endless:
                return
