"""trl's SFTTrainer with our loop: its data handling, our loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ladders import ladder_model, tiny_backbone

from engine import LadderArguments, LadderTrainer
from engine.model.ladder_model import FrozenHead

pytest.importorskip("trl", reason="needs trl: pip install 'ladder-engine[trl]'")

from trl import SFTConfig

from engine.training.sft import DocumentCollator, LadderSFTTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = Dataset.from_list(
    [{"prompt": f"{i} plus {j} is ", "completion": str(i + j) * (1 + i % 3)} for i in range(4) for j in range(4)]
)
TEXTS = Dataset.from_list([{"text": "abc" * (1 + (5 * i) % 7)} for i in range(16)])
LOOP = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "max_length": 64,
}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent anywhere."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trl reported its use")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)


def sft(folder: Path, data: Dataset = PAIRS, **overrides: Any) -> LadderSFTTrainer:
    args = SFTConfig(output_dir=str(folder), **(LOOP | overrides))
    model = ladder_model()
    return LadderSFTTrainer(model, args, None, data, data.select([0, 1]), model.backbone.tokenizer())


class Samples(torch.utils.data.Dataset):
    """What trl has prepared, for `LadderTrainer`."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {name: self.rows[index][name] for name in ("input_ids", "labels")}


def test_the_fused_loss_stays_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits, neither of ours nor by trl's way around them, which multiplies by the head's weight."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the head was used outside the fused loss")

    monkeypatch.setattr(type(tiny_backbone()), "logits", refuse)
    monkeypatch.setattr(FrozenHead, "weight", property(refuse))
    trainer = sft(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[-1] < losses[0]
    assert trainer.evaluate(PAIRS.select([0, 1]))["eval_loss"] == losses[-1]
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 3 and all("tokens_per_second" in line and "gate_mean" in line for line in logged)


def test_it_trains_what_ladder_trainer_trains(tmp_path: Path) -> None:
    """To the bit on the tokens that trl made, which supervise the completion and its end."""
    ours = sft(tmp_path / "sft")
    sample = ours.train_dataset[5]
    supervised = [token for token in sample["labels"] if token != -100]
    assert ours.processing_class.decode(supervised) == PAIRS[5]["completion"] + "<eos>"
    args = LadderArguments(output_dir=str(tmp_path / "plain"), lr_scheduler_type="linear", warmup_steps=0, **LOOP)
    plain = LadderTrainer(ladder_model(), args, train_dataset=Samples(ours.train_dataset))
    ours.train()
    plain.train()
    expected = plain.model.side_network.state_dict()
    for name, weight in ours.model.side_network.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_packed_documents_do_not_see_each_other(tmp_path: Path) -> None:
    trainer = sft(tmp_path, TEXTS, packing=True)
    packed = trainer.train_dataset
    assert len(packed) < len(TEXTS) and sum(map(len, packed["seq_lengths"])) == len(TEXTS)
    batch = DocumentCollator()([packed[0]])
    assert batch["document_lengths"] == packed[0]["seq_lengths"]
    model = trainer.model.eval()
    total = count = 0
    begin = 0
    for length in packed[0]["seq_lengths"]:
        ids = torch.tensor(packed[0]["input_ids"][begin : begin + length])[None]
        begin += length
        total += model(input_ids=ids, labels=ids).loss.item() * (length - 1)
        count += length - 1
    assert model(**{name: batch[name] for name in batch}).loss.item() == pytest.approx(total / count, rel=1e-5)
    assert trainer.train().global_step == 3


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["rows", "packed"])
def test_a_skipped_step_names_its_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = sft(tmp_path, TEXTS, max_steps=1, max_length=24, **options)
    with torch.no_grad():
        trainer.model.side_network.side_up.fill_(float("nan"))
    trainer.train()
    record = json.loads((tmp_path / "skipped_steps.jsonl").read_text())
    named = [set(batch) for batch in record["samples"]]
    assert [len(batch) for batch in named] == [2, 2]
    assert len(named[0] | named[1]) == 4 and named[0] | named[1] <= set(range(1, len(trainer.train_dataset) + 1))


def test_checkpoints_hold_the_side_network(tmp_path: Path) -> None:
    trainer = sft(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "ladder.safetensors" in saved and not {"model.safetensors", "training_args.bin"} & saved


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_type is 'dft'; the fused loss is the negative log-likelihood"):
        sft(tmp_path, loss_type="dft")
    with pytest.raises(TypeError, match=r"takes trl\.SFTConfig, got LadderArguments"):
        LadderSFTTrainer(ladder_model(), LadderArguments(output_dir=str(tmp_path), use_cpu=True))
    args = SFTConfig(output_dir=str(tmp_path), **LOOP)
    with pytest.raises(ValueError, match="peft_config is set; the side network is what is trained"):
        LadderSFTTrainer(ladder_model(), args, None, PAIRS, peft_config=object())
    with pytest.raises(ValueError, match="compute_metrics needs logits"):
        LadderSFTTrainer(ladder_model(), args, None, PAIRS, compute_metrics=lambda prediction: {})
