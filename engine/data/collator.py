"""Batches without padding: documents side by side in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.rows import IGNORE_INDEX


@dataclass(frozen=True)
class Collator:
    """Flatten samples into one row of T tokens that never look across document borders.

    Attributes:
        row_bucket: the number of supervised rows is rounded up to a multiple of this, so that few shapes occur.
        pad_to: fill every sample up to this many tokens, behind its own, which cannot see them, and without a loss on
            them: batches of as many samples have one layout, as `LadderArguments(cuda_graph=True)` asks. The filling is
            computed, and counted in tokens per second.
    """

    row_bucket: int = 64
    pad_to: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Build a batch.

        Args:
            samples: each has `input_ids` [n]; optionally `labels` [n], unshifted, -100 where there is no loss (without
                them every token counts), `attention_mask` [n], whose zeros are dropped, and `sample_id`, where it came
                from. Or each is a list of such samples, as of a `PackedDataset`.

        Returns:
            input_ids, position_ids, labels: int64 [1, T]; the first label of each document is -100.
            cu_seq_lens_q = cu_seq_lens_k: int32 [documents + 1]; max_length_q = max_length_k: int.
            document_lengths: list of ints, for control flow; the tensors may go to a device.
            supervised_rows: int64 [R], rows whose next token is supervised, padded by row 0.
            supervised_targets: int64 [R], those next tokens, padded by -100.
            sample_ids: list of ints, where all samples have them; for reports, not for the model.

        Raises:
            ValueError: lengths within a sample disagree, a sample is longer than `pad_to`, samples are packed and
                `pad_to` is set, or there is no token at all.
        """
        if self.pad_to is not None and any(isinstance(sample, Sequence) for sample in samples):
            raise ValueError("packed rows hold documents of many lengths, which pad_to cannot make one: leave out one")
        samples = [s for sample in samples for s in (sample if isinstance(sample, Sequence) else [sample])]
        documents = [self._filled(*_document(sample)) for sample in samples]
        documents = [document for document in documents if len(document[0])]
        if not documents:
            raise ValueError(f"a batch of {len(samples)} samples holds no token; expected at least one")
        document_lengths = [len(ids) for ids, _ in documents]
        lengths = torch.tensor(document_lengths)
        input_ids = torch.cat([ids for ids, _ in documents])
        labels = torch.cat([labels for _, labels in documents])
        boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        rows, targets = self._supervised(labels)
        cu_seq_lens, longest = boundaries.to(torch.int32), max(document_lengths)
        sample_ids = [sample["sample_id"] for sample in samples if "sample_id" in sample]
        return {
            "input_ids": input_ids[None],
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None],
            "labels": labels[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "document_lengths": document_lengths,
            "supervised_rows": rows,
            "supervised_targets": targets,
            **({"sample_ids": sample_ids} if len(sample_ids) == len(samples) else {}),
        }

    def _filled(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and labels of one sample with `pad_to` places."""
        if self.pad_to is None:
            return ids, labels
        missing = self.pad_to - len(ids)
        if missing < 0:
            raise ValueError(f"a sample has {len(ids)} tokens and pad_to is {self.pad_to}; raise it, or cut the sample")
        return F.pad(ids, (0, missing)), F.pad(labels, (0, missing), value=IGNORE_INDEX)

    def _supervised(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that predict a supervised token, and the tokens; a document's first label is -100 already."""
        rows = (labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)
        size = max(-(-len(rows) // self.row_bucket), 1) * self.row_bucket
        padded_rows = torch.zeros(size, dtype=torch.int64)
        padded_targets = torch.full((size,), IGNORE_INDEX, dtype=torch.int64)
        padded_rows[: len(rows)] = rows
        padded_targets[: len(rows)] = labels[rows + 1]
        return padded_rows, padded_targets


def _document(sample: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens and labels of one sample, padding dropped and the first label masked."""
    ids = torch.as_tensor(sample["input_ids"], dtype=torch.int64)
    labels = sample.get("labels")
    labels = ids.clone() if labels is None else torch.as_tensor(labels, dtype=torch.int64).clone()
    if ids.shape != labels.shape:
        raise ValueError(f"a sample has {len(ids)} input_ids and {len(labels)} labels; expected one label per token")
    mask = sample.get("attention_mask")
    if mask is not None:
        keep = torch.as_tensor(mask).bool()
        if keep.shape != ids.shape:
            raise ValueError(f"a sample has {len(ids)} input_ids and an attention_mask of {len(keep)}")
        ids, labels = ids[keep], labels[keep]
    labels[:1] = IGNORE_INDEX
    return ids, labels
