"""Tasks of the quality benchmark: (tokenizer, seed) -> data; the same arguments give the same data."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.tasks.classify import classify
from benchmarks.quality.tasks.docstring import docstring
from benchmarks.quality.tasks.hops import hops, hops_steps
from benchmarks.quality.tasks.prose import prose
from benchmarks.quality.tasks.samples import Example, Sample, TaskData

__all__ = ["TASKS", "Example", "Sample", "TaskData"]

TASKS: dict[str, Callable[[PreTrainedTokenizerBase, int], TaskData]] = {
    "docstring": docstring,
    "prose": prose,
    "hops": hops,
    "hops_steps": hops_steps,
    "classify": classify,
}
