"""A Trainer's checkpoints through `checkpoints.store`: crash-safe, without pickle, resumed to the bit or refused.

The stock Trainer writes into the final folder, rotates by time of modification, resumes from the last folder whatever
is in it, and goes on silently without a part that is missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Mapping, Sized
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, TrainOutput

from engine.checkpoints import store
from engine.checkpoints.interruption import EvaluationInterrupted, Interruption
from engine.checkpoints.lock import only_training
from engine.checkpoints.processes import all_or_none
from engine.checkpoints.state import (
    load_optimizer_state,
    load_state,
    random_state,
    restore_random_state,
    save_state,
)
from engine.checkpoints.store import CheckpointError, Manifest
from engine.data.content import sampled_digest

logger = logging.getLogger(__name__)

_PENDING = "pending"  # what a signal has cut off, to be made up for
_ORDER = (  # of TrainingArguments: what the order and content of batches depend on
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
)
_OPTIMIZATION = (
    "optim",
    "optim_args",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
)


def _content(data: Any) -> str | None:
    if hasattr(data, "digest"):
        return data.digest()
    is_read = isinstance(data, torch.utils.data.IterableDataset) or not isinstance(data, Sized)
    return None if is_read else sampled_digest(data)


def _plain(value: Any) -> Any:
    """Of an enumeration its word."""
    value = getattr(value, "value", value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class CrashSafeCheckpoints:
    """Goes in front of `Trainer`.

    A checkpoint that cannot be written (a full disk) costs a warning: training goes on, and the last one stays valid.
    """

    run_of_sweep: str | None = None
    _run = ""
    _sequence = 0
    _settings: Mapping[str, Any] = MappingProxyType({})
    last_saved_step: int | None = None
    interruption: Interruption

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The stock training.

        Args:
            resume_from_checkpoint: True resumes from the newest checkpoint in `output_dir` that is whole; a folder from
                that one.

        Raises:
            FolderInUseError: another training writes into `output_dir`.
            CheckpointError: there is none, the folder is damaged, or training goes on with other data, batches or
                processes, so that the result would be another (`ignore_data_skip` accepts that).
            SystemExit: SIGTERM (status 143) or SIGINT (130), after a checkpoint.
        """
        with contextlib.ExitStack() as held:
            lock = only_training(self.args.output_dir)
            # The process that writes is one, or one of each machine.
            all_or_none((lambda: held.enter_context(lock)) if self.args.should_save else None)
            return self._train_alone(resume_from_checkpoint, *args, **kwargs)

    def _train_alone(self, wanted: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The stock training, of the only one that writes into its folder."""
        self.last_saved_step = None
        resume = self._checkpoint_to_resume(wanted)
        with self.interruption:
            try:
                output = super().train(None if resume is None else str(resume), *args, **kwargs)
            except EvaluationInterrupted:
                self.is_in_train = False
                output = None
            status = self.interruption.exit_status
            if status is None:
                assert output is not None
                return output
            if self.state.global_step != self.last_saved_step:
                self._save_checkpoint(self.model, None)
        raise SystemExit(status)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The stock epoch, but nothing where training was resumed at its end: it would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """The stock end, which would delete every checkpoint but the best one where only one is to be kept; after a
        signal the weights stay the last ones."""
        self.interruption.any_received()  # since the last step
        own = self.args
        limit, best = own.save_total_limit, own.load_best_model_at_end
        own.save_total_limit, own.load_best_model_at_end = None, best and self.interruption.exit_status is None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            own.save_total_limit, own.load_best_model_at_end = limit, best

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero():
            store.sweep(folder)
        self.accelerator.wait_for_everyone()
        self._sequence, self._settings = store.next_sequence(folder), self._settings_now()
        if not wanted:
            self._run, self.interruption.evaluation_due = self.run_of_sweep or uuid.uuid4().hex, False
            return None
        found = store.newest_valid(folder) if wanted is True else Path(wanted)
        manifest = store.verify(found)
        self._check_settings(found, manifest)
        self._run, self.last_saved_step = manifest.run, manifest.step
        self.interruption.evaluation_due = bool(load_state(found, _PENDING)["evaluation"])
        return found

    def _settings_now(self) -> dict[str, Any]:
        """What the rest of a training depends on beside the checkpoint's own state.

        Of data that were not tokenized here the number of samples and some of them, of a stream nothing.
        """
        args, data = self.args, self.train_dataset
        names = (*_ORDER, *_OPTIMIZATION)
        return {
            "processes": args.world_size,
            "data": _content(data),
            **{name: _plain(getattr(args, name)) for name in names},
        }

    def settings_of_training(self) -> dict[str, Any]:
        """What the training that ended last depended on."""
        return self._settings

    def compare_settings(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Refuse what a training that has ended did not depend on; before this one has chosen how to keep taps.

        Raises:
            CheckpointError: with what differs.
        """
        self._settings = {**self._settings_now(), "taps": saved.get("taps")}
        CrashSafeCheckpoints._check_settings(self, folder, Manifest("", 0, 0, saved, {}))

    def _check_settings(self, folder: Path, manifest: Manifest) -> None:
        here = self._settings
        accepted = {"data", *_ORDER} if self.args.ignore_data_skip else set()
        names = here.keys() - accepted
        different = [
            f"{name} was {manifest.settings.get(name)!r:.20} and is {here[name]!r:.20}"
            for name in sorted(names)
            if manifest.settings.get(name) != here[name]
        ]
        if different:
            raise CheckpointError(
                f"{folder}: training would not go on as it was: {'; '.join(different)}. Resume as it was saved, or "
                "start a new training; ignore_data_skip accepts other batches"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder = Path(self._get_output_dir(trial=trial))
        best_before = self.state.best_model_checkpoint
        random_states = gather_object([random_state()])  # of all processes, written by the one that writes
        final, error = None, None
        if self.args.should_save:
            staging = store.staging_folder(run_folder, self.state.global_step, os.getpid())
            try:
                self._stage(staging, random_states)
                final = store.commit(staging, self._run, self._sequence, self._settings)
                self._rotate(run_folder)
            except (OSError, SafetensorError, CheckpointError, TypeError) as failure:
                error = failure
                self.state.best_model_checkpoint = best_before
                store.abandon(staging)
        if self._anybody(error is not None):
            self._warn_unsaved(error, run_folder)
            return
        self._sequence += 1
        self.last_saved_step = self.state.global_step
        if final is not None and self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _warn_unsaved(self, error: BaseException | None, run_folder: Path) -> None:
        if error is not None:
            logger.warning(
                "checkpoint of step %d could not be written to %s (%s): training goes on, and the last checkpoint "
                "stays as it was%s",
                self.state.global_step,
                run_folder,
                error,
                ". Free some space there" if "space" in str(error).lower() else "",
            )

    def _stage(self, staging: Path, random_states: list[dict[str, Any]]) -> None:
        """Write every part of a checkpoint."""
        step = self.state.global_step
        store.begin(staging)
        for process, state in enumerate(random_states):
            save_state(staging, f"random-{process}", state)
        save_state(staging, _PENDING, {"evaluation": self.interruption.evaluation_due})
        self.save_model(str(staging), _internal_call=True)
        best = self.state.best_global_step
        if best and self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST):
            folder = staging.with_name(f"checkpoint-{best}")
            if best == step or folder.exists():
                self.state.best_model_checkpoint = str(folder)
        if not self.args.save_only_model:
            save_state(staging, "optimizer", self.optimizer.state_dict())
            save_state(staging, "scheduler", self.lr_scheduler.state_dict())
            if (scaler := self._scaler()) is not None:
                save_state(staging, "scaler", scaler.state_dict())
        self._record_callbacks()
        self.state.save_to_json(str(staging / TRAINER_STATE_NAME))

    def _record_callbacks(self) -> None:
        """State of callbacks that have some, as the stock Trainer keeps it."""
        for callback in (*self.callback_handler.callbacks, self.control):
            if not isinstance(callback, ExportableState):
                continue
            name = type(callback).__name__
            if isinstance(self.state.stateful_callbacks[name], list):
                self.state.stateful_callbacks[name].append(callback.state())
            else:
                self.state.stateful_callbacks[name] = callback.state()

    def _rotate(self, run_folder: Path) -> None:
        limit = self.args.save_total_limit
        if limit is not None and limit > 0:
            best = self.state.best_model_checkpoint
            store.rotate(run_folder, self._run, limit, [] if best is None else [Path(best)])

    def _anybody(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "sum").item())

    def _scaler(self) -> Any:
        return getattr(self.accelerator, "scaler", None)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        # Through accelerate's wrapper: it moves tensors to the device of their parameters.
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        load_optimizer_state(optimizer, load_state(folder, "optimizer"), folder / "optimizer.json")
        self.lr_scheduler.load_state_dict(load_state(folder, "scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self._scaler()
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_state(load_state(Path(checkpoint), f"random-{self.args.process_index}"))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        store.verify(best)
        self._load_from_checkpoint(str(best))
