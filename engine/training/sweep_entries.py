"""What the members of a sweep have different: from names and values to whole configurations and arguments."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from engine.config import LadderConfig

NETWORK = ("preset", *(field.name for field in fields(LadderConfig) if field.name != "preset_name"))
"""Of the side network; "seed" is that of its initial weights."""

OPTIMIZATION = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
"""Of `TrainingArguments`: what neither the batches nor their number depend on."""

_NUMBERS = {
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
}
_OWN = re.compile(r"^checkpoint-|\.(json|jsonl|lock|md|png|safetensors|txt|jinja)$")
"""What else has a place in the folder of a sweep."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]{0,99}")
_LOGGERS = {"none", "tensorboard"}  # others have one run in a process, where the members' lines would mix


@dataclass(frozen=True)
class SweepEntry:
    """One member of a sweep.

    Attributes:
        name: unique; its folder below the sweep's.
        settings: what was asked for, without the name.
        config: of its side network.
        args: of its training.
    """

    name: str
    settings: Mapping[str, Any]
    config: LadderConfig
    args: TrainingArguments


def sweep_entries(
    sweep: Sequence[Mapping[str, Any]],
    base: LadderConfig,
    args: TrainingArguments,
    others: Mapping[str, Any] | None = None,
) -> list[SweepEntry]:
    """The members of a sweep, checked.

    Args:
        sweep: for each member names (of `NETWORK` and `OPTIMIZATION`) and values, and optionally its "name".
        base: what a side network is where a member says nothing else; a preset changes what it consists of, and leaves
            the rest, such as the width.
        args: the same of the training.
        others: further arguments of the trainer, of which only callbacks are for all members.

    Raises:
        ValueError: a name that is unknown, given twice, or would give members different batches; a value out of range;
            or arguments that a sweep does not support.
    """
    _check_arguments(args, others or {})
    if isinstance(sweep, str | Mapping) or not isinstance(sweep, Sequence) or not sweep:
        raise ValueError(
            "sweep: expected a list of one mapping per side network, such as [{'learning_rate': 1e-3}, "
            f"{{'learning_rate': 3e-3}}], got {sweep!r:.80}"
        )
    entries = [_entry(number, values, base, args) for number, values in enumerate(sweep)]
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sweep: the name {twice[0]!r} is given twice; every member needs a folder of its own")
    return entries


def cartesian(varied: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of each name, the last name fastest."""
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


def _entry(number: int, values: Mapping[str, Any], base: LadderConfig, args: TrainingArguments) -> SweepEntry:
    if not isinstance(values, Mapping):
        raise ValueError(f"sweep, member {number}: expected names and values, got {values!r:.80}")
    settings = {str(name): value for name, value in values.items() if name != "name"}
    name = values.get("name", _default_name(number, settings))
    where = f"sweep, member {number} ({name})"
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _OWN.search(name):
        raise ValueError(
            f"{where}: the name becomes a folder: expected letters, digits and _.,=+- only, not beginning with "
            "checkpoint-, and not ending as a file of the sweep does (.json, .lock, ...)"
        )
    known = {field.name for field in fields(args)}
    for key, value in settings.items():
        if key in NETWORK:
            continue
        if key not in OPTIMIZATION:
            is_common = key in known
            raise ValueError(
                f"{where}: {key!r} "
                + ("is the same for all members, which share their batches: set it in args" if is_common else "unknown")
                + f"; members may differ in {', '.join((*NETWORK, *OPTIMIZATION))}"
            )
        if key in _NUMBERS and not _is_number(value):
            raise ValueError(f"{where}: {key} must be a finite number of at least 0, got {value!r}")
    own = {key: value for key, value in settings.items() if key in OPTIMIZATION}
    try:
        config = _config(base, {key: value for key, value in settings.items() if key in NETWORK})
        member_args = replace(args, output_dir=str(Path(args.output_dir) / name), disable_tqdm=True, **own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    return SweepEntry(name, settings, config, member_args)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _config(base: LadderConfig, values: dict[str, Any]) -> LadderConfig:
    """`base` with some fields replaced; of another preset, with what `base` itself changed from its own."""
    preset = values.pop("preset", base.preset_name)
    defaults = LadderConfig.preset(base.preset_name).to_dict()
    changed = {name: value for name, value in base.to_dict().items() if value != defaults[name]}
    return LadderConfig.preset(preset, **(changed | values))


def _default_name(number: int, settings: Mapping[str, Any]) -> str:
    """Its place in the list, and as much of what it has different as a folder's name takes."""
    text = ",".join(f"{name}={value}" for name, value in settings.items())
    return f"{number}-{re.sub(r'[^A-Za-z0-9_.,=+-]+', '_', text)}"[:100].rstrip("-,")


def _check_arguments(args: TrainingArguments, others: Mapping[str, Any]) -> None:
    """Refuse what members cannot have in common, or not each for itself."""
    if given := sorted(name for name, value in others.items() if name != "callbacks" and value not in (None, ())):
        raise ValueError(f"sweep builds its own trainers, which cannot share {', '.join(given)}: leave that out")
    if args.world_size > 1:
        raise ValueError(f"sweep runs in one process, here are {args.world_size}: give each process members of its own")
    for name, instead in (
        ("cuda_graph", "a graph would hold one member's pass"),
        ("auto_find_batch_size", "members have the same batches: set per_device_train_batch_size"),
        ("push_to_hub", "push the member you choose with model.push_to_hub()"),
    ):
        if getattr(args, name, False):
            raise ValueError(f"sweep does not support {name}=True: {instead}")
    if getattr(args, "taps", "auto") == "int8":
        raise ValueError(
            "sweep does not support taps='int8': members share hidden states on the device and on the host, and would "
            "keep int8 codes once each: use device, host, none or auto"
        )
    if foreign := sorted(set(args.report_to) - _LOGGERS):
        raise ValueError(
            f"sweep does not support report_to={foreign}: it has one run in a process, and members would mix there; "
            "every member writes metrics.jsonl, and report_to='tensorboard' is supported"
        )


def check_data(data: Any) -> None:
    """Refuse a stream as training data.

    Raises:
        ValueError: it is one.
    """
    if isinstance(data, IterableDataset):
        raise ValueError(
            "sweep needs training data with a length: members would take a stream's samples from one another. Pass a "
            "jsonl path, a datasets.Dataset or a list"
        )
