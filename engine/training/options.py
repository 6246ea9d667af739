"""Options of `ladder train`: defaults, a YAML or JSON file, the command line; the later wins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_torch_8bit"}
"""Of `TrainingArguments.optim`."""

_WORD_OPTIONS = {
    "taps": ("auto", "device", "int8", "host", "none"),
    "head_dtype": ("dense", "int8", "nf4"),
    "optimizer": tuple(OPTIMIZERS),
}


@dataclass(frozen=True)
class TrainOptions:
    """Everything a run depends on.

    Attributes:
        preset: of the side network, see `engine.config.PRESETS`.
        model: path or hub id of the backbone; None: the shipped one.
        data: jsonl file to train on; None: the shipped task.
        eval_data: held-out jsonl file; None: a seeded share of `data`.
        output: folder of the adapter and summary.json.
        max_length: longest sample, in tokens.
        learning_rate: peak learning rate.
        steps: optimizer steps; None: three passes over the data.
        seed: of initial weights, order and held-out share.
        batch_size: samples in one pass, or rows with packing.
        packing: as many whole samples as fit into rows of max_length tokens.
        longest_first: try the longest samples before the first step, so that too little memory shows at once.
        gradient_accumulation_steps: passes per optimizer step.
        reduction_factor: backbone width over side width.
        overwrite: replace a run in `output`, finished or not.
        resume: go on from the newest whole checkpoint in `output`, with the same options.
        save_steps: optimizer steps between checkpoints.
        budget: device memory to train in, as a card is sold, such as 12GB; None: what is free.
        taps: where hidden states wait for backward: auto, device, int8, host or none.
        head_dtype: of the frozen head: dense, int8 or nf4.
        optimizer: adamw, or adamw_8bit, which needs torchao.
        ignore_memory_plan: start even where the plan exceeds free memory.
    """

    preset: str = "ladder"
    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    output: str = "ladder-output"
    max_length: int = 1024
    learning_rate: float = 3e-3
    steps: int | None = None
    seed: int = 0
    batch_size: int = 4
    packing: bool = False
    longest_first: bool = False
    gradient_accumulation_steps: int = 4
    reduction_factor: int = 16
    overwrite: bool = False
    resume: bool = False
    save_steps: int = 100
    budget: str | None = None
    taps: str = "auto"
    head_dtype: Literal["dense", "int8", "nf4"] = "dense"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    ignore_memory_plan: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "reduction_factor", "steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; expected at least 1")
        for name, words in _WORD_OPTIONS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; expected one of {', '.join(words)}")
        if self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length}; expected at least 2")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` is {self.learning_rate}; expected a positive number")
        if self.seed < 0:
            raise ValueError(f"`seed` is {self.seed}; expected 0 or more")


_TYPES: dict[str, type] = {
    "max_length": int,
    "learning_rate": float,
    "steps": int,
    "seed": int,
    "batch_size": int,
    "packing": bool,
    "longest_first": bool,
    "gradient_accumulation_steps": int,
    "reduction_factor": int,
    "overwrite": bool,
    "resume": bool,
    "save_steps": int,
    "ignore_memory_plan": bool,
}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def with_values(options: TrainOptions, values: Mapping[str, Any]) -> TrainOptions:
    """`options` with the given ones replaced; None means not given."""
    return replace(options, **{name: value for name, value in values.items() if value is not None})


def read_options_file(path: Path) -> dict[str, Any]:
    """Options from a YAML or JSON file, with the names of the command line (`eval-data` or `eval_data`).

    Raises:
        ValueError: an unreadable file, an unknown name, or a value of the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    values = _parsed(path, text)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `name: value` pairs, got {type(values).__name__}")
    known = [field.name for field in fields(TrainOptions)]
    options = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: unknown option `{key}`; known: {', '.join(known)}")
        if name in options:
            raise ValueError(f"{path}: option `{name}` is given twice")
        options[name] = None if value is None else _coerced(path, name, value)
    return options


def _parsed(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is not valid JSON ({error})") from error
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid YAML ({error})") from error


def _coerced(path: Path, name: str, value: Any) -> Any:
    """`value` as the option's type; YAML reads 3e-3 as text, which counts as a number here."""
    wanted = _TYPES.get(name, str)
    if wanted is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is wanted:
        return value
    elif wanted is float and isinstance(value, float):
        return value
    raise ValueError(f"{path}: option `{name}` is {value!r}; expected {_WORDS[wanted]}")
