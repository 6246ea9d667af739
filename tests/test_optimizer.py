"""The optimizer: fused AdamW on fp32 parameters by default, torchao's 8-bit AdamW as transformers' own option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import ladder_model

from engine import LadderArguments, LadderTrainer

RECORDS = [
    {"input_ids": list(range(start, start + 20)), "labels": list(range(start, start + 20))} for start in range(8)
]


def trainer(output: Path, **options: Any) -> LadderTrainer:
    settings = {"max_steps": 6, "warmup_steps": 0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    settings |= {"save_steps": 3, "logging_steps": 1, "report_to": [], "disable_tqdm": True} | options
    model = ladder_model("ladder", reduction_factor=1).train()
    return LadderTrainer(model, LadderArguments(output_dir=str(output), **settings), train_dataset=RECORDS)


def losses(trained: LadderTrainer) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def test_the_default_is_fused_adamw_on_fp32_parameters(tmp_path: Path) -> None:
    trained = trainer(tmp_path, max_steps=1)
    trained.train()
    optimizer = trained.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True
    for parameter, state in optimizer.state.items():
        assert parameter.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


def test_8_bit_adamw_trains_alike_in_less_memory_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="8-bit AdamW is torchao's: pip install 'ladder-engine[adamw8bit]'")
    small = trainer(tmp_path / "8bit", optim="adamw_torch_8bit")
    small.train()
    moments = [state["exp_avg"] for state in small.optimizer.optimizer.state.values()]
    packed = [moment for moment in moments if type(moment).__name__ == "OptimState8bit"]
    assert packed and all(moment.codes.dtype == torch.uint8 for moment in packed)
    # Tensors of less than 4,096 values keep fp32 moments.
    assert sum(moment.numel() for moment in packed) > 0.9 * sum(moment.numel() for moment in moments)

    full = trainer(tmp_path / "fused")
    full.train()
    assert losses(small)[-1] < losses(small)[0] - 0.05
    assert losses(small) == pytest.approx(losses(full), rel=0.02)

    again = trainer(tmp_path / "8bit", optim="adamw_torch_8bit")
    again.train(resume_from_checkpoint=str(tmp_path / "8bit" / "checkpoint-3"))
    assert losses(again) == losses(small)
