"""Task 3: arithmetic modulo 5, one operation after the other, whose depth is a dial; with and without written steps.

A problem is a start and k operations, each "+ a" or "* a", which do not commute: who writes only the result has to
compose k of them on the way up through the layers. With steps, the value after every m-th operation is written, so m is
the depth of one written step; the prompt names it. Accuracy by (k, m) tells how few steps a method must write.

    3 + 4 * 2 + 1 * 3 : 4 = 0            k = 4, m = 4: no steps
    3 + 4 * 2 + 1 * 3 : 2 = 4 0          k = 4, m = 2

A problem of two or more operations is held out or not by a hash of its text; a single operation is the table itself,
which has to be known. A row holds several problems, so that a training step sees more than sixteen digits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.tasks.samples import Example, Sample, TaskData, row, single_tokens

MODULUS = 5
MAX_HOPS = 6
OPERATIONS = [("+", a) for a in range(1, MODULUS)] + [("*", a) for a in range(2, MODULUS)]
PIECES = [
    "\n",
    *map(str, range(MODULUS)),
    *(f" {n}" for n in range(max(MODULUS, MAX_HOPS + 1))),
    " +",
    " *",
    " :",
    " =",
]
PROBLEMS_PER_ROW = 8
TRAIN_ROWS, HELDOUT_ROWS, EXAMPLES = 6400, 64, 210
HELDOUT_SEED = 1 << 40  # beyond the seeds that anyone gives to a training


@dataclass(frozen=True)
class Problem:
    """A start, operations on it, and after how many of them a value is written."""

    start: int
    operations: tuple[tuple[str, int], ...]
    stride: int

    @property
    def written(self) -> list[int]:
        """The value after every `stride` operations; the last is the result."""
        values, value = [], self.start
        for operator, operand in self.operations:
            value = (value + operand if operator == "+" else value * operand) % MODULUS
            values.append(value)
        return values[self.stride - 1 :: self.stride]

    @property
    def is_heldout(self) -> bool:
        """True for about one problem in ten, whatever its stride; never for a single operation."""
        text = f"{self.start}{self.operations}"
        return len(self.operations) > 1 and hashlib.sha256(text.encode()).digest()[0] % 10 == 0

    def prompt(self) -> list[str]:
        """Pieces of text, one token each."""
        steps = [piece for operator, operand in self.operations for piece in (f" {operator}", f" {operand}")]
        return ["\n", str(self.start), *steps, " :", f" {self.stride}", " ="]

    def answer(self) -> list[str]:
        return [f" {value}" for value in self.written]


def hops_task(tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Only the result is written; groups "hops=k"."""
    return _task(tokenizer, seed, {k: [k] for k in range(1, MAX_HOPS + 1)})


def hops_steps_task(tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Every m that divides k; groups "hops=k,written=n" with n = k / m values in the answer."""
    return _task(tokenizer, seed, {k: [m for m in range(1, k + 1) if k % m == 0] for k in range(1, MAX_HOPS + 1)})


def _task(tokenizer: PreTrainedTokenizerBase, seed: int, strides: Mapping[int, Sequence[int]]) -> TaskData:
    table = single_tokens(tokenizer, PIECES)
    kinds = [(k, stride) for k in strides for stride in strides[k]]

    def ids(pieces: list[str]) -> list[int]:
        return [table[piece] for piece in pieces]

    def filled_row(rng: random.Random, is_heldout: bool) -> Sample:
        problems = [_problem(rng, *rng.choice(kinds), is_heldout) for _ in range(PROBLEMS_PER_ROW)]
        return row([part for p in problems for part in ((ids(p.prompt()), False), (ids(p.answer()), True))])

    def example(rng: random.Random, hops: int, stride: int) -> Example:
        problem = _problem(rng, hops, stride, True)
        written = f",written={hops // stride}" if len(kinds) > MAX_HOPS else ""
        return Example(ids(problem.prompt()), ids(problem.answer()), f"hops={hops}{written}")

    train, heldout = random.Random(seed), random.Random(HELDOUT_SEED)
    return TaskData(
        [filled_row(train, False) for _ in range(TRAIN_ROWS)],
        [filled_row(heldout, True) for _ in range(HELDOUT_ROWS)],
        [example(heldout, *kinds[place % len(kinds)]) for place in range(EXAMPLES)],
    )


def _problem(rng: random.Random, hops: int, stride: int, is_heldout: bool) -> Problem:
    """A random problem of one side of the split."""
    while True:
        operations = tuple(rng.choice(OPERATIONS) for _ in range(hops))
        problem = Problem(rng.randrange(MODULUS), operations, stride)
        if hops == 1 or problem.is_heldout == is_heldout:
            return problem
