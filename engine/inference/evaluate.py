"""Held-out loss of a trained model and of its backbone alone, both from one pass of the backbone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from engine.data.collator import Collator
from engine.model.causal_lm import LadderForCausalLM
from engine.sequence import SequenceLayout


@dataclass(frozen=True)
class Evaluation:
    """What `ladder eval` reports.

    Attributes:
        samples: samples of the data, pieces of long texts counted each.
        supervised_tokens: tokens that the losses are means over.
        loss: cross entropy in nats per supervised token, with the side network.
        perplexity: e to the loss.
        backbone_loss: of the backbone alone, on the same tokens.
        backbone_perplexity: e to that.
    """

    samples: int
    supervised_tokens: int
    loss: float
    perplexity: float
    backbone_loss: float
    backbone_perplexity: float

    def lines(self) -> list[str]:
        """For people."""
        change = 100 * (self.loss - self.backbone_loss) / self.backbone_loss if self.backbone_loss else 0.0
        return [
            f"samples             {self.samples:,}, {self.supervised_tokens:,} supervised tokens",
            f"backbone alone      loss {self.backbone_loss:.4f}, perplexity {self.backbone_perplexity:,.4g}",
            f"with side network   loss {self.loss:.4f}, perplexity {self.perplexity:,.4g} ({change:+.1f}% loss)",
        ]

    def write(self, path: Path, **about: str) -> None:
        """Write the numbers as JSON, behind what they are about."""
        path.write_text(json.dumps(about | asdict(self), indent=2) + "\n", encoding="utf-8")


def evaluate(model: LadderForCausalLM, data: Dataset[dict[str, Tensor]], batch_size: int) -> Evaluation:
    """Mean losses over all supervised tokens of a data set, whatever the batches.

    Args:
        model: in whatever mode; it is left in it.
        data: samples with int64 `input_ids` and `labels` [n], such as `prepare_dataset` gives.
        batch_size: samples in one pass.

    Raises:
        ValueError: a loss is not finite.
    """
    batches: Iterable[dict[str, Any]] = DataLoader(data, batch_size=batch_size, collate_fn=Collator())
    losses, count, num_samples = torch.zeros(2, dtype=torch.float64), 0, 0
    for batch in tqdm(batches, desc="evaluating", disable=None, leave=False):
        losses += _summed_losses(model, batch)
        count += int((batch["supervised_targets"] >= 0).sum())
        num_samples += len(batch["document_lengths"])
    loss, backbone_loss = (losses / max(count, 1)).tolist()
    for name, value in (("with the side network", loss), ("of the backbone alone", backbone_loss)):
        if not math.isfinite(value):
            raise ValueError(f"the loss {name} is {value}: weights are damaged or {model.backbone.dtype} overflows")
    return Evaluation(num_samples, count, loss, _exp(loss), backbone_loss, _exp(backbone_loss))


@torch.no_grad()
def _summed_losses(model: LadderForCausalLM, batch: dict[str, Any]) -> Tensor:
    """Summed loss with the side network and of the backbone alone, fp64 [2] on the CPU."""
    backbone = model.backbone
    batch = {name: value.to(backbone.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    (passed,) = model.run_ahead([batch])
    ladder = model(**batch, passed=passed, num_items_in_batch=1).loss
    layout = SequenceLayout.packed(batch["document_lengths"], backbone.device)
    last = backbone.run_above(passed[0], model.side_network.joins_at, layout)
    normed = backbone.final_norm(last.index_select(0, batch["supervised_rows"]))
    alone = model.model.loss(normed, batch["supervised_targets"])
    return torch.stack((ladder, alone)).double().cpu()


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # e**710 is no double any more
