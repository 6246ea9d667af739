"""LadderTrainer end to end on a tiny backbone: loss, normalization, evaluation, saving, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from transformers import TrainerCallback, TrainingArguments

from engine import LadderArguments, LadderConfig, LadderForCausalLM, LadderTrainer, load_backbone
from engine.data.collator import Collator
from engine.data.dataset import TokenizedDataset, prepare_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [{"prompt": f"{i} plus {j} is ", "completion": str(i + j)} for i in range(6) for j in range(4)]
RAGGED = [{"prompt": "q" * (1 + i % 5), "completion": "ab" * (1 + (7 * i) % 11)} for i in range(24)]
CONFIG = LadderConfig.preset("xladder", reduction_factor=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2")


@pytest.fixture
def model(checkpoint: Path) -> LadderForCausalLM:
    return LadderForCausalLM.from_backbone(load_backbone(checkpoint, dtype=torch.float32), CONFIG)


def arguments(folder: Path, **overrides: Any) -> LadderArguments:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return LadderArguments(output_dir=str(folder), **(settings | overrides))


def side_weights(model: LadderForCausalLM) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.side_network.state_dict().items()}


def tokenized(model: LadderForCausalLM, data: Any) -> TokenizedDataset:
    return prepare_dataset(data, model.backbone.tokenizer(), max_length=64, vocab_size=288)


def token_losses(model: LadderForCausalLM, data: TokenizedDataset) -> list[torch.Tensor]:
    """Losses of every supervised token, one sample at a time, from logits: the definition."""
    losses = []
    for sample in data:
        logits = model(input_ids=sample["input_ids"][None]).logits[0, :-1].double()
        targets = sample["labels"][1:]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none")[targets != -100])
    return losses


def test_a_string_a_jsonl_file_and_defaults(checkpoint: Path, tmp_path: Path) -> None:
    """The six-line use: everything by name, loss falls, the adapter reloads to the bit."""
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in PAIRS))
    trainer = LadderTrainer(
        str(checkpoint),
        arguments(tmp_path / "out", max_steps=30),
        train_dataset=data,
        eval_dataset=PAIRS[:6],
        ladder_config=CONFIG,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    trainer.save_model()
    folder = tmp_path / "out"
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    reloaded = LadderForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(reloaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    assert (folder / "tokenizer.json").is_file() and (folder / "chat_template.jinja").is_file()


def test_logs_carry_throughput_and_memory(model: LadderForCausalLM, tmp_path: Path) -> None:
    trainer = LadderTrainer(model, arguments(tmp_path), train_dataset=PAIRS)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_mib"] >= 0 for line in lines)
    lengths = [len(sample["input_ids"]) for sample in trainer.train_dataset]
    assert 16 * min(lengths) <= trainer.clock.tokens <= 16 * max(lengths)


def test_loss_of_a_step_is_the_mean_over_its_supervised_tokens(model: LadderForCausalLM, tmp_path: Path) -> None:
    data = tokenized(model, RAGGED[:4])
    expected = torch.cat(token_losses(model.eval(), data)).mean().item()
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = LadderTrainer(
            model,
            arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=batch,
                learning_rate=1e-12,
                gradient_accumulation_steps=accumulation,
            ),
            train_dataset=data,
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_micro_batches_are_equivalent(checkpoint: Path, tmp_path: Path, optimizer: str) -> None:
    """8x1 == 4x2 == 1x8, with completions of very different lengths, in fp64: only the order of sums differs."""
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        backbone = load_backbone(checkpoint, dtype=torch.float64, quantize=False)
        model = LadderForCausalLM.from_backbone(backbone, CONFIG)
        model.side_network.double()
        trainer = LadderTrainer(
            model,
            arguments(
                tmp_path,
                max_steps=3,
                optim=optimizer,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                seed=3,
            ),
            train_dataset=RAGGED,
        )
        start = side_weights(model)
        trainer.train()
        results.append(side_weights(model))
        assert any(not torch.equal(start[name], results[-1][name]) for name in start)
    for other in results[1:]:
        for name, weight in results[0].items():
            # The fused loss sums in fp32, so the gradients agree to fp32's last bits.
            error = (other[name] - weight).abs().max().item()
            assert error < 2e-6, f"{name}: {error}"


def test_evaluation_weights_tokens_not_batches(model: LadderForCausalLM, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a" * length} for length in (1, 30, 2, 17, 3)]
    data = tokenized(model, rows)
    torch.nn.init.normal_(model.side_network.side_up, std=0.1, generator=torch.Generator().manual_seed(1))
    per_sample = token_losses(model.eval(), data)
    expected = torch.cat(per_sample).mean().item()
    of_samples = torch.stack([losses.mean() for losses in per_sample]).mean().item()
    assert abs(expected - of_samples) > 1e-3
    for batch in (1, 2, 5, 8):
        trainer = LadderTrainer(model, arguments(tmp_path, per_device_eval_batch_size=batch), eval_dataset=data)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert trainer.evaluate({"a": data})["eval_a_loss"] == pytest.approx(expected, rel=1e-5)


def test_neither_training_nor_evaluation_asks_for_logits(
    model: LadderForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = LadderForCausalLM.forward, []

    def watched(self: LadderForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        seen.append(output.logits is None and "supervised_rows" in kwargs)
        return output

    monkeypatch.setattr(LadderForCausalLM, "forward", watched)
    trainer = LadderTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=PAIRS, eval_dataset=PAIRS[:5])
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert len(seen) == 3 and all(seen)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_equals_an_uninterrupted_run(checkpoint: Path, tmp_path: Path, stop: int) -> None:
    """To the bit, across an epoch border (three steps an epoch, two passes a step) and a new trainer and model."""

    def trainer(folder: Path, callbacks: list[TrainerCallback] | None = None) -> LadderTrainer:
        backbone = load_backbone(checkpoint, dtype=torch.float32)
        return LadderTrainer(
            LadderForCausalLM.from_backbone(backbone, CONFIG),
            arguments(folder, max_steps=5, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2),
            train_dataset=PAIRS,
            callbacks=callbacks,
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    interrupted = trainer(tmp_path / "parts", [StopAt(stop)])
    interrupted.train()
    assert interrupted.state.global_step == stop
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    expected = side_weights(whole.model)
    for name, weight in side_weights(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
    kept = sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    saved = {path.name for path in (tmp_path / "parts" / "checkpoint-5").iterdir()}
    assert "ladder.safetensors" in saved and "model.safetensors" not in saved and "training_args.bin" not in saved


def test_best_model_is_loaded_at_the_end(model: LadderForCausalLM, tmp_path: Path) -> None:
    trainer = LadderTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            learning_rate=0.3,
            max_grad_norm=0.0,
        ),
        train_dataset=PAIRS,
        eval_dataset=PAIRS[:6],
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_plain_arguments_padded_batches_and_streams(model: LadderForCausalLM, tmp_path: Path) -> None:
    """Foreign arguments, a foreign collator and a torch stream all give the same first loss as ours."""
    data = tokenized(model, PAIRS[:4])
    expected = torch.cat(token_losses(model.eval(), data)).mean().item()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-12,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def stack(name: str, value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([s[name] for s in samples], batch_first=True, padding_value=value)

        mask = [torch.ones_like(sample["input_ids"]) for sample in samples]
        return {
            "input_ids": stack("input_ids", 257),
            "labels": stack("labels", -100),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
        }

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return (data[i] for i in range(len(data)))

    for collator, dataset in ((None, data), (padded, data), (None, Stream())):
        trainer = LadderTrainer(model, args, collator, dataset, data)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_collated_documents_do_not_see_each_other(model: LadderForCausalLM) -> None:
    data = tokenized(model, PAIRS[:5])
    torch.nn.init.normal_(model.side_network.side_up, std=0.1, generator=torch.Generator().manual_seed(1))
    losses = token_losses(model.eval(), data)
    batch = Collator()([data[i] for i in range(len(data))])
    assert batch.pop("sample_ids") == [1, 2, 3, 4, 5]
    assert model(**batch).loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_errors(model: LadderForCausalLM, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ladder_config was given with a model that has a side network already"):
        LadderTrainer(model, arguments(tmp_path), ladder_config=CONFIG)
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1; the fused loss supports 0 only"):
        LadderTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="compute_metrics needs logits, which are never built here"):
        LadderTrainer(model, arguments(tmp_path), compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match="compute_loss_func needs logits"):
        LadderTrainer(model, arguments(tmp_path), None, PAIRS, None, None, None, lambda *args, **kwargs: 0)
    with pytest.raises(ValueError, match="max_length is 1; expected at least 2 tokens"):
        arguments(tmp_path, max_length=1)
    with pytest.raises(ValueError, match="LadderTrainer needs a model"):
        LadderTrainer(None, arguments(tmp_path), train_dataset=PAIRS)
    with pytest.raises(ValueError, match=r"checkpoint-9: has no manifest\.json, so it was never finished"):
        LadderTrainer(model, arguments(tmp_path), train_dataset=PAIRS).train(str(tmp_path / "checkpoint-9"))


def test_same_seed_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        trainer = LadderTrainer(checkpoint, arguments(tmp_path), train_dataset=PAIRS, ladder_config=CONFIG)
        trainer.train()
        results.append(side_weights(trainer.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_weight_decay_reaches_matrices_only(checkpoint: Path, tmp_path: Path) -> None:
    config = LadderConfig.preset("qst", reduction_factor=2)
    trainer = LadderTrainer(
        LadderForCausalLM.from_backbone(load_backbone(checkpoint, dtype=torch.float32), config),
        arguments(tmp_path, weight_decay=0.1),
        train_dataset=PAIRS,
    )
    groups = trainer.create_optimizer().param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    expected = {name for name, p in trainer.model.named_parameters() if p.ndim > 1}
    assert {name for name, p in trainer.model.named_parameters() if id(p) in decayed} == expected
    assert any("gate_logit" in name for name, _ in trainer.model.named_parameters())


def test_evaluate_and_predict_take_what_the_constructor_takes(model: LadderForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PAIRS[:5]))
    trainer = LadderTrainer(model, arguments(tmp_path), train_dataset=PAIRS, eval_dataset={"part": PAIRS[:5]})
    expected = trainer.evaluate()["eval_part_loss"]
    assert trainer.evaluate(PAIRS[:5])["eval_loss"] == expected
    assert trainer.evaluate(str(path))["eval_loss"] == expected
    assert trainer.evaluate("part")["eval_loss"] == expected
    assert trainer.predict(PAIRS[:5]).metrics["test_loss"] == expected


def test_evaluation_counts_what_the_model_supervises(model: LadderForCausalLM, tmp_path: Path) -> None:
    def right_padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = [sample["input_ids"] for sample in samples]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        return {"input_ids": padded, "attention_mask": mask, "labels": padded.clone()}

    data = tokenized(model, [{"text": "a" * (3 + 5 * i)} for i in range(4)])
    losses = token_losses(model, [{"input_ids": s["input_ids"], "labels": s["input_ids"]} for s in data])
    trainer = LadderTrainer(
        model, arguments(tmp_path), data_collator=right_padded, train_dataset=data, eval_dataset=data
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_trains_on_token_ids_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if "token" not in file.name and "template" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    model = LadderForCausalLM.from_backbone(load_backbone(bare, dtype=torch.float32), CONFIG)
    samples = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)} for _ in range(8)]
    assert LadderTrainer(model, arguments(tmp_path), train_dataset=_Samples(samples)).train().global_step == 4
    with pytest.raises(ValueError, match="tokenizer"):
        LadderTrainer(model, arguments(tmp_path), train_dataset=PAIRS)


class _Samples(torch.utils.data.Dataset):
    def __init__(self, samples: list[dict[str, torch.Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3, 4]}, "3 input_ids and 4 labels"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, "3 input_ids and an attention_mask of 2"),
    ],
)
def test_collator_refuses_unequal_lengths(sample: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Collator()([sample])


def test_neftune_is_refused(model: LadderForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        LadderTrainer(model, arguments(tmp_path, neftune_noise_alpha=5.0), train_dataset=PAIRS)
