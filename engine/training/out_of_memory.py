"""Memory that ran out in training: back to the last whole step, and one error with the plan, the facts and remedies."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from engine.memory.plan import MemoryPlan
from engine.memory.planner import Planner
from engine.memory.workload import GB, Workload
from engine.training.preflight import free_bytes

_MESSAGES = (
    "DefaultCPUAllocator",  # a plain RuntimeError of torch's allocator on a CPU
    "CUDA error: out of memory",  # page-locked memory, and whatever else torch does not allocate itself
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_PHASES = (  # module of a frame, and the phase of `engine.memory.plan` that it belongs to
    ("engine.backbone", "backbone pass"),
    ("engine.model.side_network", "side forward"),
    ("engine.model.tap_store", "side forward"),
    ("ladder_kernels.linear_cross_entropy", "loss"),
    ("torch.autograd.graph", "backward"),
    ("torch.optim", "optimizer"),
    ("torch.nn.utils.clip_grad", "optimizer"),
)
_WHOLE_PHASES = ("backward", "optimizer")  # whatever runs inside of them is theirs
_PLAN_ERROR = 0.05  # of the plan's peak: a remedy that saves less may save nothing


class TrainingMemoryError(torch.OutOfMemoryError):
    """Memory ran out; the model is as the last whole step left it, and the message says what would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that memory ran out: on a GPU, on a CPU, or in Python itself."""
    return any(
        isinstance(one, torch.OutOfMemoryError | MemoryError)
        or (isinstance(one, RuntimeError) and any(message in str(one) for message in _MESSAGES))
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def release(error: BaseException) -> str | None:
    """Let go of the tensors that the frames of an error hold.

    Returns:
        the phase in which it was raised, as `engine.memory.plan` calls it; None where that is none of them.
    """
    phase = None
    for one in _chain(error):
        phase = _phase(one.__traceback__) or phase
        traceback.clear_frames(one.__traceback__)
    return phase


def _phase(trace: TracebackType | None) -> str | None:
    found = None
    for frame, _ in traceback.walk_tb(trace):
        module = frame.f_globals.get("__name__", "")
        found = next((phase for prefix, phase in _PHASES if f"{module}.".startswith(f"{prefix}.")), found)
        if found in _WHOLE_PHASES:
            return found
    return found


class WholeSteps:
    """Undoes an optimizer step that memory did not suffice for.

    A step whose every group is fused and has its moments allocates nothing, so it cannot end halfway and costs nothing
    here. Before any other one, parameters and state are copied to host memory. Those are the first step, which makes
    the moments of a group after the group before has moved (4 bytes a parameter), and every step of optimizers with
    temporaries: foreach, 8 bit.

    Args:
        optimizer: gets hooks around its `step`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._before: _Copy | None = None
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def undo(self) -> None:
        """Parameters and state as they were before the step that did not end, if there is one."""
        if self._before is not None:
            self._before.restore(self.optimizer)
            self._before = None

    def _begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before = None if _allocates_nothing(optimizer) else _Copy(optimizer)

    def _end(self, *_: Any) -> None:
        self._before = None


def _allocates_nothing(optimizer: torch.optim.Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups) and all(
        optimizer.state.get(parameter) for parameter in _parameters(optimizer) if parameter.grad is not None
    )


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


class _Copy:
    """Parameters, their state and the groups' numbers, in host memory."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._values = [
            (parameter, _host(parameter), {name: _host(value) for name, value in optimizer.state[parameter].items()})
            if parameter in optimizer.state
            else (parameter, _host(parameter), None)
            for parameter in _parameters(optimizer)
        ]
        self._groups = [{k: _host(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Write everything back where it is: there may be no memory for new tensors."""
        for parameter, value, state in self._values:
            parameter.copy_(value)
            if state is None:
                optimizer.state.pop(parameter, None)
            else:
                _put_back(optimizer.state[parameter], state)
        for group, numbers in zip(optimizer.param_groups, self._groups, strict=True):
            _put_back(group, numbers)


def _host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _put_back(live: dict[str, Any], kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        if isinstance(value, Tensor):
            live[name].copy_(value)
        else:
            live[name] = value


def explain(
    planner: Planner,
    work: Workload,
    plan: MemoryPlan,
    device: torch.device,
    peak_mib: float,
    phase: str | None,
    step: int,
) -> str:
    """What a person needs who has run out of memory.

    Args:
        planner: of the backbone and side network.
        work: what was trained.
        plan: for it.
        device: where.
        peak_mib: measured, as by `engine.training.summary.PeakMemory`.
        phase: in which it happened, None if that is not known.
        step: the last whole optimizer step.
    """
    is_card = device.type == "cuda"
    free = free_bytes(device)
    held = torch.cuda.memory_allocated(device) if is_card else plan.loaded_bytes
    noticeable = int((1 - _PLAN_ERROR) * plan.peak_bytes)
    remedies = planner.remedies(work, plan.policies, noticeable if free is None else min(noticeable, free + held))
    planned = plan.peak_bytes if is_card else plan.peak_bytes - plan.loaded_bytes
    beside = "" if is_card else " beside what is loaded"
    return (
        f"out of memory in {'training' if phase is None else f'the phase {phase!r}'} of step {step + 1}, at batch "
        f"{work.batch} of up to {work.tokens} tokens. Parameters, optimizer and schedule are those of step {step}: "
        "save_model() keeps them.\n"
        f"Planned: {_gb(planned)} at the peak{beside} ({plan.peak_phase}). Measured: {_gb(int(peak_mib * 2**20))}. "
        f"Free now: {'unknown' if free is None else _gb(free)}.\n"
        f"The plan's {_gb(plan.peak_bytes)} in all would become, with\n" + "\n".join(f"  {text}" for text in remedies)
    )


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"
