"""How long a training step takes at least on named cards: arithmetic, weight traffic, or the bus, whichever is slowest.

    seconds >= max(FLOPs / rate, packed bytes / bandwidth, streamed bytes / bus rate)

A bound that nothing can beat, not a promise: decoding, attention's softmax and launches come on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.backbone.families import BackboneConfig
from engine.config import LadderConfig
from engine.memory.plan import MemoryPlan
from engine.memory.sizes import layer_bytes, layer_tensors, side_parameters
from engine.memory.workload import Workload


@dataclass(frozen=True)
class Card:
    """A card by its data sheet.

    Attributes:
        cuda_name: what CUDA calls it.
        flops: dense 16-bit products with fp32 sums, per second (GeForce sums in fp32 at half its fp16 rate).
        bandwidth: of device memory, bytes per second.
        bus: what a copy from pinned host memory reaches, bytes per second: 25e9 of PCIe 4.0 x16's 31.5e9.
    """

    name: str
    cuda_name: str
    flops: float
    bandwidth: float
    bus: float


# NVIDIA's Ampere GA102, Ada AD102 and H100 architecture white papers and product pages; the 4060 Ti and 4070 from
# multiprocessors x clock x 512 FLOP, as on the others. The 4060 Ti has eight lanes.
CARDS = (
    Card("RTX 3060 12GB", "NVIDIA GeForce RTX 3060", 25.5e12, 360e9, 25e9),
    Card("RTX 4060 Ti 16GB", "NVIDIA GeForce RTX 4060 Ti", 44.1e12, 288e9, 12.5e9),
    Card("RTX 4070 12GB", "NVIDIA GeForce RTX 4070", 58.3e12, 504e9, 25e9),
    Card("RTX 4090 24GB", "NVIDIA GeForce RTX 4090", 165.2e12, 1008e9, 25e9),
    Card("H100 80GB", "NVIDIA H100 80GB HBM3", 989e12, 3350e9, 50e9),
    Card("H200 141GB", "NVIDIA H200", 989e12, 4800e9, 50e9),
)


def card_of(device: torch.device) -> Card | None:
    """The card behind a device, where it is one of `CARDS`: by its whole name, since a Ti or a laptop's is another."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((card for card in CARDS if card.cuda_name == name), None)


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
    flops = work.accumulation * pass_flops(backbone, config, [work.tokens] * work.batch, work.rows)
    joins_at = config.joins_at(backbone.num_layers)
    passes, above = -(-work.accumulation // work.group), work.accumulation * (backbone.num_layers - joins_at)
    # Blocks above read their weights for each micro-batch by itself: forward, computed again, and for the gradient.
    packed = (passes * joins_at + 3 * above) * layer_bytes(backbone, work.itemsize)
    streamed = plan.host["streamed layers"] * (passes * joins_at + 2 * above) / backbone.num_layers
    return StepWork(flops, packed, round(streamed + passes * 2 * plan.host["taps"]))


def pass_flops(backbone: BackboneConfig, config: LadderConfig, lengths: Sequence[int], supervised: int) -> float:
    """Floating-point operations of the products of one micro-batch, forward and backward.

    Args:
        backbone: its shape.
        config: the side network's.
        lengths: tokens of each document.
        supervised: rows that the head multiplies.
    """
    rows = sum(lengths)
    above = backbone.num_layers - config.joins_at(backbone.num_layers)
    # Blocks above are computed again, and the gradient to their input takes as much.
    linears = 2 * rows * (backbone.num_layers + 2 * above) * layer_parameters(backbone)
    # Two products of causal scores: half of 2 x 2 x tokens^2 x width for each document. Backward has five.
    scores = 2 * sum(tokens**2 for tokens in lengths)
    attention = scores * backbone.num_heads * backbone.head_dim * (backbone.num_layers + 3.5 * above)
    head = 4 * supervised * backbone.vocab_size * backbone.hidden_size
    # Forward, computed again, and the two products of backward; taps and side_up are not computed again.
    side = 8 * rows * side_parameters(backbone, config)
    return float(linears + attention + head + side)


def break_even_tokens(backbone: BackboneConfig, card: Card) -> float:
    """Rows of a pass above which a layer computes for longer than its successor takes to arrive over the bus."""
    seconds = layer_bytes(backbone, 2) / card.bus
    return seconds * card.flops / (2 * layer_parameters(backbone))


def layer_parameters(backbone: BackboneConfig) -> int:
    """Weights of the linears of one decoder block."""
    return sum(math.prod(tensor.shape) for tensor in layer_tensors(backbone) if tensor.linear)
