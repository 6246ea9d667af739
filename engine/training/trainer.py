"""`transformers.Trainer` for ladder models: a mixin that adds data, the fused loss and measurements, and nothing else.

The stock Trainer owns loop, schedule, callbacks and logging. Habits of it that do not fit are replaced: it would build
logits to evaluate, average evaluation losses over batches instead of tokens, and step on gradients that are not finite.
Its checkpoints, pickled and written in place, are `engine.checkpoints.trainer_mixin`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from engine.checkpoints.interruption import Interruption
from engine.checkpoints.store import Manifest
from engine.checkpoints.trainer_mixin import CrashSafeCheckpoints
from engine.config import LadderConfig
from engine.data.collator import Collator
from engine.memory.cards import card_of, pass_flops
from engine.model.adapter import load_adapter
from engine.model.causal_lm import LadderForCausalLM
from engine.training.arguments import DEFAULT_MAX_SKIPPED_STEPS, LadderArguments, check_supported
from engine.training.data_parallel import WholeRounds
from engine.training.guards import SKIPPED_FILE, GuardedStep, SpikeWatch
from engine.training.layer_major import LayerMajor
from engine.training.longest_batch import LongestBatchFirst
from engine.training.out_of_memory import TrainingMemoryError, WholeSteps, explain, is_out_of_memory, release
from engine.training.preflight import Fit, MemoryPlanError, fit_memory, load_options
from engine.training.run_log import RunLog
from engine.training.step_graph import CudaGraphs, StepGraphs, check_arguments
from engine.training.summary import PeakMemory, StepClock
from engine.training.sweep import Sweep, started_from
from engine.training.sweep_entries import sweep_entries
from engine.training.training_data import prepared, training_data

logger = logging.getLogger(__name__)


class LadderMixin(CrashSafeCheckpoints):
    """What a Trainer needs to train a `LadderForCausalLM`; goes in front of `Trainer` (or a subclass of it).

    The loss of an optimizer step is the sum over all its supervised tokens divided by their number, however they are
    cut into micro-batches and processes. Logs gain `tokens_per_second`, `peak_memory_mib`, `mfu` on a known card (the
    share of its 16-bit arithmetic that is in use; `engine.memory.cards`), and `gate_mean`, `gate_min` and `gate_max`.

    Attributes:
        group_tokens: tokens that pass the backbone together where a step has several micro-batches; None: as many as
            fit the memory.
        fit_of_sweep: of a member of a sweep, what was planned for all of them.
        sweep: what trains instead of this trainer, whose model is then the first member's, and the best one's
            afterwards.
    """

    group_tokens: int | None = None
    fit_of_sweep: Fit | None = None
    sweep: Sweep | None = None

    def __init__(
        self,
        model: LadderForCausalLM | str | Path | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *rest: Any,
        ladder_config: LadderConfig | None = None,
        sweep: Sequence[Mapping[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        args = LadderArguments() if args is None else args
        check_supported(args)
        if getattr(args, "cuda_graph", False):
            check_arguments(args)
        if model is None:
            raise ValueError(
                "LadderTrainer needs a model: a LadderForCausalLM, or the path or hub id of a backbone; model_init is "
                "not supported: build one trainer per trial around a shared backbone instead"
            )
        is_loaded = not isinstance(model, str | Path)
        if is_loaded and ladder_config is not None:
            raise ValueError(
                "ladder_config was given with a model that has a side network already; pass the backbone's path or id "
                "as model, or leave ladder_config out"
            )
        base = model.ladder_config if is_loaded else ladder_config or LadderConfig()
        entries = None if sweep is None else sweep_entries(sweep, base, args, {"rest": rest} | others)
        configs = [base] if entries is None else [entry.config for entry in entries]
        if not is_loaded:
            model = LadderForCausalLM.from_backbone(model, configs[0], **load_options(model, configs, args))
        given = model if is_loaded else None
        if is_loaded and entries is not None:
            model = started_from(model, configs[0])
        processing_class = _tokenizer_if_any(model) if processing_class is None else processing_class
        train_dataset = self._tokenized(train_dataset, processing_class, args, model, is_training=True)
        parts = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
        parts = {name: self._tokenized(part, processing_class, args, model) for name, part in parts.items()}
        eval_dataset = parts if isinstance(eval_dataset, dict) else parts[None]
        # One row per batch: accelerate must not cut a batch into samples, as it would for a stream.
        args.accelerator_config.dispatch_batches = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every trained parameter is in every loss
        data_collator = data_collator or self._default_collator()
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, *rest, **others)
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} needs logits, which are never built here; use generate() in a callback")
        if self.accelerator.ddp_handler is not None:
            # Gradients in DDP's buffers instead of beside them: 4 bytes x trained parameters less.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.add_callback(RunLog())
        if getattr(args, "longest_first", False) and train_dataset is not None:
            self.add_callback(LongestBatchFirst(self))
        graphed = getattr(self.args, "cuda_graph", False)
        self.step_graphs = StepGraphs(model, CudaGraphs(self.args.device)) if graphed else None
        card = card_of(self.args.device) if model.backbone.dtype.itemsize == 2 else None
        self.clock = StepClock(self.args.device, card and card.flops)
        self.peak_memory = PeakMemory(self.args.device)
        self.layer_major = LayerMajor(1)
        self._fitted: Fit
        self._whole_steps: WholeSteps | None = None
        self._step_losses: list[Tensor] = []
        self._step_samples: list[Any] = []
        self._spikes = SpikeWatch()
        self.interruption = Interruption(self)
        self.add_callback(self.interruption)
        self._eval_total = torch.zeros(2, dtype=torch.float64)
        self.sweep = None if entries is None else Sweep(self, entries, others.get("callbacks"), given)

    def add_callback(self, callback: Any) -> None:
        """As the stock Trainer; of a sweep every member gets a copy."""
        super().add_callback(callback)
        if self.sweep is not None:
            self.sweep.add_callback(callback)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The stock loader, of anything that `eval_dataset` may be at construction, or of one of its parts by name."""
        named = (
            isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict) and eval_dataset in self.eval_dataset
        )
        return super().get_eval_dataloader(eval_dataset if named else self._prepared(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The stock loader, of anything that `eval_dataset` may be at construction."""
        return super().get_test_dataloader(self._prepared(test_dataset))

    def _get_dataloader(self, dataset: Any, **options: Any) -> DataLoader:
        """The stock loader; in an evaluation by several processes none of its samples counts twice."""
        processes = self.accelerator.num_processes
        is_stream = isinstance(dataset, IterableDataset)
        if processes > 1 and not options.get("is_training") and not is_stream:
            dataset = WholeRounds(dataset, processes * options["batch_size"])
        return super()._get_dataloader(dataset, **options)

    def _prepared(self, data: Any) -> Any:
        return self._tokenized(data, self.processing_class, self.args, self.accelerator.unwrap_model(self.model))

    def _tokenized(
        self, data: Any, tokenizer: Any, args: TrainingArguments, model: LadderForCausalLM, is_training: bool = False
    ) -> Any:
        """User data as token ids."""
        return (training_data if is_training else prepared)(data, tokenizer, args, model)

    def _default_collator(self) -> Collator | None:
        return Collator()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Sum of the losses of this pass over `num_items_in_batch`, the supervised tokens of the whole step."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch counts all processes, whose gradients DDP will average instead of adding.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only: decay would pull a gate towards one half and the mix towards the side network."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The stock optimizer, whose steps can be undone where memory runs out in one."""
        optimizer = super().create_optimizer(*args, **kwargs)
        stepping = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        if self._whole_steps is None or self._whole_steps.optimizer is not stepping:
            self._whole_steps = WholeSteps(stepping)
            limit = getattr(self.args, "max_skipped_steps", DEFAULT_MAX_SKIPPED_STEPS)
            record = Path(self.args.output_dir) / SKIPPED_FILE
            self.guarded_step = GuardedStep(stepping, limit, self._step_loss, self._describe_step, record)
        self._whole_steps.undo()  # where auto_find_batch_size starts over in the middle of a step
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The stock micro-batches of the next step, which then pass the backbone together."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._step_losses, self._step_samples = [], [batch.pop("sample_ids", None) for batch in batches]
        # DDP hooks into one forward per backward, and a graph is of one micro-batch.
        is_alone = self.accelerator.num_processes == 1 and self.step_graphs is None
        self.layer_major.begin(batches if is_alone else ())
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The stock step, with its tokens counted; with `cuda_graph`, what a graph has captured of it."""
        self.clock.count(inputs["input_ids"].numel(), 0.0 if self.clock.card_flops is None else self._flops(inputs))
        stock_step = super().training_step
        if self.step_graphs is None:
            passed = self.layer_major.take(self.accelerator.unwrap_model(model), inputs, self._prepare_inputs)
            loss = stock_step(model, {**inputs, "passed": passed}, num_items_in_batch)
            self._step_losses.append(loss)
            return loss
        # What the stock step does before its first kernel, which a replay would leave out.
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        batch = {**self._prepare_inputs(inputs), "num_items_in_batch": num_items_in_batch}
        loss = self.step_graphs(lambda batch: stock_step(model, *_without_count(batch)), batch)
        self._step_losses.append(loss)
        return loss

    def _step_loss(self) -> Tensor:
        """The loss of the step that is about to be taken; processes agree on its gradient, not on this."""
        if self.args.world_size > 1 or not self._step_losses:
            return torch.zeros((), device=self.args.device)
        return torch.stack([loss.detach().float() for loss in self._step_losses]).sum()

    def _describe_step(self) -> dict[str, Any]:
        return {"step": self.state.global_step + 1, "samples": self._step_samples, "process": self.args.process_index}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Mean loss of one batch; its sum and number of tokens are added to the evaluation's totals."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = model(**inputs, num_items_in_batch=1)
        self._eval_total += torch.stack((outputs.loss.double(), outputs.num_supervised.double()))
        return outputs.loss / outputs.num_supervised.clamp_min(1), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stock loop, whose loss is the mean over all supervised tokens of the set instead of over batches."""
        self._eval_total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with self.clock.stopped():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        loss_sum, count = self.accelerator.reduce(self._eval_total, reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / max(count, 1)
        return output

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput | dict[str, TrainOutput]:
        """The stock training; afterwards `clock` holds the seconds and tokens of its steps. Of a sweep, see `Sweep`.

        Raises:
            MemoryPlanError: it would need more memory than is free, and `ignore_memory_plan` is not set.
            TrainingMemoryError: memory ran out all the same; the model is as the last whole step left it.
            DivergedError: too many gradients in a row were not finite; the weights are from before them.
            CheckpointError: there is nothing to resume from, or it would not go on as it was.
            SystemExit: SIGTERM (status 143) or SIGINT (130), after a checkpoint.
        """
        if self.sweep is not None:
            return self.sweep.train(*args, **kwargs)
        self._fit_memory()
        try:
            output = super().train(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            phase = release(error)
            self._return_to_whole_step()
            device, step = self.accelerator.device, self.state.global_step
            message = explain(*self._fitted, device, self.peak_memory.mib(), phase, step)
            raise TrainingMemoryError(f"{message}\n{error}") from error
        self.clock.stop()
        return output

    def _return_to_whole_step(self) -> None:
        """Drop what an unfinished step has left: changed parameters, gradients, and passes made ahead."""
        self.clock.stop()
        self.layer_major.begin(())
        if self._whole_steps is not None:
            self._whole_steps.undo()
        self.model.zero_grad()
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            scaler.scale(torch.zeros((), device=self.args.device))  # it may not have scaled anything yet
            scaler.update(scaler.get_scale())  # forgets that gradients were unscaled
        self.is_in_train = False
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _taps(self) -> str:
        """The policy that was asked for: by the arguments, or by freezing the down-projections."""
        taps = getattr(self.args, "taps", "auto")
        if taps == "auto" and self.accelerator.unwrap_model(self.model).side_network.tap_policy == "none":
            return "none"
        # A graph replays copies into host memory that others own by then.
        return "device" if taps == "auto" and self.step_graphs is not None else taps

    def _fit_memory(self, taps: str | None = None) -> None:
        """Choose what fits beside the loaded backbone, in a sweep what fits for all; raise where that is not free.

        Args:
            taps: the policy; None: as asked for.
        """
        model = self.accelerator.unwrap_model(self.model)
        self._fitted = self.fit_of_sweep or fit_memory(self, [model.ladder_config], taps or self._taps())
        model.side_network.tap_policy = self._fitted.plan.policies.taps
        self.layer_major = LayerMajor(self.group_tokens or self._fitted.work.pass_rows)

    def _settings_now(self) -> dict[str, Any]:
        """Also how exactly taps are kept: of that gradients have other bits."""
        policy = self.accelerator.unwrap_model(self.model).side_network.tap_policy
        return super()._settings_now() | {"taps": "exact" if policy in ("device", "host") else policy}

    def _check_settings(self, folder: Path, manifest: Manifest) -> None:
        """Where "auto" would choose taps of other bits than were saved, those are kept if they fit."""
        saved, here = manifest.settings.get("taps"), self._settings["taps"]
        if self._taps() == "auto" and saved != here and saved in ("exact", "int8"):
            try:
                self._fit_memory("host" if saved == "exact" else saved)  # on the device they did not fit
                self._settings = self._settings_now()
            except MemoryPlanError as error:
                logger.warning("taps were %s when %s was saved, and go on %s: %s", saved, folder, here, error)
                manifest = replace(manifest, settings={**manifest.settings, "taps": here})
        super()._check_settings(folder, manifest)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The stock log with the rates since the last line, peak memory so far, and the merge gates."""
        if "loss" in logs:
            logs |= self.clock.rates()
            logs["peak_memory_mib"] = round(self.peak_memory.mib(), 1)
            self._spikes(self.state.global_step, logs["loss"])
            gates = self.accelerator.unwrap_model(self.model).side_network.gates().tolist()
            if gates:
                logs |= {"gate_mean": sum(gates) / len(gates), "gate_min": min(gates), "gate_max": max(gates)}
        super().log(logs, *args, **kwargs)

    def _flops(self, batch: Mapping[str, Any]) -> float:
        """Arithmetic of a micro-batch; what a foreign collator does not say is taken as the most it can be."""
        model, ids, rows = self.accelerator.unwrap_model(self.model), batch["input_ids"], batch.get("supervised_rows")
        lengths = batch.get("document_lengths") or [ids.shape[-1]] * ids.shape[0]
        supervised = ids.numel() if rows is None else rows.numel()
        return pass_flops(model.backbone.config, model.ladder_config, lengths, supervised)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The adapter folder, tokenizer included; no pickled arguments."""
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, tokenizer=self.processing_class)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.clock.stopped():
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        ladder = self.accelerator.unwrap_model(self.model if model is None else model)
        load_adapter(resume_from_checkpoint, ladder.side_network, ladder.backbone)


class LadderTrainer(LadderMixin, Trainer):
    """`transformers.Trainer` with its signature, for side networks on a frozen backbone.

    Args:
        model: a `LadderForCausalLM`, or the path or hub id of a backbone; a side network of `ladder_config` (default:
            the preset "ladder") is then put beside it.
        args: `LadderArguments` or any `transformers.TrainingArguments`.
        train_dataset, eval_dataset: a jsonl path, a `datasets.Dataset`, a list of dictionaries (see
            `engine.data.dataset`), a `datasets.IterableDataset` or torch stream of such records (see
            `engine.data.streaming`; training then needs max_steps), or a torch data set of samples with `input_ids` and
            `labels`; evaluation also takes a dictionary of these.
        processing_class: the tokenizer; default: the backbone's.
        ladder_config: keyword only.
        sweep: keyword only; a list of mappings, each what one of several side networks, trained together on the same
            batches from one backbone pass, has different: see `engine.training.sweep`.

    Raises:
        ValueError: arguments that would need logits (label smoothing, compute_metrics, compute_loss_func), more than
            one GPU in one process, or cuda_graph where no graph can be; data that cannot be trained on (`DataError`).
    """


def _tokenizer_if_any(model: LadderForCausalLM) -> PreTrainedTokenizerBase | None:
    """The backbone's tokenizer; a backbone without one can still train on token ids."""
    try:
        return model.backbone.tokenizer()
    except ValueError:
        return None


def _without_count(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The model's inputs of a batch and its `num_items_in_batch`."""
    inputs = dict(batch)
    count = inputs.pop("num_items_in_batch")
    return inputs, count
