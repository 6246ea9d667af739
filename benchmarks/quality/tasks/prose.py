"""Task 2: English prose, where the backbone has read code: Python's reference manual and the manuals inside packages.

The prose paragraphs of Python's `pydoc_data.topics`, which no backbone has read, and of the docstrings of installed
packages, which only backbones larger than the shipped one have, their held-out part left out. Split by topic and by
file; a held-out paragraph that occurs in training as well is dropped. Loss on every token, in windows of 256.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterator
from functools import cache
from pydoc_data.topics import topics

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.sources import package_files
from benchmarks.quality.tasks.samples import Sample, TaskData
from engine.data.dataset import prepare_dataset
from engine.quickstart.corpus import is_heldout

MANUALS = ("transformers", "numpy", "sympy", "networkx")  # written for users; most of torch's is not
WINDOW, MIN_WINDOW = 256, 32  # the end of a document may be a token or two: not text
HELDOUT_WINDOWS = 128
MIN_WORDS = 15  # of a paragraph; shorter ones are headings and lists of parameters
MIN_DOCUMENT_WORDS = 60
SPLIT_SEED = 0
_DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)
_WORD = re.compile(r"[A-Za-z][a-z']*[,.;:]?")


def prose_task(tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Windows to train on, in the seed's order, and 128 held-out ones chosen once."""
    train, heldout = (_windows(documents, tokenizer) for documents in split_documents())
    random.Random(seed).shuffle(train)
    random.Random(SPLIT_SEED).shuffle(heldout)
    return TaskData(train, heldout[:HELDOUT_WINDOWS], [])


@cache
def split_documents() -> tuple[list[str], list[str]]:
    """Training and held-out documents, their paragraphs separated by blank lines; no paragraph occurs twice."""
    train, heldout = [], []
    for name, text in _texts():
        (heldout if is_heldout(name) else train).append(text)
    seen: set[str] = set()
    return _unseen(train, seen), _unseen(heldout, seen)


def _texts() -> Iterator[tuple[str, list[str]]]:
    """(name, prose paragraphs) of every topic and of every file of the packages."""
    for topic, text in sorted(topics.items()):
        yield f"topics/{topic}", _paragraphs(text)
    for package in MANUALS:
        for file in package_files(package):
            docstrings = map(inspect.cleandoc, _DOCSTRING.findall(file.text))
            yield file.module, [paragraph for text in docstrings for paragraph in _paragraphs(text)]


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of running text: most pieces are plain words, and the last one ends a sentence."""
    found = []
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        plain = sum(_WORD.fullmatch(word) is not None for word in words)
        if len(words) >= MIN_WORDS and plain >= 0.8 * len(words) and words[-1][-1] in ".:!?":
            found.append(" ".join(words))
    return found


def _unseen(documents: list[list[str]], seen: set[str]) -> list[str]:
    """Documents of the paragraphs that are not in `seen`, which takes them up."""
    kept = []
    for paragraphs in documents:
        fresh = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
        seen.update(fresh)
        if sum(len(paragraph.split()) for paragraph in fresh) >= MIN_DOCUMENT_WORDS:
            kept.append("\n\n".join(fresh) + "\n")
    return kept


def _windows(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    records = [{"text": text} for text in documents]
    dataset = prepare_dataset(records, tokenizer, max_length=WINDOW, vocab_size=len(tokenizer))
    samples = [Sample(item["input_ids"].tolist(), item["labels"].tolist()) for item in dataset]
    return [sample for sample in samples if len(sample.input_ids) >= MIN_WINDOW]
