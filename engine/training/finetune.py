"""The main job: a backbone and a jsonl file in, a trained side network, its measurements and two samples out."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.backbone.families import expected_tensors
from engine.checkpoints.lock import only_training
from engine.checkpoints.processes import all_or_none
from engine.checkpoints.store import checkpoints
from engine.config import LadderConfig
from engine.data.collator import IGNORE_INDEX
from engine.data.dataset import TokenizedDataset, prepare_dataset, show_sample
from engine.data.records import DataError, Records, read_records
from engine.dtypes import compute_dtype
from engine.inference.generate import generate_text
from engine.memory.planner import Planner, plan_summary
from engine.memory.workload import MemoryPolicies
from engine.model.adapter import CONFIG_NAME, check_no_foreign_model
from engine.model.causal_lm import LadderForCausalLM
from engine.quickstart import defaults
from engine.training.arguments import LadderArguments, optimizer_policy, workload
from engine.training.options import OPTIMIZERS, TrainOptions
from engine.training.preflight import check_free, fit_training, free_bytes, place_backbone, read_shape
from engine.training.summary import SUMMARY_FILE, PeakMemory, Summary
from engine.training.sweep_entries import sweep_entries
from engine.training.trainer import LadderTrainer

HELDOUT_SHARE, MAX_HELDOUT = 0.05, 200
SHOWN_CHARACTERS = 600
SHOWN_NEW_TOKENS = 64

Echo = Callable[[str], None]


@dataclass(frozen=True)
class TrainData:
    """Tokenized data, and what they are in words."""

    train: TokenizedDataset
    heldout: TokenizedDataset
    description: str


def finetune(options: TrainOptions, echo: Echo) -> Summary:
    """Train a side network and leave adapter and summary.json in `options.output`.

    Under torchrun every process trains, and the first one prints and writes.

    Args:
        options: what to train on what; None for model or data means the shipped one.
        echo: prints one message.

    Raises:
        ValueError: an output folder that holds a finished run, or in which another training runs, a backbone or
            configuration that cannot be used, or data that cannot be trained on (`DataError`).
    """
    arguments = training_arguments(options)
    output = Path(options.output)
    is_first = arguments.process_index == 0
    with contextlib.ExitStack() as held:

        def take() -> None:
            take_output(output, held)
            check_output(output, options.overwrite, options.resume)

        all_or_none(take if is_first else None)
        return _run(options, arguments, echo if is_first else lambda message: None)


def _run(options: TrainOptions, arguments: LadderArguments, echo: Echo) -> Summary:
    """Everything but the check of the output folder."""
    memory = PeakMemory(arguments.device)
    trainer, data = build_trainer(options, arguments, echo)
    model, tokenizer = trainer.model, trainer.processing_class
    before = trainer.evaluate()["eval_loss"]
    echo(f"Held-out loss before training: {before:.4f}")
    steps = trainer.train(resume_from_checkpoint=options.resume or None).global_step
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(options.output)
    summary = Summary(
        heldout_loss_before=before,
        heldout_loss_after=after,
        steps=steps,
        seconds=round(trainer.clock.seconds, 3),
        tokens_per_second=round(trainer.clock.tokens / trainer.clock.seconds, 1) if trainer.clock.seconds else 0.0,
        peak_mib=round(memory.mib(), 1),
        trainable_parameters=_trainable(model),
        preset=options.preset,
        device=arguments.device.type,
    )
    if trainer.is_world_process_zero():
        for number in sorted({0, len(data.heldout) // 2}):
            echo(_generation(model, tokenizer, data.heldout[number], number))
        summary.write(Path(options.output))
    echo(_result(summary, Path(options.output)))
    trainer.accelerator.end_training()
    return summary


def side_config(options: TrainOptions) -> LadderConfig:
    """The side network that the options ask for."""
    return LadderConfig.preset(options.preset, reduction_factor=options.reduction_factor, seed=options.seed)


def build_trainer(
    options: TrainOptions,
    arguments: LadderArguments,
    echo: Echo,
    sweep: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[LadderTrainer, TrainData]:
    """Backbone, data and trainer of a run, described to the user.

    Args:
        options: what to train on what.
        arguments: those of the options.
        echo: prints one message.
        sweep: of a sweep, what its members have different.

    Raises:
        ValueError: as `finetune`.
    """
    # The cheap checks come before the expensive load.
    config, device = side_config(options), arguments.device
    entries = [] if sweep is None else sweep_entries(sweep, config, arguments)
    records = _records(options)
    source = options.model or defaults.backbone_path()
    configs = [entry.config for entry in entries] or [config]
    placement = _plan(options, arguments, source, configs, echo)
    model = LadderForCausalLM.from_backbone(source, config, device=device, head_dtype=options.head_dtype, **placement)
    tokenizer = model.backbone.tokenizer()
    data = _tokenized(options, records, tokenizer, model)
    echo(_describe(options, model, data, device.type))
    context = model.backbone.config.max_position_embeddings
    if options.max_length > context:
        echo(f"Warning: max_length {options.max_length} is beyond the {context} positions the backbone was made for.")
    echo("First sample, with [[ ]] around what the loss is on:\n" + _indented(show_sample(data.train[0], tokenizer)))
    trainer = LadderTrainer(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        processing_class=tokenizer,
        sweep=sweep,
    )
    if options.packing:
        echo(f"Packed        {trainer.train_dataset.description}")
    return trainer, data


def _plan(
    options: TrainOptions,
    arguments: LadderArguments,
    source: str,
    configs: Sequence[LadderConfig],
    echo: Echo,
) -> dict[str, Any]:
    """Print the memory that the run will take; raise where that is not free.

    Returns:
        options of `load_backbone`.
    """
    planner, device = Planner(read_shape(source), configs[0], beside=tuple(configs[1:])), arguments.device
    work = workload(arguments, device.type, compute_dtype(device).itemsize)
    work = replace(work, eval_batch=arguments.per_device_eval_batch_size)
    placement: dict[str, Any] = {}
    free = free_bytes(device)
    settled = MemoryPolicies(head_dtype=options.head_dtype, optimizer=optimizer_policy(arguments))
    if arguments.memory_budget is not None:
        plan, placement = place_backbone(planner, work, arguments.memory_budget, arguments.taps, settled)
    else:
        loaded = planner.plan(work, settled).loaded_bytes
        plan, _ = fit_training(planner, work, settled, arguments.taps, None if free is None else free - loaded)
    echo("\n".join(plan_summary(plan)))
    if not arguments.ignore_memory_plan:
        check_free(planner, work, plan.policies, plan.peak_bytes, free)
    return placement


def take_output(output: Path, held: contextlib.ExitStack) -> None:
    """Keep other trainings out of a folder that is there, as long as `held` lasts."""
    if output.is_dir():
        held.enter_context(only_training(output))


def check_output(output: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse a folder that holds a run, unless it goes on, or is replaced: then what it holds is removed first.

    Raises:
        ValueError: there is a finished run, or one that was cut short, or `output` is no folder.
    """
    if overwrite and resume:
        raise ValueError("--overwrite starts over and --resume goes on: give one of them")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; choose a folder with --output")
    check_no_foreign_model(output)
    begun = checkpoints(output)
    if overwrite:
        for _, folder in begun:
            shutil.rmtree(folder)
        (output / SUMMARY_FILE).unlink(missing_ok=True)
        return
    # An adapter beside checkpoints and without a summary was cut short while it was written.
    found = [name for name in (SUMMARY_FILE, CONFIG_NAME) if (output / name).exists()]
    if SUMMARY_FILE in found or (found and not begun):
        raise ValueError(
            f"{output}: holds a finished run ({', '.join(found)}); choose another folder with --output, or replace it "
            "with --overwrite"
        )
    if begun and not resume:
        raise ValueError(
            f"{output}: holds a training that did not end (step {begun[-1][0]}); go on with --resume, choose another "
            "folder with --output, or start over with --overwrite"
        )


def _records(options: TrainOptions) -> tuple[Records, Records, str]:
    """Training records, held-out records, and where the latter come from."""
    if options.data is None:
        train = read_records(defaults.train_path())
        heldout = read_records(options.eval_data or defaults.heldout_path())
        return train, heldout, "other modules" if options.eval_data is None else options.eval_data
    train = read_records(options.data)
    if options.eval_data is not None:
        return train, read_records(options.eval_data), options.eval_data
    count = min(max(round(len(train) * HELDOUT_SHARE), 1), MAX_HELDOUT)
    if len(train) <= count:
        raise DataError("holds one record; add more, or name held-out data with --eval-data", source=options.data)
    return *train.split(count, options.seed), f"drawn from the data with seed {options.seed}"


def _tokenized(
    options: TrainOptions,
    records: tuple[Records, Records, str],
    tokenizer: PreTrainedTokenizerBase,
    model: LadderForCausalLM,
) -> TrainData:
    train, heldout = (
        prepare_dataset(part, tokenizer, max_length=options.max_length, vocab_size=model.backbone.config.vocab_size)
        for part in records[:2]
    )
    description = (
        f"{len(train):,} samples, {train.num_tokens:,} tokens; held out: {len(heldout):,} samples, {records[2]}"
    )
    return TrainData(train, heldout, description)


def training_arguments(options: TrainOptions) -> LadderArguments:
    """The trainer's arguments of the options."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = options.steps or -1
    return LadderArguments(
        output_dir=options.output,
        max_steps=steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        max_length=options.max_length,
        packing=options.packing,
        longest_first=options.longest_first,
        optim=OPTIMIZERS[options.optimizer],
        taps=options.taps,
        memory_budget=options.budget,
        ignore_memory_plan=options.ignore_memory_plan,
        seed=options.seed,
        logging_steps=max(steps // 10, 1) if options.steps else 10,
        save_strategy="steps",
        save_steps=options.save_steps,
        use_cpu=device == "cpu",
        # fp16 gradients of single tokens underflow without a loss scale.
        fp16=device == "cuda" and compute_dtype(device) == torch.float16,
        dataloader_pin_memory=device != "cpu",
    )


def _describe(options: TrainOptions, model: LadderForCausalLM, data: TrainData, device: str) -> str:
    backbone, dims = model.backbone, model.side_network.dims
    name = options.model or "the shipped quickstart model"
    precision = str(backbone.dtype).removeprefix("torch.")
    return (
        f"Backbone      {name}: {backbone_parameters(model):,} parameters, {backbone.nbytes / 2**20:,.1f} MiB, frozen\n"
        f"Side network  {options.preset}: {_trainable(model):,} trainable parameters, "
        f"{model.side_network.num_side_layers} layers of width {dims.side_dim}\n"
        f"Data          {data.description}\n"
        f"Device        {device}, {precision}"
    )


def backbone_parameters(model: LadderForCausalLM) -> int:
    """Parameters of the frozen backbone before quantization, a tied head counted once."""
    return sum(torch.Size(tensor.shape).numel() for tensor in expected_tensors(model.backbone.config).values())


def _trainable(model: LadderForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _generation(
    model: LadderForCausalLM, tokenizer: PreTrainedTokenizerBase, sample: dict[str, Tensor], number: int
) -> str:
    """One held-out prompt, what the data says follows, and what the model says."""
    ids, learned = sample["input_ids"], (sample["labels"] != IGNORE_INDEX).long()
    start = int(learned.argmax())
    if start <= 1:
        start, end = max(len(ids) // 2, 1), len(ids)
    else:
        end = start + int(learned[start:].cumprod(0).sum())
    reference = tokenizer.decode(ids[start:end], skip_special_tokens=True)
    answer = generate_text(model, tokenizer, ids[:start], SHOWN_NEW_TOKENS).text
    return (
        f"Held-out sample {number + 1}\n  prompt:\n{_indented(tokenizer.decode(ids[:start]), keep_end=True)}\n"
        f"  reference:\n{_indented(reference)}\n  generated:\n{_indented(answer)}"
    )


def _indented(text: str, keep_end: bool = False) -> str:
    if len(text) > SHOWN_CHARACTERS:
        text = "... " + text[-SHOWN_CHARACTERS:] if keep_end else text[:SHOWN_CHARACTERS] + " ..."
    return "\n".join("    " + line for line in text.splitlines())


def _result(summary: Summary, output: Path) -> str:
    before, after = summary.heldout_loss_before, summary.heldout_loss_after
    change = 100 * (after - before) / before if before else 0.0
    kind = "allocated" if summary.device == "cuda" else "resident memory growth"
    return (
        f"Held-out loss  {before:.4f} -> {after:.4f} ({change:+.1f}%)\n"
        f"Speed          {summary.tokens_per_second:,.0f} tokens/s, {summary.steps} steps in {summary.seconds:.1f} s\n"
        f"Peak memory    {summary.peak_mib:,.0f} MiB {kind}\n"
        f"Saved          {output} (adapter and {SUMMARY_FILE})\n"
        "Continue with\n"
        f'  ladder generate --adapter {output} --prompt "..."\n'
        "  ladder train --model Qwen/Qwen2.5-0.5B --data mine.jsonl --output my-adapter"
    )
