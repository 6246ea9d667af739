"""A Trainer's checkpoints through `engine.checkpoint_store`: crash-safe, without pickle, resumed to the bit or refused.

The stock Trainer writes into the final folder, rotates by time of modification, resumes from the last folder whatever
is in it, and goes on silently without a part that is missing.
"""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, TrainOutput

from engine import checkpoint_store as store
from engine.checkpoint_store import CheckpointError, Manifest
from engine.interruption import EvaluationInterrupted, Interruption
from engine.training_state import (
    load_optimizer_state,
    load_state,
    random_state,
    restore_random_state,
    save_state,
)

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"


class CrashSafeCheckpoints:
    """Goes in front of `Trainer`.

    A checkpoint that cannot be written (a full disk) costs a warning: training goes on, and the last one stays valid.
    """

    _run = ""
    last_saved_step: int | None = None
    interruption: Interruption

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The stock training.

        Args:
            resume_from_checkpoint: True resumes from the newest checkpoint in `output_dir` that is whole; a folder from
                that one.

        Raises:
            CheckpointError: there is none, the folder is damaged, or training goes on with other data, batches or
                processes, so that the result would be another (`ignore_data_skip` accepts that).
            SystemExit: SIGTERM (status 143) or SIGINT (130), after a checkpoint.
        """
        resume = self._checkpoint_to_resume(resume_from_checkpoint)
        self.last_saved_step = None
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

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero():
            store.sweep(folder)
        self.accelerator.wait_for_everyone()
        if not wanted:
            self._run = uuid.uuid4().hex
            return None
        found = store.newest_valid(folder) if wanted is True else Path(wanted)
        manifest = store.verify(found)
        self._check_settings(found, manifest)
        self._run = manifest.run
        return found

    def _settings(self) -> dict[str, Any]:
        """What the order and content of batches depend on."""
        args, data = self.args, self.train_dataset
        return {
            "processes": args.world_size,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "data": data.digest() if hasattr(data, "digest") else None,
        }

    def _check_settings(self, folder: Path, manifest: Manifest) -> None:
        here = self._settings()
        names = {"processes"} if self.args.ignore_data_skip else here.keys()
        different = [
            f"{name} was {manifest.settings.get(name)!r:.20} and is {here[name]!r:.20}"
            for name in sorted(names)
            if manifest.settings.get(name) != here[name]
        ]
        if different:
            raise CheckpointError(
                f"{folder}: training would not go on as it was: {'; '.join(different)}. Resume as it was saved"
                + ("" if self.args.ignore_data_skip else ", or set ignore_data_skip to accept other batches")
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder = Path(self._get_output_dir(trial=trial))
        best_before = self.state.best_model_checkpoint
        staging = store.staging_folder(run_folder, self.state.global_step, self._of_first_process(os.getpid()))
        final, error = None, None
        try:
            self._stage(staging)
        except (OSError, SafetensorError) as failure:
            error = failure
        if self._anybody(error is not None):
            error = error or OSError("another process could not write its part")
        elif self.args.should_save:
            try:
                final = store.commit(staging, self._run, self._settings())
                self._rotate(run_folder)
            except (OSError, CheckpointError) as failure:
                error = failure
        if not self._anybody(error is not None):
            self.last_saved_step = self.state.global_step
        if error is not None:
            self.state.best_model_checkpoint = best_before
            if self.is_world_process_zero():
                store.abandon(staging)
            logger.warning(
                "checkpoint of step %d could not be written (%s): training goes on, and the last checkpoint stays as "
                "it was. Free some space in %s",
                self.state.global_step,
                error,
                run_folder,
            )
        elif final is not None and self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _stage(self, staging: Path) -> None:
        """Write every part of a checkpoint; each process writes its random state."""
        step = self.state.global_step
        if self.is_world_process_zero():
            store.begin(staging)
        self.accelerator.wait_for_everyone()
        save_state(staging, f"random-{self.args.process_index}", random_state())
        if not self.args.should_save:
            return
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
        self.state.save_to_json(str(staging / TRAINER_STATE))

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

    def _of_first_process(self, number: int) -> int:
        if self.args.world_size == 1:
            return number
        mine = number if self.is_world_process_zero() else 0
        return int(self.accelerator.reduce(torch.tensor(mine, device=self.args.device), "sum").item())

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
