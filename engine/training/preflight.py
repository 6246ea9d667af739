"""Before training starts: what it will hold against what is free, from config.json before loading and again after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from engine.backbone import Backbone
from engine.backbone.families import BackboneConfig, backbone_config, parse_config
from engine.backbone.files import CONFIG, locate, read_json
from engine.backbone.host_memory import available_bytes
from engine.backbone.shards import CheckpointError
from engine.config import LadderConfig
from engine.dtypes import compute_dtype
from engine.memory.plan import MemoryPlan
from engine.memory.planner import Planner, parse_bytes, usable_bytes
from engine.memory.workload import GB, MemoryPolicies, Workload
from engine.training.arguments import optimizer_policy, workload

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
        "taps": tap_policies(work, taps),
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


def load_options(source: str | Path, ladder_config: LadderConfig | None, args: TrainingArguments) -> dict[str, Any]:
    """Where `load_backbone` puts a backbone so that training fits the `memory_budget` of its arguments."""
    options: dict[str, Any] = {"device": args.device}
    budget = getattr(args, "memory_budget", None)
    if budget is not None:
        planner = Planner(read_shape(source), ladder_config or LadderConfig())
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
    for policy in tap_policies(work, taps):
        plan = planner.plan(work, replace(loaded, taps=policy))
        if free is None or plan.peak_bytes - plan.loaded_bytes <= free:
            break
    if free is None:
        return plan, 1
    group = planner.largest_group(work, plan.policies, plan.loaded_bytes + int(GROUP_SHARE * free))
    if on_host := plan.host["taps"]:
        group = max(1, min(group, int(GROUP_SHARE * (available_bytes() or 0)) // on_host))
    return plan, group


def tap_policies(work: Workload, taps: str) -> tuple[str, ...]:
    """The policies that `taps` leaves to choose from; to a CPU host memory is the device's, with a copy on top."""
    if taps != "auto":
        return (taps,)
    return TAPS if work.device_type == "cuda" else TAPS[:-1]


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
