"""What a training step will hold in memory, from the shapes in config.json and a `LadderConfig` alone.

A step is a timeline of phases: load, backbone pass, side forward, loss, backward, optimizer, and where there is one an
evaluation. Every part (weights, taps, gradients ...) has a function that gives its bytes, every phase says which parts
it holds, and the peak is the largest phase: parts that are never alive together are never added. Moments, gradients and
scratch count as every step but the first finds them. `python -m benchmarks memory` counts the same storage by storage
in the code that trains, and the tests hold the plan to within 5 % of that. GB is 1e9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from engine.backbone.families import BackboneConfig
from engine.config import LadderConfig, SideDims, side_dims
from engine.memory.blocks import forward_bytes, gradient_bytes
from engine.memory.sizes import (
    NF4_BLOCK,
    count,
    head_bytes,
    int8_bytes,
    layer_bytes,
    layer_tensors,
    meta_side_network,
    moment_bytes,
    side_parameters,
    staged_layer_bytes,
)
from engine.memory.turns import joined_phases
from engine.memory.workload import MemoryPolicies, Workload
from engine.model.side_network import SideNetwork
from ladder_kernels import frozen_norm, native
from ladder_kernels.launch import (
    gpu_linear_plan,
    gpu_panel_rows,
    linear_plan,
    logit_chunk_bytes,
    logit_rows,
    panel_rows,
)

_PLANNED_CARD = (86, 28)  # scratch is planned for an RTX 3060; other cards take less

Bytes = Mapping[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by phase and part.

    Attributes:
        phases: on the device, by phase in the order of the timeline.
        host: in host memory.
        policies: that this was planned with.
    """

    phases: Mapping[str, Bytes]
    host: Bytes
    policies: MemoryPolicies

    def phase_bytes(self, phase: str) -> int:
        """Held at the worst moment of a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that is held on the device at any time."""
        return self.phase_bytes(self.peak_phase)

    @property
    def loaded_bytes(self) -> int:
        """Held on the device once backbone and side network are there."""
        return (
            self.phase_bytes("load") - self.phases["load"]["activations"] + self.phases["optimizer"]["side parameters"]
        )

    @property
    def host_bytes(self) -> int:
        """Held in host memory."""
        return sum(self.host.values())


def plan_memory(
    backbone: BackboneConfig,
    config: LadderConfig,
    work: Workload,
    policies: MemoryPolicies | None = None,
    beside: Sequence[LadderConfig] = (),
) -> MemoryPlan:
    """The memory of a training step, by phase and part.

    Args:
        backbone: shapes of the backbone.
        config: of the side network.
        work: tokens, and where they are trained on.
        policies: None for the defaults.
        beside: configurations of further side networks that train on the same passes, in a sweep.

    Raises:
        ValueError: a configuration does not fit the backbone's number of blocks.
    """
    networks = [StepParts(backbone, one, work, policies or MemoryPolicies()) for one in (config, *beside)]
    plan = networks[0].plan()
    return replace(plan, phases=joined_phases(networks)) if beside else plan


@dataclass(frozen=True)
class StepParts:
    """Bytes of every part of one step; T rows, backbone width D, side width S, `itemsize` bytes a number."""

    backbone: BackboneConfig
    config: LadderConfig
    work: Workload
    policies: MemoryPolicies

    def plan(self) -> MemoryPlan:
        weights, held, during = self.weights(), self.held(), self.during_passes()
        states = self.states()
        # While the last block computes, its own output is not kept yet, nor is anything of the layers above.
        last = self.taps(self.num_taps - 1)
        below = states * (len(self._side_network.taps) - 1) // self._side_network.num_side_layers
        above = {"states above": self.states_above()}
        phases = {
            "load": weights | {"activations": self.loading()},
            "backbone pass": during | {"taps": last, "side states": below, "activations": self.block()},
            "side forward": self.passed() | {"activations": self.last_hidden() + self.side_forward()},
            "loss": self.at_loss() | above | {"activations": self.last_hidden() + self.at_output()},
            "backward": max(self.backward(), key=lambda parts: sum(parts.values())),
            "optimizer": held | self.gradients(),
        }
        if self.work.eval_batch:
            phases["evaluation"] = self.evaluation(weights)
        return MemoryPlan(phases, self.host(), self.policies)

    def held(self) -> dict[str, int]:
        """What is there all the time."""
        own = {"side parameters": 4 * self.parameters, "moments": self.moments()}
        return self.weights() | own | {"scratch": self.scratch()}

    def gradients(self) -> dict[str, int]:
        """Of every trained parameter."""
        return {"gradients": 4 * self.trained}

    def during_passes(self) -> dict[str, int]:
        """Held while the backbone runs. A group that is a whole step starts without gradients."""
        return self.held() | (self.gradients() if self.work.accumulation > self.work.group else {})

    def passed(self) -> dict[str, int]:
        """Held when a pass is done."""
        return self.during_passes() | {"taps": self.taps(self.num_taps), "side states": self.states()}

    def at_loss(self) -> dict[str, int]:
        """The same, and for the second loss of a group the gradients of the first."""
        return self.passed() | (self.gradients() if self.work.accumulation > 1 else {})

    @cached_property
    def dims(self) -> SideDims:
        return side_dims(self.backbone, self.config.reduction_factor)

    @cached_property
    def parameters(self) -> int:
        """Of the side network."""
        return side_parameters(self.backbone, self.config)

    @cached_property
    def trained(self) -> int:
        """Parameters that have a gradient and moments: all but down-projections that are not trained."""
        if self.policies.taps != "none" or self.config.tap_down in ("avg_pool", "max_pool"):
            return self.parameters
        width = self.dims.side_dim if self.config.tap_down == "linear" else self.config.tap_rank
        return self.parameters - self.num_taps * width * self.backbone.hidden_size

    @cached_property
    def _side_network(self) -> SideNetwork:
        return meta_side_network(self.backbone, self.config)

    @cached_property
    def num_taps(self) -> int:
        """Hidden states that are tapped, the embeddings included."""
        return len(self._side_network.taps) + self.config.tap_embeddings

    @property
    def kept_taps(self) -> frozenset[int]:
        """Numbers of the backbone's hidden states that are kept for a gradient."""
        if self.config.tap_down in ("avg_pool", "max_pool"):
            return frozenset()
        return frozenset(self._side_network.side_layer_of) | ({0} if self.config.tap_embeddings else set())

    @cached_property
    def layer_bytes(self) -> int:
        """Of a layer as it is kept: tensors of their own, or one buffer where some layers are streamed."""
        kept = layer_bytes if self.policies.residency == "device" else staged_layer_bytes
        return kept(self.backbone, self.work.itemsize)

    def weights(self) -> dict[str, int]:
        """The frozen weights on the device; on a CPU all of them are."""
        resident, streamed = self.resident_layers, self.backbone.num_layers - self.resident_layers
        is_cpu = self.work.device_type == "cpu"
        return {
            "backbone layers": (resident + (streamed if is_cpu else 0)) * self.layer_bytes,
            "layers in flight": min(self.policies.prefetch + 1, streamed) * self.layer_bytes,
            "head": self.head() + self.work.itemsize * self.backbone.hidden_size,
            "embedding": 0 if self.policies.embedding == "host" and not is_cpu else self.embedding(),
        }

    @property
    def resident_layers(self) -> int:
        """Layers that stay on the device."""
        layers = self.backbone.num_layers
        return layers if self.policies.residency == "device" else min(self.policies.resident_layers, layers)

    def embedding(self) -> int:
        """The embedding, wherever it is; nothing where it is the head."""
        is_head = self.backbone.tie_word_embeddings and self.policies.head_dtype == "dense"
        return 0 if is_head else self.table_bytes

    @property
    def table_bytes(self) -> int:
        """One [V, D] matrix in the compute dtype."""
        return self.work.itemsize * self.backbone.vocab_size * self.backbone.hidden_size

    def head(self) -> int:
        """The output matrix [V, D]."""
        rows, columns = self.backbone.vocab_size, self.backbone.hidden_size
        return head_bytes(rows, columns, self.policies.head_dtype, self.work.itemsize)

    def moments(self) -> int:
        """Of every trained parameter."""
        return moment_bytes(self.trained, self.policies.optimizer)

    def scratch(self) -> int:
        """Panels of decoded weights and a chunk of logits, kept from step to step."""
        return self.panels() + self.logits()

    def panels(self) -> int:
        """Scratch of the largest `nf4_linear`."""
        itemsize, rows = self.work.itemsize, self.work.pass_rows
        sizes = {tensor.shape for tensor in layer_tensors(self.backbone) if tensor.linear}
        if self.work.device_type == "cuda":
            return max(
                gpu_linear_plan(rows, *size, NF4_BLOCK, itemsize, *_PLANNED_CARD).scratch_bytes for size in sizes
            )
        isa = native.isa()
        return max(linear_plan(rows, *size, NF4_BLOCK, itemsize, isa).scratch_bytes for size in sizes)

    def logits(self) -> int:
        """A chunk of logits, of whose rows fp32 decides; beside 16 bits an fp32 copy where there are no kernels, and
        for a packed head decoded panels and fp32 sums [chunk, D]."""
        backbone, itemsize, device_type = self.backbone, self.work.itemsize, self.work.device_type
        vocabulary, width = backbone.vocab_size, backbone.hidden_size
        rows = logit_rows(self.work.rows, vocabulary, 4, logit_chunk_bytes(device_type))
        size = rows * vocabulary * (itemsize if self._has_kernels or itemsize > 2 else itemsize + 4)
        if self.policies.head_dtype == "dense":
            return size
        shape = (rows, vocabulary, width, itemsize)
        step = gpu_panel_rows(*shape, *_PLANNED_CARD) if device_type == "cuda" else panel_rows(*shape)
        panels = min(2, -(-vocabulary // step)) if device_type == "cuda" else 1
        return size + panels * step * width * itemsize + (4 * rows * width if itemsize == 2 else 0)

    def tap(self) -> int:
        """One hidden state [T, D] as it is kept for the gradient of its down-projection."""
        rows, width = self.work.pass_rows, self.backbone.hidden_size
        if self.config.tap_down in ("avg_pool", "max_pool"):
            return 0
        on_host = self.hidden() if self.work.device_type == "cpu" else 0
        kinds = {"device": self.hidden(), "int8": int8_bytes(rows, width), "host": on_host, "none": 0}
        return kinds[self.policies.taps]

    def taps(self, count: int) -> int:
        """So many kept hidden states on the device; those on the host pass through two buffers."""
        in_flight = 2 * self.hidden() // self.work.group if self.policies.taps == "host" and count else 0
        return count * self.tap() + in_flight

    def hidden(self) -> int:
        """One [T, D] of a pass."""
        return self.work.itemsize * self.work.pass_rows * self.backbone.hidden_size

    def last_hidden(self) -> int:
        """h_L, which the output needs, where it is not kept as a tap."""
        is_tap = self.policies.taps == "device" and self.config.tap_down not in ("avg_pool", "max_pool")
        return 0 if is_tap else self.hidden()

    def states(self) -> int:
        """Side states [T, S] and the rotary table: a side layer keeps its input, a gated merge what it merged with."""
        network, rows, itemsize = self._side_network, self.work.pass_rows, self.work.itemsize
        gates = sum(tap.gate_logit is not None for tap in network.taps)
        numbers = (network.num_side_layers + gates + 1) * self.dims.side_dim + 2 * self.dims.head_dim
        if self.config.tap_down in ("low_rank", "adapter"):
            inner = 2 if self.config.tap_down == "adapter" else 1
            numbers += self.num_taps * inner * self.config.tap_rank
        return itemsize * rows * numbers

    def block(self) -> int:
        """Activations of one backbone block in the pass."""
        return self._block(self.work.pass_rows, self.policies.taps == "device")

    def at_output(self) -> int:
        """The frozen blocks that the output passes, then the loss."""
        return max(self._block(self.work.rows, is_input_kept=True) if self.blocks_above else 0, self.loss()[0])

    @property
    def blocks_above(self) -> int:
        """Frozen blocks above the place where the side network's output joins."""
        return self.backbone.num_layers - self._side_network.joins_at

    def states_above(self) -> int:
        """The inputs of these blocks, which wait for backward."""
        return self.blocks_above * self.work.rows * self.backbone.hidden_size * self.work.itemsize

    def _block(self, rows: int, is_input_kept: bool) -> int:
        return forward_bytes(self.backbone, rows, self.work.itemsize, is_input_kept, self._has_kernels)

    @property
    def _has_kernels(self) -> bool:
        """Whether element-wise passes write in place instead of making intermediates."""
        return self.work.device_type == "cuda" or native.available()

    def side_forward(self) -> int:
        """One side layer: its parameters rounded, heads, attention, output."""
        dims, itemsize = self.dims, self.work.itemsize
        numbers = self._side_heads + 3 * dims.side_dim + (0 if self.work.device_type == "cuda" else self._plain_side)
        return itemsize * (self._layer_parameters + self.work.rows * numbers)

    @property
    def _plain_side(self) -> int:
        """Per row, what a side layer in plain torch makes besides: rotation, gate and up, SiLU, product."""
        return 2 * self._side_heads + 4 * self.dims.intermediate_size

    @property
    def _side_heads(self) -> int:
        return (self.dims.num_heads + 2 * self.dims.num_kv_heads) * self.dims.head_dim

    @property
    def _layer_parameters(self) -> int:
        return count(self._side_network.layers[0])

    def side_backward(self) -> int:
        """One side layer computed again, and its gradients."""
        dims, itemsize = self.dims, self.work.itemsize
        numbers = 4 * self._side_heads + 9 * dims.side_dim + 3 * dims.intermediate_size
        numbers += 0 if self.work.device_type == "cuda" else 4 * dims.intermediate_size
        return itemsize * (self._layer_parameters + self.work.rows * numbers)

    def loss(self) -> tuple[int, int]:
        """Supervised rows of width D, forward and at the start of backward.

        Forward holds the rows of h_L, y and its norm, backward y and the gradients of both. The norm computes in
        fp32, in slices: of 16 bits eight bytes a number forward, 26 backward.
        """
        width, itemsize = self.backbone.hidden_size, self.work.itemsize
        row_bytes = self.work.rows * width * itemsize
        in_slice = width * min(self.work.rows, frozen_norm.slice_rows(width))
        forward, backward = (8, 26) if itemsize == 2 else (0, 4)
        mixed = row_bytes if self.config.output == "mix" else 0
        return 3 * row_bytes + forward * in_slice + mixed, 3 * row_bytes + backward * in_slice + mixed

    def backward(self) -> tuple[Bytes, Bytes]:
        """Its two ends: nothing is freed yet, or every gradient is there."""
        layers, loss_backward = self._side_network.num_side_layers, self.loss()[1]
        if self.blocks_above:
            loss_backward = max(loss_backward, gradient_bytes(self.backbone, self.work.rows, self.work.itemsize))
        if self.work.group > 1:  # the last micro-batches are kept in full while the first ones are done
            loss_backward = self.last_hidden() + max(loss_backward, self.side_backward())
        first = self.at_loss() | {"states above": self.states_above(), "activations": loss_backward}
        last = {"taps": self.taps(1), "side states": self.states() // layers, "activations": self.side_backward()}
        return first, self.held() | self.gradients() | last

    def evaluation(self, weights: Bytes) -> Bytes:
        """A pass that keeps nothing for a backward: the worst of its stages."""
        work = replace(self.work, batch=self.work.eval_batch, accumulation=1, group=1)
        one = replace(self, work=work, policies=replace(self.policies, taps="none"))
        numbers = 3 * self.dims.side_dim + 2 * self.dims.head_dim  # a side state, a tap, their merge, rotary tables
        stages = (one.block(), one.hidden() + one.side_forward(), one.hidden() + one.loss()[0])
        return weights | {
            "side parameters": 4 * self.parameters,
            "moments": self.moments(),
            "scratch": max(self.scratch(), one.scratch()),
            "side states": one.work.itemsize * one.work.rows * numbers,
            "activations": max(stages),
        }

    def loading(self) -> int:
        """The largest tensor that is quantized, as it was stored in 16 bits."""
        return max(2 * math.prod(tensor.shape) for tensor in layer_tensors(self.backbone) if tensor.linear)

    def host(self) -> Bytes:
        """What policies put into the memory of a GPU's host, and the buffer that tensors are read through."""
        if self.work.device_type == "cpu":
            return dict.fromkeys(("streamed layers", "embedding", "taps", "largest tensor, while loading"), 0)
        return {
            "streamed layers": (self.backbone.num_layers - self.resident_layers) * self.layer_bytes,
            "embedding": self.embedding() if self.policies.embedding == "host" else 0,
            "taps": self.num_taps * self.hidden() if self.policies.taps == "host" else 0,
            "largest tensor, while loading": self.table_bytes,
        }
