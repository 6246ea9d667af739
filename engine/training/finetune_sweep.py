"""`ladder sweep`: the main job with several side networks on one backbone pass."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.checkpoints.store import checkpoints
from engine.model.adapter import CONFIG_NAME, WEIGHTS_NAME
from engine.training.finetune import Echo, build_trainer, check_output, side_config, take_output, training_arguments
from engine.training.options import TrainOptions
from engine.training.run_log import METRICS_FILE
from engine.training.sweep import MEMBER_FILE, SWEEP_FILE, MemberResult
from engine.training.sweep_entries import cartesian, sweep_entries


def finetune_sweep(options: TrainOptions, sweep: Sequence[Mapping[str, Any]], echo: Echo) -> list[MemberResult]:
    """Train the members of a sweep and leave their adapters and sweep.json in `options.output`.

    Args:
        options: what to train on what, the same for all members but for what `sweep` says.
        sweep: see `engine.training.sweep_entries`.
        echo: prints one message.

    Raises:
        ValueError: as `engine.training.finetune.finetune`, or a sweep that cannot be.
    """
    output, arguments = Path(options.output), training_arguments(options)
    names = [entry.name for entry in sweep_entries(sweep, side_config(options), arguments)]
    with contextlib.ExitStack() as held:
        take_output(output, held)
        _check_output(output, names, options.overwrite, options.resume)
        trainer, _ = build_trainer(options, arguments, echo, sweep)
        trainer.train(resume_from_checkpoint=options.resume or None)
    saved = f"Saved         {output} (an adapter in the folder of every member, {SWEEP_FILE})"
    if trainer.sweep.best is None:
        echo(f"Best          none: no member has a finite loss\n{saved}")
        return trainer.sweep.results
    best = names[trainer.sweep.members.index(trainer.sweep.best)]
    echo(f'Best          {best}\n{saved}\nContinue with\n  ladder generate --adapter {output / best} --prompt "..."')
    return trainer.sweep.results


def _check_output(output: Path, names: Sequence[str], overwrite: bool, resume: bool) -> None:
    """`check_output` for the folder of a sweep and those of its members."""
    check_output(output, overwrite, resume)
    begun = any(checkpoints(output / name) or (output / name / MEMBER_FILE).exists() for name in names)
    if overwrite:
        for name in names:
            for _, folder in checkpoints(output / name):
                shutil.rmtree(folder)
            (output / name / MEMBER_FILE).unlink(missing_ok=True)
        for name in (SWEEP_FILE, CONFIG_NAME, WEIGHTS_NAME, METRICS_FILE):  # the last three of a single training
            (output / name).unlink(missing_ok=True)
    elif (output / SWEEP_FILE).exists():
        raise ValueError(
            f"{output}: holds a finished sweep ({SWEEP_FILE}); choose another folder with --output, or replace it with "
            "--overwrite"
        )
    elif begun and not resume:
        raise ValueError(
            f"{output}: holds a sweep that did not end; go on with --resume, choose another folder with --output, or "
            "start over with --overwrite"
        )


def sweep_of(vary: Sequence[str], members: Path | None) -> list[dict[str, Any]]:
    """What members have different, from the command line or a file.

    Args:
        vary: "name=value,value"; of several, every combination.
        members: a YAML or JSON file, a list of names and values.

    Raises:
        ValueError: both or none of them, or one that cannot be read.
    """
    if bool(vary) == (members is not None):
        raise ValueError(
            "a sweep needs --vary NAME=VALUE,VALUE (several times for every combination), or --members with a file "
            "that lists what each has different: give one of them"
        )
    if members is not None:
        try:
            return _with_numbers(yaml.safe_load(members.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{members}: cannot be read ({error})") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{members}: is not valid YAML ({error})") from error
    varied: dict[str, list[Any]] = {}
    for text in vary:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not name or not all(values.split(",")):
            raise ValueError(f"--vary {text}: expected NAME=VALUE,VALUE, such as learning_rate=1e-3,3e-3")
        if name in varied:
            raise ValueError(f"--vary {name} is given twice: list its values with commas")
        try:
            varied[name] = [_number(yaml.safe_load(value.strip())) for value in values.split(",")]
        except yaml.YAMLError as error:
            raise ValueError(
                f"--vary {text}: expected plain values, such as learning_rate=1e-3,3e-3 ({error})"
            ) from error
    return cartesian(varied)


def _with_numbers(members: Any) -> Any:
    """Members of a file; whatever is wrong with them `sweep_entries` says."""
    if not isinstance(members, list):
        return members
    return [
        {name: value if name == "name" else _number(value) for name, value in member.items()}
        if isinstance(member, dict)
        else member
        for member in members
    ]


def _number(value: Any) -> Any:
    """3e-3, which YAML reads as text, is a number here."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
