"""Training passes in CUDA graphs: forward, loss and backward of a micro-batch, captured once, replayed as one launch.

A graph repeats the kernels of one pass on the memory of that pass. So, for a shape of batches that keeps coming back:

- a batch is copied into the input tensors that were captured;
- gradients live in tensors that outlast the steps. Where `zero_grad()` has dropped one it is put back, filled with
  zeros, and the captured backward adds to it, as the second micro-batch of a step always does;
- what the host decides (document lengths, the number of supervised rows) is part of the shape;
- parameters and scratch memory live as long as the graph that knows their addresses.

The first passes of a shape are ordinary training passes, on the stream that captures later, as torch asks: they compile
kernels and fill the libraries' workspaces. Clipping, optimizer, schedule and logging stay outside, on `.grad`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from engine.model.causal_lm import LadderForCausalLM

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
TrainingPass = Callable[[Batch], Tensor]

EAGER_PASSES = 2  # of a shape before it is captured: the first one compiles and allocates, the second one settles
MAX_GRAPHS = 8  # they share one memory pool, so a further one costs its nodes, not its activations
REMEMBERED_SHAPES = 64
_FROM_COLLATOR = ("labels", "cu_seq_lens_q", "document_lengths", "supervised_rows", "supervised_targets")


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Do it again, on the same memory."""


class GraphMaker(Protocol):
    """Where training passes run and how they are captured."""

    def run(self, call: Callable[[], Tensor]) -> Tensor:
        """The call's result, computed now."""

    def capture(self, call: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Record what the call does, without doing it; the tensor is what every replay writes its result to."""


class CudaGraphs:
    """`GraphMaker` of a GPU: one side stream and one memory pool for all graphs.

    Graphs may share a pool in any order of replays if nobody reads the result of one after the replay of another.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], Tensor]) -> Tensor:
        """On the stream of the captures: what autograd and cuBLAS remember of a stream then belongs to this one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def capture(self, call: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Threads of a data loader may pin memory meanwhile: only this thread is held to what a capture allows."""
        graph = torch.cuda.CUDAGraph()
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self._device), torch.cuda.graph(graph, **options):
            result = call()
        return graph, result


@dataclass(frozen=True)
class _CapturedPass:
    """A graph, the tensors it reads the batch from and writes the loss to, and what must live as long as it does."""

    graph: Graph
    inputs: dict[str, Tensor]
    loss: Tensor
    kept: tuple[Tensor, ...]


class StepGraphs:
    """Runs training passes of a model, those of recurring shapes as replays of a graph.

    Args:
        model: its parameters get the gradients.
        maker: `CudaGraphs` of the model's device.
    """

    def __init__(self, model: LadderForCausalLM, maker: GraphMaker) -> None:
        self._model = model
        self._maker = maker
        self._parameters = list(model.parameters())
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._captured: dict[Hashable, _CapturedPass] = {}
        self._passes: dict[Hashable, int] = {}
        self._has_warned = False

    def __call__(self, training_pass: TrainingPass, batch: Batch) -> Tensor:
        """Add the gradients of a batch to `.grad` of the parameters.

        Args:
            training_pass: computes the loss of the batch it is given and calls backward. It must depend on nothing else
                that changes from pass to pass: Python runs for the first passes of a shape only. No loss of a pass
                made elsewhere may still hold its autograd graph, which remembers another stream.
            batch: as the collator makes it, all tensors on the model's device.

        Returns:
            The loss, detached, 0-dim.

        Raises:
            ValueError: the host would have to read the batch, or a parameter has hooks, which a replay cannot call.
            RuntimeError: a pass cannot be captured.
        """
        self._restore_gradients()
        shape = self._shape(batch)
        captured = self._captured.get(shape)
        if captured is None and not self._is_due(shape):
            self._check(batch)
            loss = self._maker.run(lambda: training_pass(batch).detach())
            self._adopt_gradients()
            return loss
        if captured is None:
            captured = self._captured[shape] = self._capture(training_pass, batch)
        else:
            for name, tensor in captured.inputs.items():
                tensor.copy_(batch[name], non_blocking=True)
        captured.graph.replay()
        return captured.loss.clone()

    def _capture(self, training_pass: TrainingPass, batch: Batch) -> _CapturedPass:
        inputs = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
        try:
            # A loss that is not detached would keep autograd's nodes, and their streams, for the next capture.
            graph, loss = self._maker.capture(lambda: training_pass({**batch, **inputs}).detach())
        except RuntimeError as error:
            raise RuntimeError(
                "cuda_graph: this training pass cannot be captured. A graph needs the memory of a pass for itself and "
                f"a pass that never waits for the device. Leave cuda_graph out, or remove the cause: {error}"
            ) from error
        kept = (*(parameter.detach() for parameter in self._parameters), *self._model.scratch())
        return _CapturedPass(graph, inputs, loss, kept)

    def _shape(self, batch: Batch) -> Hashable:
        """All that a graph of this batch holds fixed: shapes, the host's values, and which parameters are where."""
        of_batch = tuple((name, _fixed(batch[name])) for name in sorted(batch))
        return of_batch, tuple((parameter.data_ptr(), parameter.requires_grad) for parameter in self._parameters)

    def _is_due(self, shape: Hashable) -> bool:
        """Count a pass of a shape that has no graph; True if it is to get one now."""
        passes = self._passes.pop(shape, 0)
        if passes >= EAGER_PASSES and len(self._captured) < MAX_GRAPHS:
            return True
        self._passes[shape] = passes + 1  # now the newest
        if len(self._passes) > REMEMBERED_SHAPES:
            del self._passes[next(iter(self._passes))]
        if not self._has_warned and (passes >= EAGER_PASSES or len(self._passes) == REMEMBERED_SHAPES):
            self._has_warned = True
            logger.warning(
                "cuda_graph: batches come in too many shapes (%d have a graph, at most %d can), so that passes run "
                "without one. Give all samples one length, as data_collator=Collator(pad_to=max_length, "
                "row_bucket=max_length) does, or leave cuda_graph out",
                len(self._captured),
                MAX_GRAPHS,
            )
        return False

    def _check(self, batch: Batch) -> None:
        missing = [name for name in _FROM_COLLATOR if batch.get(name) is None]
        if missing or batch.get("attention_mask") is not None:
            found = f"no {', '.join(missing)}" if missing else "an attention_mask"
            raise ValueError(
                f"cuda_graph: a batch has {found}, so that the host would have to look into it: take "
                "engine.data.collator.Collator as data_collator, which is the default, or leave cuda_graph out"
            )
        device = self._parameters[0].device
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.device != device:
                raise ValueError(f"cuda_graph: {name} must be on {device}, as the model is, got {value.device}")
        if batch["cu_seq_lens_q"].dtype != torch.int32:
            raise ValueError(f"cuda_graph: cu_seq_lens_q must be int32, got {batch['cu_seq_lens_q'].dtype}")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters):
            raise ValueError(
                "cuda_graph: a parameter has hooks on its gradient, which a graph cannot call; choose an optimizer "
                "that does not step during backward (optim), remove the hooks, or leave cuda_graph out"
            )

    def _restore_gradients(self) -> None:
        """Every parameter's own gradient tensor again, zero where there was none."""
        dropped = []
        for parameter, gradient in self._gradients.items():
            if parameter.grad is gradient or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                dropped.append(gradient)
            else:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if dropped:
            torch._foreach_zero_(dropped)

    def _adopt_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._gradients.setdefault(parameter, parameter.grad)


def _fixed(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return tuple(value) if isinstance(value, list) else value


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what a captured pass cannot do.

    Raises:
        ValueError: no GPU, several processes, or an option that works between forward and backward.
    """
    if args.parallel_mode == ParallelMode.DISTRIBUTED:
        raise ValueError(
            f"cuda_graph=True trains in one process on one GPU, this is one of {args.world_size} started together: "
            "start it without torchrun or accelerate launch, or leave cuda_graph out"
        )
    if args.device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs an NVIDIA GPU, this run is on {args.device}: leave it out")
    if getattr(args, "taps", "auto") == "host":
        raise ValueError('cuda_graph=True cannot keep hidden states in host memory: set taps to "device" or "int8"')
    if getattr(args, "memory_budget", None) is not None:
        raise ValueError("cuda_graph=True cannot stream layers, as memory_budget may: leave out one of the two")
    for name in ("torch_empty_cache_steps", "torch_compile"):
        if getattr(args, name):
            raise ValueError(f"{name} is set, which works inside the pass that cuda_graph=True captures: leave out one")
