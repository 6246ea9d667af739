"""What `ladder train` does with no arguments: the shipped backbone and task, with settings for two CPU cores."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from engine.training.options import TrainOptions


def shipped(name: str) -> str:
    """Path of a file or folder that is installed in this package."""
    return str(Path(str(resources.files(__package__))) / name)


def backbone_path() -> str:
    """The tiny pretrained backbone, tokenizer included."""
    return shipped("backbone")


def train_path() -> str:
    """Functions of the standard library and their one-line docstrings, from training modules."""
    return shipped("docstrings_train.jsonl")


def heldout_path() -> str:
    """The same from modules that neither the backbone nor the task has seen."""
    return shipped("docstrings_heldout.jsonl")


QUICKSTART = TrainOptions(
    max_length=256,
    learning_rate=3e-3,
    steps=200,
    batch_size=16,
    gradient_accumulation_steps=1,
    reduction_factor=2,
)
"""Settings for the shipped backbone: S = 64 beside D = 128."""
