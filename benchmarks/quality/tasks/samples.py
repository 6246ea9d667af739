"""What every task gives: training samples, held-out samples, and examples whose answers are right or wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sample:
    """One row: token ids and labels of the same length, unshifted, -100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Example:
    """Right if the greedy continuation of `prompt` begins with `answer`; accuracy is counted by `group`."""

    prompt: list[int]
    answer: list[int]
    group: str


@dataclass(frozen=True)
class TaskData:
    """A task; examples are empty where only the loss counts.

    The seed of a task orders and draws the training part only: what is held out is the same for every seed.
    """

    train: list[Sample]
    heldout: list[Sample]
    examples: list[Example]


def row(pieces: list[tuple[list[int], bool]]) -> Sample:
    """A sample of consecutive pieces (token ids, whether they are learned)."""
    return Sample(
        [token for ids, _ in pieces for token in ids],
        [token if learned else IGNORE_INDEX for ids, learned in pieces for token in ids],
    )


def single_tokens(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> dict[str, int]:
    """The id of every piece of text, which has to be one token.

    Raises:
        ValueError: a piece is several tokens of this tokenizer.
    """
    table = {}
    for piece in pieces:
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"{piece!r} is {len(ids)} tokens of this tokenizer; this task needs one that has it as one"
            )
        table[piece] = ids[0]
    return table
