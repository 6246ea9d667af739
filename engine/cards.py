"""How long a training step takes at least on named cards: arithmetic, weight traffic, or the bus, whichever is slowest.

    seconds >= max(FLOPs / rate, packed bytes / bandwidth, streamed bytes / bus rate)

A bound that nothing can beat, not a promise: decoding, attention's softmax and launches come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.backbone.families import BackboneConfig
from engine.config import LadderConfig
from engine.memory import MemoryPlan
from engine.sizes import layer_bytes, layer_tensors, side_parameters
from engine.workload import Workload


@dataclass(frozen=True)
class Card:
    """A card by its data sheet.

    Attributes:
        flops: dense 16-bit products with fp32 sums, per second (GeForce sums in fp32 at half its fp16 rate).
        bandwidth: of device memory, bytes per second.
        bus: what a copy from pinned host memory reaches, bytes per second: 25e9 of PCIe 4.0 x16's 31.5e9.
    """

    name: str
    flops: float
    bandwidth: float
    bus: float


# NVIDIA's Ampere GA102, Ada AD102 and H100 architecture white papers and product pages; the 4060 Ti and 4070 from
# multiprocessors x clock x 512 FLOP, as on the others. The 4060 Ti has eight lanes.
CARDS = (
    Card("RTX 3060 12GB", 25.5e12, 360e9, 25e9),
    Card("RTX 4060 Ti 16GB", 44.1e12, 288e9, 12.5e9),
    Card("RTX 4070 12GB", 58.3e12, 504e9, 25e9),
    Card("RTX 4090 24GB", 165.2e12, 1008e9, 25e9),
    Card("H100 80GB", 989e12, 3350e9, 50e9),
    Card("H200 141GB", 989e12, 4800e9, 50e9),
)


@dataclass(frozen=True)
class StepWork:
    """What a step has to do, whatever the card.

    Attributes:
        flops: products of backbone, frozen head (forward and the gradient to its input) and side network.
        weight_bytes: packed weights read once per pass.
        streamed_bytes: what crosses the bus: streamed layers, and taps to the host and back.
    """

    flops: float
    weight_bytes: int
    streamed_bytes: int

    def seconds(self, card: Card) -> float:
        """The bound on that card."""
        return max(self.flops / card.flops, self.weight_bytes / card.bandwidth, self.streamed_bytes / card.bus)

    def limit(self, card: Card) -> str:
        """What the bound comes from."""
        times = {
            "arithmetic": self.flops / card.flops,
            "memory": self.weight_bytes / card.bandwidth,
            "bus": self.streamed_bytes / card.bus,
        }
        return max(times, key=lambda name: times[name])


def step_work(backbone: BackboneConfig, config: LadderConfig, work: Workload, plan: MemoryPlan) -> StepWork:
    """The work of one optimizer step with the plan's policies: `work.accumulation` micro-batches in groups."""
    rows, width = work.rows, backbone.hidden_size
    linears = 2 * rows * backbone.num_layers * layer_parameters(backbone)
    # Two products of causal scores: half of 2 x 2 x tokens^2 x width for each document.
    attention = 2 * work.batch * work.tokens**2 * backbone.num_heads * backbone.head_dim * backbone.num_layers
    head = 4 * rows * backbone.vocab_size * width
    # Forward, computed again, and the two products of backward; taps and side_up are not computed again.
    side = 8 * rows * side_parameters(backbone, config)
    streamed = plan.host["streamed layers"] + 2 * plan.host["taps"]
    packed = backbone.num_layers * layer_bytes(backbone, work.itemsize)
    passes = -(-work.accumulation // work.group)
    return StepWork(work.accumulation * float(linears + attention + head + side), passes * packed, passes * streamed)


def break_even_tokens(backbone: BackboneConfig, card: Card) -> float:
    """Rows of a pass above which a layer computes for longer than its successor takes to arrive over the bus."""
    seconds = layer_bytes(backbone, 2) / card.bus
    return seconds * card.flops / (2 * layer_parameters(backbone))


def layer_parameters(backbone: BackboneConfig) -> int:
    """Weights of the linears of one decoder block."""
    return sum(math.prod(tensor.shape) for tensor in layer_tensors(backbone) if tensor.linear)
