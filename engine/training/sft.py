"""`LadderTrainer` with trl's data handling: chat templates, masks and packing as `trl.SFTTrainer` makes them.

Loss, logs, evaluation and checkpoints are `LadderMixin`'s. trl's own loss, which multiplies by the head in its own way,
is not used, and what would need it is refused. Needs `pip install 'ladder-engine[trl]'`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from engine.data.collator import Collator
from engine.model.causal_lm import LadderForCausalLM
from engine.training.trainer import LadderMixin

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(f"engine.training.sft needs trl: pip install 'ladder-engine[trl]' ({error})") from error

SAMPLE_ID = "sample_id"


class DocumentCollator(Collator):
    """`Collator` for what trl prepares: a packed sample is cut into its documents again."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As `Collator`; of a sample with `seq_lengths` every part is a document of its own."""
        return super().__call__([document for sample in samples for document in _documents(sample)])


class LadderSFTTrainer(LadderMixin, SFTTrainer):
    """`trl.SFTTrainer` with its signature, for side networks on a frozen backbone.

    Unlike trl's own it reports no usage, and logs no entropy and no token accuracy, which need the logits.

    Args:
        model: a `LadderForCausalLM`, or the path or hub id of a backbone, as for `LadderTrainer`.
        args: `trl.SFTConfig`. Its learning rate is that of full fine-tuning; a side network takes about 3e-3.
        data_collator: default: documents side by side without padding.
        rest, others: as of `trl.SFTTrainer`, and `ladder_config`.

    Raises:
        ValueError: a loss other than "nll", adapters of peft, or what `LadderTrainer` refuses.
        TypeError: other arguments than an SFTConfig.
    """

    def __init__(
        self,
        model: LadderForCausalLM | str | Path | None = None,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        *rest: Any,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        args = SFTConfig() if args is None else args
        if not isinstance(args, SFTConfig):
            raise TypeError(f"LadderSFTTrainer takes trl.SFTConfig, got {type(args).__name__}")
        if args.loss_type != "nll":
            raise ValueError(f"loss_type is {args.loss_type!r}; the fused loss is the negative log-likelihood, 'nll'")
        if others.get("sweep") is not None:
            raise ValueError("sweep trains LadderTrainers: use LadderTrainer, or train one after the other here")
        if peft_config is not None:
            raise ValueError("peft_config is set; the side network is what is trained, leave peft's adapters out")
        super().__init__(model, args, data_collator, *rest, **others)
        if data_collator is None:
            self.data_collator = DocumentCollator()
        self.train_dataset = _numbered(self.train_dataset)

    def _default_collator(self) -> None:
        """None: trl refuses any collator beside packing, so ours takes its place afterwards."""

    def _tokenized(
        self, data: Any, tokenizer: Any, args: TrainingArguments, model: LadderForCausalLM, is_training: bool = False
    ) -> Any:
        """The data as they are: trl tokenizes them."""
        return data

    def _set_signature_columns_if_needed(self) -> None:
        """trl's columns, and the number of a row, which reports name."""
        super()._set_signature_columns_if_needed()
        if SAMPLE_ID not in self._signature_columns:
            self._signature_columns.append(SAMPLE_ID)

    def _send_telemetry(self) -> None:
        """Nothing: trl would report the use of its trainer."""


def _numbered(data: Any) -> Any:
    """A `datasets.Dataset` with the number of each row, counted from 1: the user's rows, or packed ones."""
    if not isinstance(data, Dataset) or SAMPLE_ID in data.column_names:
        return data
    return data.add_column(SAMPLE_ID, list(range(1, len(data) + 1)))


def _documents(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The documents of one of trl's samples, each with its input_ids, and labels and row number where there are any."""
    lengths = sample.get("seq_lengths")
    if lengths is None:
        return [sample]
    documents, begin = [], 0
    for length in lengths:
        parts = (name for name in ("input_ids", "labels") if name in sample)
        number = {SAMPLE_ID: sample[SAMPLE_ID]} if SAMPLE_ID in sample else {}
        documents.append({name: sample[name][begin : begin + length] for name in parts} | number)
        begin += length
    return documents
