"""Short documents side by side in rows of nearly equal size, without seeing each other.

Batches of single documents carry as many tokens as their lengths happen to add up to, and a card waits for kernels of a
few hundred rows. Packed, a row (a bin) holds documents of up to max_length tokens together, so that steps are equally
large and about as full as they can be. The collator marks where documents begin; attention, positions and losses are
those of every document alone.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.data.dataset import TokenizedDataset

logger = logging.getLogger(__name__)


class PackedDataset(torch.utils.data.Dataset[list[dict[str, Tensor]]]):
    """Documents of a tokenized data set in bins; a batch size counts bins.

    Item i is the list of the documents in bin i, in their original order: a list, so that a collator that knows nothing
    of documents fails instead of joining them.

    Args:
        documents: what to pack.
        max_length: tokens that fit a bin.
        seed: of the order of the bins, which packing would sort by the length of their longest document.

    Raises:
        ValueError: a document is longer than `max_length`.
    """

    def __init__(self, documents: TokenizedDataset, max_length: int, seed: int = 0) -> None:
        self.documents = documents
        self.max_length = max_length
        bins = best_fit_decreasing(documents.lengths, max_length)
        order = np.random.default_rng(seed).permutation(len(bins))
        self._bins = [bins[place] for place in order]
        logger.info("packed: %s", self.description)

    def __len__(self) -> int:
        return len(self._bins)

    def __getitem__(self, index: int) -> list[dict[str, Tensor]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return [self.documents[document] for document in self._bins[index]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens in each."""
        return np.array([self.documents.lengths[row].sum() for row in self._bins], dtype=np.int64)

    @property
    def longest(self) -> int:
        """Tokens of the fullest row."""
        return int(self.lengths.max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows together."""
        return self.documents.num_tokens

    @property
    def fill(self) -> float:
        """Tokens over places, 1 where every row is full."""
        return self.num_tokens / (len(self) * self.max_length)

    @property
    def description(self) -> str:
        """What was packed into what, as one line for people."""
        rows = f"{len(self):,} rows of {self.max_length:,} tokens"
        return f"{len(self.documents):,} samples in {rows}, {100 * self.fill:.1f}% full"

    def digest(self) -> str:
        """sha256 over the documents and which of them are in which row."""
        places = np.array([place for row in self._bins for place in (len(row), *row)], dtype=np.int64)
        return hashlib.sha256(bytes.fromhex(self.documents.digest()) + places.tobytes()).hexdigest()


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins, the longest first, each where it leaves the least space.

    At most 11/9 of the fewest bins possible, plus 4 (Johnson et al. 1974); on documents far shorter than a bin
    practically the fewest. n log n comparisons: open bins are found by their space, of which there are at most
    `capacity` different ones.

    Args:
        lengths: [n], each in [1, capacity].
        capacity: of a bin.

    Returns:
        The indices in each bin, ascending.

    Raises:
        ValueError: an item does not fit any bin.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > capacity:
        index = int(lengths.argmax())
        raise ValueError(f"document {index} has {lengths[index]} tokens, and a packed row takes {capacity}; cut it")
    bins: list[list[int]] = []
    spaces: list[int] = []  # of open bins, ascending, each once
    open_bins: dict[int, list[int]] = {}
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            space, number = capacity, len(bins)
            bins.append([])
        else:
            space = spaces[place]
            number = open_bins[space].pop()
            if not open_bins[space]:
                del spaces[place], open_bins[space]
        bins[number].append(index)
        if space > length:
            _put(spaces, open_bins, space - length, number)
    return [sorted(members) for members in bins]


def _put(spaces: list[int], open_bins: dict[int, list[int]], space: int, number: int) -> None:
    if space not in open_bins:
        open_bins[space] = []
        spaces.insert(bisect_left(spaces, space), space)
    open_bins[space].append(number)
