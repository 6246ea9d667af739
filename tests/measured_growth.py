"""Run in a process of its own: bytes by which the resident set grows in two training steps, and the plan's peak."""

from __future__ import annotations

import torch

from benchmarks.memory import MIB, MemoryMeter
from benchmarks.models import random_backbone
from benchmarks.shapes import ModelShape, model_shape
from engine.backbone.families import backbone_config
from engine.config import LadderConfig
from engine.data.collator import Collator
from engine.dtypes import compute_dtype
from engine.memory.plan import plan_memory
from engine.memory.workload import Workload
from engine.model.causal_lm import LadderForCausalLM

SHAPE = ModelShape("qwen2", 1024, 3072, 6, 16, 4, 64, 8192, False, 4096, 1e-6, 1e6)
TOKENS = 1024


def main() -> None:
    """Print both numbers."""
    train(model_shape("toy"), LadderConfig(), 32)  # whatever libraries load and keep
    config = LadderConfig.preset("ladder", reduction_factor=4)
    work = Workload(TOKENS, device_type="cpu", itemsize=compute_dtype("cpu").itemsize)
    print(train(SHAPE, config, TOKENS), plan_memory(backbone_config(SHAPE.config()), config, work).peak_bytes)


def train(shape: ModelShape, config: LadderConfig, tokens: int) -> int:
    """Growth in bytes from before the model is built to the peak of its second step; building may pass it."""
    device = torch.device("cpu")
    meter = MemoryMeter(device)
    meter.settle()
    before = meter.current_mib()
    model = LadderForCausalLM.from_backbone(random_backbone(shape, device), config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = Collator()([{"input_ids": torch.randint(shape.vocab_size, (tokens,))}])
    meter.settle()
    meter.reset_peak()
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return round((meter.peak_mib() - before) * MIB)


if __name__ == "__main__":
    main()
