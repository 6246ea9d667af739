"""Where batches enter the engine: [B, T] token ids, padded or packed, become rows and a layout; and the way back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from engine.sequence import SequenceLayout
from ladder_kernels.reference import IGNORE_INDEX


@dataclass(frozen=True)
class Rows:
    """A batch as flattened rows.

    Attributes:
        input_ids: int64 [N], real tokens only (cached columns keep their padding).
        layout: documents and positions of the N rows.
        shape: (B, T) of the batch.
        kept: int64 [N], place of each row in the flattened batch; None where every place is a row.
    """

    input_ids: Tensor
    layout: SequenceLayout
    shape: tuple[int, int]
    kept: Tensor | None = None

    def padded(self, values: Tensor) -> Tensor:
        """[N, C] per row -> [B, T, C], zero where the batch is padding."""
        if self.kept is None:
            return values.unflatten(0, self.shape)
        places = self.shape[0] * self.shape[1]
        return values.new_zeros(places, values.shape[-1]).index_copy(0, self.kept, values).unflatten(0, self.shape)

    def columns(self, logits_to_keep: int | Tensor) -> tuple[Tensor | None, Rows]:
        """Rows that lie in some columns of the batch.

        Args:
            logits_to_keep: the last this many columns, 0 for all, or int64 column indices.

        Returns:
            int64 row indices, None for all rows, and the smaller batch that they form (its layout is not meaningful).
        """
        if isinstance(logits_to_keep, int) and not 0 < logits_to_keep < self.shape[1]:
            return None, self
        batch, length = self.shape
        device = self.input_ids.device
        if isinstance(logits_to_keep, int):
            columns = torch.arange(length - logits_to_keep, length, device=device)
        else:
            columns = torch.arange(length, device=device)[logits_to_keep.to(device)]
        places = (torch.arange(batch, device=device)[:, None] * length + columns).flatten()
        shape = (batch, len(columns))
        if self.kept is None:
            return places, Rows(self.input_ids[places], self.layout, shape)
        row_at = torch.full((batch * length,), -1, device=device).index_copy(0, self.kept, self._numbers())
        chosen = row_at[places]
        kept = (chosen >= 0).nonzero().flatten()
        chosen = chosen[kept]
        return chosen, Rows(self.input_ids[chosen], self.layout, shape, kept)

    def supervised(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that predict a supervised token, and that token.

        Args:
            labels: int64 [B, T], unshifted, -100 where unsupervised. The first token of a document is never predicted.

        Returns:
            int64 [R] row indices and int64 [R] token ids.
        """
        if labels.shape != self.shape:
            raise ValueError(f"labels must have the shape of input_ids {self.shape}, got {tuple(labels.shape)}")
        own = labels.flatten() if self.kept is None else labels.flatten()[self.kept]
        targets = own.roll(-1)
        ends = torch.tensor(self.layout.lengths, device=own.device).cumsum(0) - 1
        targets[ends] = IGNORE_INDEX
        rows = (targets != IGNORE_INDEX).nonzero().flatten()
        return rows, targets[rows]

    def _numbers(self) -> Tensor:
        return torch.arange(len(self.input_ids), device=self.input_ids.device)


def rows_of_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
) -> Rows:
    """Rows of a whole batch, without a cache.

    Documents come from `document_lengths`, else from `cu_seq_lens`, else from the places where `position_ids` do not
    continue, else from the real tokens of `attention_mask` (left or right padding), else every sequence is one.

    Args:
        input_ids: int64 [B, T].
        attention_mask: [B, T], nonzero on real tokens.
        position_ids: int64 [B, T] or [1, T].
        cu_seq_lens: int [documents + 1], cumulated lengths over the flattened batch, starting with 0.
        document_lengths: the same documents as host integers, none of them 0. They spare a wait for the device, where
            loops such as transformers' Trainer move every tensor; the values of `cu_seq_lens` are then not checked.

    Raises:
        ValueError: shapes that disagree, or a mask together with packed documents.
    """
    _check_ids(input_ids)
    if attention_mask is not None:
        _check_mask(attention_mask, tuple(input_ids.shape), "input_ids")
        if cu_seq_lens is not None or document_lengths is not None:
            raise ValueError(_MASK_AND_PACKED.format("cu_seq_lens_q or document_lengths"))
        return _unpadded(input_ids, attention_mask.bool(), position_ids)
    shape = (input_ids.shape[0], input_ids.shape[1])
    positions = None if position_ids is None else _positions(position_ids, shape)
    boundaries = None
    if document_lengths is not None:
        lengths = list(document_lengths)
        boundaries = _boundaries(lengths, cu_seq_lens, input_ids)
    elif cu_seq_lens is not None:
        lengths = _document_lengths(cu_seq_lens, input_ids.numel())
    elif positions is not None:
        # The first of a sequence, and whatever does not continue its predecessor, starts a document.
        starts = positions.diff(dim=1, prepend=positions[:, :1]) != 1
        starts = starts.flatten().nonzero().flatten()
        lengths = starts.diff(append=starts.new_tensor([input_ids.numel()])).tolist()
    else:
        lengths = [shape[1]] * shape[0]
    if positions is None:
        flat_positions = SequenceLayout.packed(lengths, input_ids.device).positions
    else:
        flat_positions = positions.flatten()
    layout = SequenceLayout(flat_positions, tuple(lengths), boundaries=boundaries)
    return Rows(input_ids.flatten(), layout, shape)


def rows_of_cached_step(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int
) -> Rows:
    """Rows of the newest columns of a batch whose `past` earlier columns are cached; padding stays in.

    Args:
        input_ids: int64 [B, q].
        attention_mask: [B, past + q], nonzero on real tokens; None where all are real.
        position_ids: accepted where they count the real tokens, which is what the engine does itself.
        past: cached columns.

    Raises:
        ValueError: a mask of another shape, or positions that count something else.
    """
    _check_ids(input_ids)
    batch, length = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones(batch, past + length, dtype=torch.bool, device=input_ids.device)
    _check_mask(attention_mask, (batch, past + length), "the cached columns and input_ids")
    layout = SequenceLayout.cached(attention_mask, length)
    if position_ids is not None:
        real = attention_mask[:, past:].bool()
        expected = layout.positions.unflatten(0, (batch, length))
        if not torch.equal(_positions(position_ids, (batch, length))[real], expected[real]):
            raise ValueError(
                "with past_key_values, position_ids must count the real tokens of attention_mask from 0: leave them out"
            )
    return Rows(input_ids.flatten(), layout, (batch, length))


def enter(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    cache: DynamicCache | None,
    use_cache: bool | None,
    document_lengths: Sequence[int] | None = None,
) -> tuple[Rows, DynamicCache | None]:
    """Rows of one call of the model and the cache that it extends, made here where `use_cache` asks for one.

    Raises:
        ValueError: another kind of cache, or what `rows_of_batch` and `rows_of_cached_step` refuse.
    """
    if cache is None and use_cache:
        cache = DynamicCache()
    if cache is None:
        return rows_of_batch(input_ids, attention_mask, position_ids, cu_seq_lens, document_lengths), None
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"past_key_values must be a DynamicCache, got {type(cache).__name__}: unset cache_implementation"
        )
    if cu_seq_lens is not None or document_lengths is not None:
        raise ValueError(
            "cu_seq_lens_q or document_lengths with a cache: cached decoding takes padded batches with attention_mask"
        )
    return rows_of_cached_step(input_ids, attention_mask, position_ids, cache.get_seq_length()), cache


def supervision(
    rows: Rows, labels: Tensor | None, supervised_rows: Tensor | None, supervised_targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row indices [R] and target ids [R]: the given ones, else those of `labels`.

    Raises:
        ValueError: targets without rows of their shape, or on a batch that is unpadded here.
    """
    if supervised_targets is None:
        assert labels is not None
        return rows.supervised(labels)
    if supervised_rows is None or supervised_rows.shape != supervised_targets.shape or supervised_rows.dim() != 1:
        got = None if supervised_rows is None else tuple(supervised_rows.shape)
        raise ValueError(
            f"supervised_targets {tuple(supervised_targets.shape)} needs supervised_rows of its 1-D shape, got {got}"
        )
    if rows.kept is not None:
        raise ValueError("supervised_rows index an unpadded batch: leave attention_mask out, or pass labels instead")
    return supervised_rows, supervised_targets


_MASK_AND_PACKED = (
    "attention_mask together with packed documents ({}): a mask cannot say where documents end, and an all-ones one "
    "would let them see each other. Use attention_mask for padded batches, position_ids or cu_seq_lens_q for packed"
)


def _unpadded(input_ids: Tensor, mask: Tensor, position_ids: Tensor | None) -> Rows:
    shape = (input_ids.shape[0], input_ids.shape[1])
    if position_ids is not None:
        counted = mask.long().cumsum(-1) - 1
        if not torch.equal(_positions(position_ids, shape)[mask], counted[mask]):
            raise ValueError(_MASK_AND_PACKED.format("position_ids that restart or skip"))
    lengths = [length for length in mask.sum(-1).tolist() if length]
    if not lengths:
        raise ValueError("attention_mask marks no real token at all: expected at least one nonzero entry")
    layout = SequenceLayout.packed(lengths, input_ids.device)
    if layout.positions.numel() == input_ids.numel():
        return Rows(input_ids.flatten(), layout, shape)
    kept = mask.flatten().nonzero().flatten()
    return Rows(input_ids.flatten()[kept], layout, shape, kept)


def _document_lengths(cu_seq_lens: Tensor, num_rows: int) -> list[int]:
    if cu_seq_lens.dim() != 1 or len(cu_seq_lens) < 2:
        raise ValueError(f"cu_seq_lens_q must be 1-D with at least 2 entries, got shape {tuple(cu_seq_lens.shape)}")
    bounds = cu_seq_lens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != num_rows or min(lengths) < 0:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {num_rows} tokens of input_ids, got {bounds[:3]} ... {bounds[-1]}"
        )
    return [length for length in lengths if length]


def _boundaries(lengths: list[int], cu_seq_lens: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """`cu_seq_lens` if kernels can read it. The lengths are checked; for its values the host would have to wait."""
    if not lengths or min(lengths) < 1 or sum(lengths) != input_ids.numel():
        raise ValueError(
            f"document_lengths must be at least 1 and sum to the {input_ids.numel()} tokens of input_ids, "
            f"got {lengths[:4]}{' ...' if len(lengths) > 4 else ''}, which sum to {sum(lengths)}"
        )
    if cu_seq_lens is None:
        return None
    if cu_seq_lens.shape != (len(lengths) + 1,):
        raise ValueError(
            f"cu_seq_lens_q must have {len(lengths) + 1} entries beside {len(lengths)} document_lengths, "
            f"got shape {tuple(cu_seq_lens.shape)}"
        )
    return cu_seq_lens if cu_seq_lens.dtype == torch.int32 and cu_seq_lens.device == input_ids.device else None


def _positions(position_ids: Tensor, shape: tuple[int, int]) -> Tensor:
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, shape[0]) or position_ids.shape[1] != shape[1]:
        raise ValueError(f"position_ids must have shape {shape} or {(1, shape[1])}, got {tuple(position_ids.shape)}")
    return position_ids.expand(shape)


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be a non-empty integer tensor [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}"
        )


def _check_mask(attention_mask: Tensor, shape: tuple[int, ...], of: str) -> None:
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask must have the shape {shape} of {of}, got {tuple(attention_mask.shape)}; the engine builds "
            "the causal mask itself"
        )
    if not attention_mask.is_floating_point() and attention_mask.dtype != torch.bool and int(attention_mask.max()) > 1:
        raise ValueError(
            "attention_mask must hold 0 and 1 only, got larger values; packed documents are told apart by position_ids "
            "or cu_seq_lens_q"
        )
