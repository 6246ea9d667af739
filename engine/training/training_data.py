"""From whatever a user passes as a data set to what the trainer iterates."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from engine.data.dataset import TokenizedDataset, prepare_dataset
from engine.data.packing import PackedDataset
from engine.data.streaming import StreamedDataset
from engine.model.causal_lm import LadderForCausalLM
from engine.training.arguments import DEFAULT_MAX_LENGTH


def training_data(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, args: TrainingArguments, model: LadderForCausalLM
) -> Any:
    """`data` as token ids: an endless stream where it is one, packed where `args` ask for that.

    Raises:
        DataError: data that cannot be trained on.
        ValueError: an option of `args` that this kind of data set does not allow.
    """
    data = prepared(data, tokenizer, args, model, endless=True)
    wanting = [option for option in ("packing", "longest_first") if getattr(args, option, False)]
    if data is None or not wanting:
        return data
    if not isinstance(data, TokenizedDataset | PackedDataset):
        raise ValueError(
            f"{wanting[0]}=True needs the length of every sample, which a {type(data).__name__} does not tell: pass a "
            f"jsonl path, a datasets.Dataset or a list of dictionaries, or leave {wanting[0]} out"
        )
    if "packing" not in wanting or isinstance(data, PackedDataset):
        return data
    return PackedDataset(data, args.max_length, args.seed if args.data_seed is None else args.data_seed)


def prepared(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: TrainingArguments,
    model: LadderForCausalLM,
    endless: bool = False,
) -> Any:
    """User data as token ids, a stream on the fly; torch data sets with places to index are taken as they are."""
    is_stream = isinstance(data, torch.utils.data.IterableDataset)
    is_torch = isinstance(data, torch.utils.data.Dataset) and not is_stream and not hasattr(data, "column_names")
    if data is None or is_torch or isinstance(data, StreamedDataset):
        return data
    limits = {
        "max_length": getattr(args, "max_length", None) or DEFAULT_MAX_LENGTH,
        "vocab_size": model.backbone.config.vocab_size,
    }
    if not is_stream:
        return prepare_dataset(data, model.backbone.tokenizer() if tokenizer is None else tokenizer, **limits)
    if args.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers is {args.dataloader_num_workers}, and each would read the whole stream: set it to "
            "0 or 1"
        )
    return StreamedDataset(data, tokenizer, **limits, endless=endless)
