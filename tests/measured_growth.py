"""Run in a process of its own: prints by how many bytes the resident set grew in two training steps, and the plan."""

from __future__ import annotations

import dataclasses
import sys

import torch

from benchmarks.memory import MIB, MemoryMeter
from benchmarks.models import random_backbone
from benchmarks.shapes import ModelShape, model_shape
from engine.collator import Collator
from engine.config import LadderConfig
from engine.memory import Workload, plan_memory
from engine.model import LadderForCausalLM

SHAPE = ModelShape("qwen2", 1024, 3072, 6, 16, 4, 64, 8192, False, 4096, 1e-6, 1e6)


def main(preset: str, tokens: int) -> None:
    device = torch.device("cpu")
    meter = MemoryMeter(device)
    _train(model_shape("toy"), LadderConfig.preset(preset), 32, meter)  # what libraries load and keep
    config = LadderConfig.preset(preset, reduction_factor=4)
    grown = _train(SHAPE, config, tokens, meter)
    backbone = dataclasses.replace(SHAPE)
    from engine.backbone.families import backbone_config

    plan = plan_memory(backbone_config(backbone.config()), config, Workload(tokens, device_type="cpu", itemsize=4))
    print(grown, plan.peak_bytes, plan.peak_phase, {k: plan.phase_bytes(k) for k in plan.phases})


def _train(shape: ModelShape, config: LadderConfig, tokens: int, meter: MemoryMeter) -> int:
    meter.settle()
    before = meter.current_mib()
    model = LadderForCausalLM.from_backbone(random_backbone(shape, torch.device("cpu")), config).train()
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
    main(sys.argv[1], int(sys.argv[2]))
