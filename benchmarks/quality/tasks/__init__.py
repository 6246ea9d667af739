"""Tasks of the quality benchmark: (tokenizer, seed) -> data; the same arguments give the same data."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.tasks.classify import classify_task
from benchmarks.quality.tasks.docstring import docstring_task
from benchmarks.quality.tasks.hops import hops_steps_task, hops_task
from benchmarks.quality.tasks.prose import prose_task
from benchmarks.quality.tasks.samples import Example, Sample, TaskData

__all__ = ["TASKS", "Example", "Sample", "TaskData"]

TASKS: dict[str, Callable[[PreTrainedTokenizerBase, int], TaskData]] = {
    "docstring": docstring_task,
    "prose": prose_task,
    "hops": hops_task,
    "hops_steps": hops_steps_task,
    "classify": classify_task,
}
