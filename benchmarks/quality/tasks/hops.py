"""Task 3: following one of three cups through swaps, one after the other: depth is a dial; with and without steps.

A problem is a place and k swaps of two places each. Swaps do not commute (the word problem of the group S_3), so who
writes only the result has to compose k of them on the way up through the layers. With steps, the place after every m-th
swap is written, so m is the depth of one written step; the prompt names it. Accuracy by (k, m) tells how few steps a
method must write.

    b a c b a : 2 = c                k = 2, m = 2: no steps
    b a c b a : 1 = a c              k = 2, m = 1

k goes up to 2, whose 126 prompts are all trained on: the held-out loss and the examples tell how much of the table of
two composed swaps a method has learned within its budget, not what it makes of problems that it has not seen. That was
tried: with k up to 3 and a tenth of those held out, QLoRA learned the others by heart (held-out loss 1.19 after 800
steps, 0.62 after 200; one seed, no file). A row holds several problems, so that a step sees more than sixteen answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.tasks.samples import Example, Sample, TaskData, row, single_tokens

PLACES = ("a", "b", "c")
MAX_HOPS = 2
PROBLEMS_PER_ROW = 8
TRAIN_ROWS, HELDOUT_ROWS, EXAMPLES = 6400, 64, 210
HELDOUT_SEED = 1 << 40  # beyond the seeds that anyone gives to a training
PIECES = ("\n", *PLACES, *(f" {place}" for place in PLACES), *(f" {m}" for m in range(1, MAX_HOPS + 1)), " :", " =")


@dataclass(frozen=True)
class Problem:
    """Where the cup is at first, the swaps, and after how many of them its place is written."""

    start: str
    swaps: tuple[tuple[str, str], ...]
    stride: int

    @property
    def written(self) -> list[str]:
        """The place after every `stride` swaps; the last is the result."""
        places, place = [], self.start
        for first, second in self.swaps:
            place = {first: second, second: first}.get(place, place)
            places.append(place)
        return places[self.stride - 1 :: self.stride]

    def prompt(self) -> list[str]:
        """Pieces of text, one token each."""
        return [
            "\n",
            self.start,
            *(f" {place}" for swap in self.swaps for place in swap),
            " :",
            f" {self.stride}",
            " =",
        ]

    def answer(self) -> list[str]:
        return [f" {place}" for place in self.written]


def hops_task(tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Only the result is written; groups "hops=k"."""
    return _task(tokenizer, seed, {k: [k] for k in range(1, MAX_HOPS + 1)})


def hops_steps_task(tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Every m that divides k; groups "hops=k,written=n" with n = k / m places in the answer."""
    return _task(tokenizer, seed, {k: [m for m in range(1, k + 1) if k % m == 0] for k in range(1, MAX_HOPS + 1)})


def _task(tokenizer: PreTrainedTokenizerBase, seed: int, strides: Mapping[int, Sequence[int]]) -> TaskData:
    table = single_tokens(tokenizer, PIECES)
    kinds = [(k, stride) for k in strides for stride in strides[k]]

    def ids(pieces: list[str]) -> list[int]:
        return [table[piece] for piece in pieces]

    def filled_row(rng: random.Random) -> Sample:
        problems = [_problem(rng, *rng.choice(kinds)) for _ in range(PROBLEMS_PER_ROW)]
        return row([part for p in problems for part in ((ids(p.prompt()), False), (ids(p.answer()), True))])

    def example(rng: random.Random, hops: int, stride: int) -> Example:
        problem = _problem(rng, hops, stride)
        written = f",written={hops // stride}" if len(kinds) > MAX_HOPS else ""
        return Example(ids(problem.prompt()), ids(problem.answer()), f"hops={hops}{written}")

    train, heldout = random.Random(seed), random.Random(HELDOUT_SEED)
    return TaskData(
        [filled_row(train) for _ in range(TRAIN_ROWS)],
        [filled_row(heldout) for _ in range(HELDOUT_ROWS)],
        [example(heldout, *kinds[place % len(kinds)]) for place in range(EXAMPLES)],
    )


def _problem(rng: random.Random, hops: int, stride: int) -> Problem:
    swaps = tuple((first, second) for first, second in (rng.sample(PLACES, 2) for _ in range(hops)))
    return Problem(rng.choice(PLACES), swaps, stride)
