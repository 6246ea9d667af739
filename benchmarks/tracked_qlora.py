"""QLoRA's training step on the same decoder under the same tracker: the competitor, at shapes no CPU could run.

LoRA on all linears of the blocks as peft adds it: y = x W^T + (x A^T) B^T * scale, W decoded whenever it is
used (bitsandbytes does the same), A and B fp32. Under autocast they multiply in bf16, as every trainer with bf16=True
has it; without, peft casts their inputs to fp32. Norms, embedding and head stay in bf16, which is lean: peft's
`prepare_model_for_kbit_training` makes them fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from benchmarks.qlora import LORA_RANK
from benchmarks.tracked_step import empty_tensors, optimizer_with_moments
from benchmarks.tracker import StorageTracker, tracked
from engine.backbone.block import Block, Linear
from engine.backbone.families import BackboneConfig, backbone_config
from engine.memory.workload import MemoryPolicies
from engine.sequence import rotary_table
from ladder_kernels import NF4Weight, Workspace, linear_cross_entropy, reference
from ladder_kernels.attention import attention

_LINEARS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class QLoRA:
    """A variant of the competitor.

    Attributes:
        checkpointing: recompute each block in backward, instead of keeping its activations.
        autocast: adapters multiply in bf16, instead of in fp32.
        has_our_loss: `linear_cross_entropy`, instead of all logits in fp32 as transformers makes them.
        rank: of the adapters.
        top_blocks: only the uppermost blocks carry adapters; those below run without gradients. None: all blocks.
    """

    checkpointing: bool
    autocast: bool = True
    has_our_loss: bool = False
    rank: int = LORA_RANK
    top_blocks: int | None = None


def track_qlora(hf_config: PreTrainedConfig, variant: QLoRA, tokens: int, batch: int = 1) -> StorageTracker:
    """A tracked optimizer step, as `benchmarks.tracked_step.track_ladder`."""
    tracker, fake = StorageTracker(), FakeTensorMode(allow_non_fake_inputs=True)
    config = backbone_config(hf_config)
    with tracked(tracker, fake):
        embedding, frozen, norm, head = empty_tensors(config, MemoryPolicies(embedding="device"), tracker)
        with tracker.making("adapters"):
            below = 0 if variant.top_blocks is None else config.num_layers - variant.top_blocks
            ranks = [0] * below + [variant.rank] * (config.num_layers - below)
            layers = nn.ModuleList(
                _AdaptedBlock(block, config, rank, variant.autocast)
                for block, rank in zip(frozen.blocks, ranks, strict=True)
            )
        optimizer = optimizer_with_moments(layers, tracker)
        ids = torch.empty(batch * tokens, dtype=torch.int64)
        positions = torch.arange(tokens).repeat(batch)
        frequencies = torch.empty(config.head_dim // 2)
        tables, lengths = rotary_table(positions, frequencies, embedding.dtype), (tokens,) * batch
        with tracker.phase("forward"):
            hidden = F.embedding(ids, embedding)
            with torch.no_grad():
                for layer in layers[:below]:
                    hidden = layer(hidden, *tables, lengths)
            hidden.requires_grad_()
            for layer in layers[below:]:
                if variant.checkpointing:
                    hidden = checkpoint(layer, hidden, *tables, lengths, use_reentrant=False)
                else:
                    hidden = layer(hidden, *tables, lengths)
        with tracker.phase("loss"):
            hidden = reference.rms_norm(hidden, norm, config.rms_norm_eps)
            if variant.has_our_loss:
                loss = linear_cross_entropy(hidden, head, ids, workspace=Workspace())
            else:
                loss = F.cross_entropy(F.linear(hidden, head).float(), ids)
            del hidden
        with tracker.phase("backward"):
            loss.backward()
        with tracker.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    return tracker


class _NF4Product(torch.autograd.Function):
    """x W^T that keeps the packed weight and decodes it in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, x.new_empty(weight.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ dy.new_empty(ctx.weight.shape), None


class _AdaptedLinear(nn.Module):
    """A frozen linear and its adapter, none where the rank is 0."""

    def __init__(self, linear: Linear, rank: int, autocast: bool) -> None:
        super().__init__()
        self.linear = linear
        self.rank = rank
        self.autocast = autocast
        rows, columns = linear.weight.shape
        if rank:
            self.down = nn.Parameter(torch.empty(rank, columns))
            self.up = nn.Parameter(torch.empty(rows, rank))

    def forward(self, x: Tensor) -> Tensor:
        out = _NF4Product.apply(x, self.linear.weight)
        if self.linear.bias is not None:
            out = out + self.linear.bias
        if not self.rank:
            return out
        dtype = x.dtype if self.autocast else self.down.dtype
        added = F.linear(F.linear(x.to(dtype), self.down.to(dtype)), self.up.to(dtype)) * 2.0
        return out + added.to(x.dtype)


class _AdaptedBlock(nn.Module):
    """A decoder block, differentiable in its input and its adapters."""

    def __init__(self, block: Block, config: BackboneConfig, rank: int, autocast: bool) -> None:
        super().__init__()
        self.block = block
        self.config = config
        linears = {name: _AdaptedLinear(getattr(block, name), rank, autocast) for name in _LINEARS}
        self.linears = nn.ModuleDict(linears)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, lengths: tuple[int, ...]) -> Tensor:
        config, block, linears = self.config, self.block, self.linears
        x = reference.rms_norm(hidden, block.attention_norm, config.rms_norm_eps)
        query, key, value = (linears[name](x).unflatten(-1, (-1, config.head_dim)) for name in _LINEARS[:3])
        if block.query_norm is not None and block.key_norm is not None:
            query = reference.rms_norm(query, block.query_norm, config.rms_norm_eps)
            key = reference.rms_norm(key, block.key_norm, config.rms_norm_eps)
        query, key = reference.rotary(query, cos, sin), reference.rotary(key, cos, sin)
        hidden = hidden + linears["output"](attention(query, key, value, lengths))
        x = reference.rms_norm(hidden, block.mlp_norm, config.rms_norm_eps)
        return hidden + linears["down"](reference.swiglu(linears["gate"](x), linears["up"](x)))
