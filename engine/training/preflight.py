"""Before training starts: what it will hold against what is free, from config.json before loading and again after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from engine.backbone import Backbone
from engine.backbone.families import BackboneConfig, backbone_config, parse_config
from engine.backbone.files import CONFIG, locate, read_json
from engine.backbone.host_memory import available_bytes
from engine.backbone.shards import CheckpointError
from engine.config import LadderConfig
from engine.data.dataset import TokenizedDataset
from engine.data.packing import PackedDataset
from engine.dtypes import compute_dtype
from engine.memory.plan import MemoryPlan
from engine.memory.planner import Planner, parse_bytes, usable_bytes
from engine.memory.workload import GB, MemoryPolicies, Workload
from engine.training.arguments import optimizer_policy, workload
from engine.training.data_parallel import all_reduced_bytes

TAPS = ("device", "int8", "host")  # from the fastest to the leanest; "none" trains less and is never chosen
GROUP_SHARE = 0.85  # of free memory for groups: the plan is off by up to a tenth, and allocators leave gaps


class MemoryPlanError(ValueError):
    """Training would need more memory than is free; the message says how much, and what would help."""


def read_shape(source: str | Path) -> BackboneConfig:
    """The shapes of a backbone from its config.json: a folder, the file itself, or a hub id.

    Raises:
        ValueError: there is none, or it describes no supported model.
    """
    path = Path(source).expanduser()
    folder, name = (path.parent.resolve(), path.name) if path.is_file() else (locate(source), CONFIG)
    try:
        return backbone_config(parse_config(read_json(folder, name)))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / name}: {error}") from error


def policies_of(backbone: Backbone) -> MemoryPolicies:
    """The policies that a backbone was loaded with."""
    streamed = backbone.layers.num_streamed
    return MemoryPolicies(
        residency="host" if streamed else "device",
        resident_layers=len(backbone.blocks) - streamed,
        prefetch=backbone.layers.prefetch,
        head_dtype=backbone.head_dtype,  # type: ignore[arg-type]
    )


def free_bytes(device: torch.device | str) -> int | None:
    """What can still be allocated: on a GPU free memory and what torch keeps unused, else memory the system can give.

    A share of the GPU that was set for this process (`set_per_process_memory_fraction`) counts as its whole memory.
    None where the system does not say.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        own = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
        return min(free, own) + reserved - torch.cuda.memory_allocated(device)
    return available_bytes()


def place_backbone(
    planner: Planner, work: Workload, budget: str, taps: str = "auto", settled: MemoryPolicies | None = None
) -> tuple[MemoryPlan, dict[str, Any]]:
    """The plan with which training fits a device of so much memory, and the options of `load_backbone` for it.

    Head and optimizer change what is learned, so they are never chosen here.

    Args:
        planner: of the backbone and side network.
        work: what will be trained.
        budget: as a card is sold, "12GB".
        taps: "auto" or a policy.
        settled: whose head_dtype and optimizer training has; None: the defaults.

    Raises:
        MemoryPlanError: nothing fits; the message says what would.
    """
    usable = usable_bytes(parse_bytes(budget))
    settled = settled or MemoryPolicies()
    choices = {
        "taps": tap_policies(work, taps, bool(planner.beside)),
        "head_dtype": (settled.head_dtype,),
        "optimizer": (settled.optimizer,),
    }
    plan = planner.choose(work, usable, choices)
    if plan is None:
        leanest = planner.leanest(work, choices)
        remedies = planner.remedies(work, leanest.policies, usable)
        raise MemoryPlanError(
            f"memory_budget {budget}: of it {usable / GB:.2f} GB can be used, and {leanest.policies.describe()} still "
            f"needs {leanest.peak_bytes / GB:.2f} GB at batch {work.batch} of {work.tokens} tokens. It would be with\n"
            + "".join(f"  {remedy}\n" for remedy in remedies)
        )
    if plan.policies.residency == "device":
        return plan, {}
    layers = plan.phases["load"]
    return plan, {"residency": "auto", "layer_budget": layers["backbone layers"] + layers["layers in flight"]}


def load_options(source: str | Path, configs: Sequence[LadderConfig], args: TrainingArguments) -> dict[str, Any]:
    """Where `load_backbone` puts a backbone so that training fits the `memory_budget` of its arguments."""
    options: dict[str, Any] = {"device": args.device}
    budget = getattr(args, "memory_budget", None)
    if budget is not None:
        planner = Planner(read_shape(source), configs[0], beside=tuple(configs[1:]))
        work = workload(args, args.device.type, compute_dtype(args.device).itemsize)
        settled = MemoryPolicies(optimizer=optimizer_policy(args))
        options |= place_backbone(planner, work, budget, getattr(args, "taps", "auto"), settled)[1]
    return options


def fit_training(
    planner: Planner, work: Workload, loaded: MemoryPolicies, taps: str, free: int | None
) -> tuple[MemoryPlan, int]:
    """What is left to choose beside a loaded backbone: where taps are kept, and how many micro-batches go together.

    Args:
        planner: of the backbone and side network.
        work: what will be trained, one micro-batch in a pass.
        loaded: the policies that are settled.
        taps: "auto" or a policy. "auto" takes the first of `tap_policies` that fits, or the last.
        free: bytes beside what is loaded; None where that is not known.

    Returns:
        the plan, and the micro-batches of a group.
    """
    for policy in tap_policies(work, taps, bool(planner.beside)):
        plan = planner.plan(work, replace(loaded, taps=policy))
        if free is None or plan.peak_bytes - plan.loaded_bytes <= free:
            break
    if free is None:
        return plan, 1
    group = planner.largest_group(work, plan.policies, plan.loaded_bytes + int(GROUP_SHARE * free))
    if on_host := plan.host["taps"]:
        group = max(1, min(group, int(GROUP_SHARE * (available_bytes() or 0)) // on_host))
    return plan, group


class Fit(NamedTuple):
    """What a training was planned with, its groups chosen."""

    planner: Planner
    work: Workload
    plan: MemoryPlan


def fit_memory(trainer: Any, configs: Sequence[LadderConfig], taps: str) -> Fit:
    """Choose what fits beside a trainer's loaded backbone, and print what training will hold.

    Args:
        trainer: a `LadderMixin`, ready to train.
        configs: of every side network that will train on the same passes.
        taps: "auto" or a policy.

    Raises:
        MemoryPlanError: that is not free, and `ignore_memory_plan` is not set.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    backbone, budget = model.backbone, getattr(args, "memory_budget", None)
    planner = Planner(backbone.config, configs[0], beside=tuple(configs[1:]))
    work = workload(args, backbone.device.type, backbone.dtype.itemsize, longest_sample(trainer))
    if trainer.eval_dataset is not None:
        work = replace(work, eval_batch=args.per_device_eval_batch_size)
    loaded = replace(policies_of(backbone), optimizer=optimizer_policy(args))
    free = free_bytes(backbone.device)
    if budget is not None:
        is_card = backbone.device.type == "cuda"
        held = torch.cuda.memory_allocated(backbone.device) if is_card else planner.plan(work, loaded).loaded_bytes
        beside = max(usable_bytes(parse_bytes(budget)) - held, 0)
        free = beside if free is None else min(beside, free)
    plan, group = fit_training(planner, work, loaded, taps, free)
    needed = plan.peak_bytes - plan.loaded_bytes
    if trainer.is_world_process_zero():
        known = "unknown" if free is None else f"{free / GB:.2f} GB"
        of = f" of {len(configs)} side networks" if len(configs) > 1 else ""
        print(f"Memory plan{of}: {needed / GB:.2f} GB more at the peak ({plan.peak_phase}), free: {known}")
        if (processes := trainer.accelerator.num_processes) > 1:
            reduced = all_reduced_bytes(model) / 1e6
            print(f"Data parallel: {processes} processes, {reduced:.2f} MB all-reduced per step, side network only")
    if not getattr(args, "ignore_memory_plan", False):
        check_free(planner, work, plan.policies, needed, free)
    work = replace(work, group=group)
    return Fit(planner, work, planner.plan(work, plan.policies))


def longest_sample(trainer: Any) -> int | None:
    """Tokens of the longest sample or packed row, where all data sets were tokenized here."""
    parts = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    data = [part for part in (trainer.train_dataset, *parts) if part is not None]
    if not all(isinstance(part, TokenizedDataset | PackedDataset) for part in data):
        return None
    return max((part.longest for part in data), default=None)


def tap_policies(work: Workload, taps: str, is_sweep: bool = False) -> tuple[str, ...]:
    """The policies that `taps` leaves to choose from; to a CPU host memory is the device's, with a copy on top.

    The networks of a sweep share what waits on the device or the host, and would keep int8 codes once for each.
    """
    if taps != "auto":
        return (taps,)
    policies = TAPS if work.device_type == "cuda" else TAPS[:-1]
    return tuple(policy for policy in policies if not (is_sweep and policy == "int8"))


def check_free(planner: Planner, work: Workload, policies: MemoryPolicies, needed: int, free: int | None) -> None:
    """Refuse to start where `needed` bytes are more than `free` ones.

    Raises:
        MemoryPlanError: with the plan's numbers, up to three remedies, and how to start all the same.
    """
    if free is None or needed <= free:
        return
    plan = planner.plan(work, policies)
    worst = sorted(plan.phases[plan.peak_phase].items(), key=lambda item: -item[1])[:4]
    largest_parts = ", ".join(f"{part} {size / GB:.2f}" for part, size in worst)
    remedies = planner.remedies(work, policies, plan.peak_bytes - needed + free)
    raise MemoryPlanError(
        f"training would need {needed / GB:.2f} GB more on the {work.device_type} device, {free / GB:.2f} GB are free. "
        f"The peak of {plan.peak_bytes / GB:.2f} GB is in the phase {plan.peak_phase!r} ({largest_parts}), at batch "
        f"{work.batch} of {work.tokens} tokens. It would be with\n"
        + "".join(f"  {remedy}\n" for remedy in remedies)
        + "Set ignore_memory_plan (--ignore-memory-plan) to start all the same."
    )
