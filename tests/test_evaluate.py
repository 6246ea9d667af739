"""`ladder eval`: both losses against transformers and against plain sums, whatever the batches; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from ladders import SMALL, checkpoint_folder, ladder_model, tiny_backbone, trained
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from engine import LadderConfig, LadderForCausalLM
from engine.cli import app
from engine.data.dataset import Sample, TokenizedDataset, prepare_dataset
from engine.inference.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def ragged_data() -> TokenizedDataset:
    """Documents of 2 to 30 tokens, some learned in part; five of them, so that batches of two leave one over."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number, length in enumerate((2, 30, 7, 19, 3)):
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        learned = [number % 2 == 0 or place > length // 2 for place in range(length)]
        samples.append(Sample(number, ids, learned))
    return TokenizedDataset(samples)


@pytest.mark.parametrize(("preset", "difference"), [("xladder", 1e-2), ("lst", 1e-2), ("rejoin", 5e-3)])
def test_losses_are_those_of_plain_models(preset: str, difference: float) -> None:
    """Document by document: transformers in fp64 for the backbone, logits in fp64 for the side network."""
    data = ragged_data()
    model = trained(ladder_model(preset, tiny_backbone(quantize=False)))
    dense = AutoModelForCausalLM.from_pretrained(checkpoint_folder(), dtype=torch.float64)
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for number in range(len(data)):
        ids, labels = data[number]["input_ids"][None], data[number]["labels"]
        with torch.no_grad():
            for place, logits in enumerate((model(ids).logits, dense(ids).logits)):
                sums[place] += torch.nn.functional.cross_entropy(logits[0, :-1].double(), labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    found = evaluate(model, data, batch_size=2)
    assert (found.samples, found.supervised_tokens) == (5, count)
    assert found.loss == pytest.approx(float(sums[0]) / count, rel=1e-5)
    assert found.backbone_loss == pytest.approx(float(sums[1]) / count, rel=1e-5)
    assert found.loss != pytest.approx(found.backbone_loss, rel=difference)
    assert found.perplexity == math.exp(found.loss) and found.backbone_perplexity == math.exp(found.backbone_loss)


@pytest.mark.parametrize(("batch_size", "preset"), [(1, "ladder"), (3, "rejoin"), (100, "ladder")])
def test_batches_do_not_matter_and_an_untrained_side_network_changes_nothing(batch_size: int, preset: str) -> None:
    model = ladder_model(preset).train()
    found = evaluate(model, ragged_data(), batch_size)
    assert found.loss == found.backbone_loss == pytest.approx(evaluate(model, ragged_data(), 2).loss, rel=1e-6)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert "(+0.0% loss)" in found.lines()[-1]


def test_a_loss_that_is_not_finite_is_no_number_to_report() -> None:
    model = ladder_model()
    with torch.no_grad():
        model.side_network.side_up.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss with the side network is nan: weights are damaged"):
        evaluate(model, ragged_data(), 2)


def test_command(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "llama2", max_position_embeddings=64)
    model = trained(LadderForCausalLM.from_backbone(source, LadderConfig.preset("ladder", **SMALL)))
    model.save_pretrained(tmp_path / "adapter", tokenizer=model.backbone.tokenizer())
    data = tmp_path / "held.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i} plus 1 is ", "completion": str(i + 1)}) for i in range(5)))

    def ladder(*options: object, code: int = 0) -> Result:
        given = ("eval", "--adapter", tmp_path / "adapter", "--data", data, *options)
        result = CliRunner().invoke(app, [str(part) for part in given])
        assert result.exit_code == code and "Traceback" not in result.output, result.output
        return result

    result = ladder("--json", tmp_path / "out.json", "--batch-size", 2, "--residency", "host")
    samples = prepare_dataset(str(data), model.backbone.tokenizer(), max_length=64, vocab_size=288)
    expected = evaluate(model, samples, 2)
    assert result.stdout.splitlines() == expected.lines()
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["loss"] == expected.loss and written["backbone_perplexity"] == expected.backbone_perplexity
    assert written["data"] == str(data) and written["supervised_tokens"] == 5 * 2

    assert "expected a file in a folder that exists" in ladder("--json", tmp_path / "no" / "x.json", code=2).stderr
    data.write_text(json.dumps({"text": "x" * 90}))
    assert "the longest sample has 91 tokens and the backbone's context is 64" in ladder(code=2).stderr
    assert "91" not in ladder("--max-length", 40).stdout
    data.write_text('{"txt": 1}')
    assert f"error: {data}, line 1" in ladder(code=2).stderr
