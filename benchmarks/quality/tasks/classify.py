"""Task 4: which package a function comes from, answered by one label token of the frozen head.

Functions of five installed packages without their docstrings. Names that hold a package's name, and the usual short
names of these packages, are replaced by one word in all of them. Split by file; a held-out function that occurs in
training as well is dropped. Classes are equally frequent: chance is 1 in 5.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable
from functools import cache

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.sources import PACKAGES, package_files
from benchmarks.quality.tasks.samples import Example, TaskData, row, single_tokens
from engine.quickstart.corpus import SourceFile, is_heldout
from engine.quickstart.docstrings import documented_functions

LABELS = dict(zip(PACKAGES, (" A", " B", " C", " D", " E"), strict=True))
QUESTION = "\n# Package:"
TRAIN_PER_CLASS, HELDOUT_PER_CLASS = 500, 40
MAX_PER_FILE, MAX_FILE_CHARACTERS = 16, 100_000  # of a larger file only a little would be used
MIN_LINES, MAX_CODE_CHARACTERS = 3, 320
SPLIT_SEED = 0
GIVEAWAY = re.compile(rf"\w*(?:{'|'.join(PACKAGES)}|huggingface|aten)\w*|\b(?:np|nx|npt|tl|hf)\b", re.IGNORECASE)


def classify_task(tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Functions to train on, in the seed's order, and 40 held-out ones of every package; groups are packages."""
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]

    def labelled(functions: dict[str, str]) -> list[tuple[list[int], list[int], str]]:
        codes = tokenizer(list(functions), add_special_tokens=False)["input_ids"]
        table = single_tokens(tokenizer, LABELS.values())
        return [
            (code + question, [table[LABELS[package]]], package)
            for code, package in zip(codes, functions.values(), strict=True)
        ]

    train, heldout = map(labelled, split_functions())
    random.Random(seed).shuffle(train)
    return TaskData(
        [row([(prompt, False), (label, True)]) for prompt, label, _ in train],
        [row([(prompt, False), (label, True)]) for prompt, label, _ in heldout],
        [Example(*item) for item in heldout],
    )


@cache
def split_functions() -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out functions, each with its package; none occurs in both, or in two packages."""
    train: dict[str, str] = {}
    heldout: dict[str, str] = {}
    for package in PACKAGES:
        files = [file for file in package_files(package) if len(file.text) <= MAX_FILE_CHARACTERS]
        random.Random(SPLIT_SEED).shuffle(files)
        for found, is_wanted, count in ((train, False, TRAIN_PER_CLASS), (heldout, True, HELDOUT_PER_CLASS)):
            chosen = (file for file in files if is_heldout(file.module) == is_wanted)
            found.update(dict.fromkeys(_functions(chosen, {*train, *heldout}, count), package))
    return train, heldout


def _functions(files: Iterable[SourceFile], known: set[str], count: int) -> list[str]:
    """The heads of `count` functions that are not known, names that tell replaced, a few of each file."""
    found: dict[str, None] = {}
    for file in files:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of escapes in the packages' strings
            heads = [code[: 2 * MAX_CODE_CHARACTERS] for code, _ in documented_functions(file.text)]
        codes = [GIVEAWAY.sub("lib", head)[:MAX_CODE_CHARACTERS] for head in heads]
        fresh = [code for code in codes if code not in known and code.count("\n") + 1 >= MIN_LINES]
        found.update(dict.fromkeys(fresh[:MAX_PER_FILE]))
        if len(found) >= count:
            break
    return list(found)[:count]
