"""From user data to token ids with a loss mask.

    text                  BOS? text EOS               loss on all
    prompt + completion   BOS? prompt completion EOS  loss on the completion and EOS
    messages              the tokenizer's template    loss on each assistant turn, its end of turn, and EOS
    conversations         as messages, from ShareGPT  the same

Masks are made by position, never by token id: padding may be the same token as EOS. A text longer than max_length
becomes consecutive pieces that lose nothing. The other shapes are cut at max_length, and counted; a prompt that alone
fills it is an error, because nothing of that sample could be learned.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.data.chat import TemplateError, assistant_spans
from engine.data.collator import IGNORE_INDEX
from engine.data.records import MESSAGE_FIELDS, DataError, Records, read_records

logger = logging.getLogger(__name__)

ENCODE_BATCH = 1000


@dataclass(frozen=True)
class Sample:
    """Token ids of one record and which of them the model learns to predict."""

    number: int
    ids: list[int]
    learned: list[bool]
    is_cut: bool = False


class TokenizedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples as flat arrays: 5 bytes per token, whatever the number of samples.

    Item i is `{"input_ids": int64 [n], "labels": int64 [n], "sample_id": int}`; labels are unshifted, -100 where there
    is no loss, always at the first token. sample_id is the line or record that the sample came from.

    Attributes:
        lengths: int64 [samples], tokens of each.
        truncated: how many samples were cut at max_length.
    """

    def __init__(self, samples: Iterable[Sample], truncated: int = 0) -> None:
        ids, learned, lengths, numbers = [], [], [], []
        for sample in samples:
            ids.append(np.asarray(sample.ids, dtype=np.int32))
            learned.append(np.asarray(sample.learned, dtype=np.bool_))
            lengths.append(len(sample.ids))
            numbers.append(sample.number)
        self._ids = np.concatenate(ids)
        self._learned = np.concatenate(learned)
        self.lengths = np.array(lengths, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._numbers = np.array(numbers, dtype=np.int64)
        self.truncated = truncated

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        rows = slice(self._ends[index - 1] if index else 0, self._ends[index])
        return sample_item(int(self._numbers[index]), self._ids[rows], self._learned[rows])

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(self.lengths.max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return len(self._ids)

    def digest(self) -> str:
        """sha256 over token ids, loss mask and lengths: the same for the same samples in the same order."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        hashed = hashlib.sha256()
        for array in (self.lengths, self._ids, self._learned):
            hashed.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
        return hashed.hexdigest()


def prepare_dataset(
    data: Any, tokenizer: PreTrainedTokenizerBase, *, max_length: int, vocab_size: int
) -> TokenizedDataset:
    """Read, check and tokenize user data.

    Args:
        data: a jsonl path, a `datasets.Dataset`, a list of dictionaries, or `Records`.
        tokenizer: the backbone's tokenizer.
        max_length: longest sample, in tokens.
        vocab_size: rows of the backbone's embedding; ids at or above it are refused.

    Raises:
        DataError: names the file, line and field, and what to do.
    """
    records = read_records(data)
    samples = list(fitted_samples(records, tokenizer, max_length=max_length, vocab_size=vocab_size))
    truncated = sum(sample.is_cut for sample in samples)
    if truncated:
        logger.warning(
            "%s: %d of %d samples are longer than max_length %d and were cut there; raise it to keep them whole",
            records.source,
            truncated,
            len(records),
            max_length,
        )
    return TokenizedDataset(samples, truncated)


def fitted_samples(
    records: Records, tokenizer: PreTrainedTokenizerBase | None, *, max_length: int, vocab_size: int
) -> Iterator[Sample]:
    """Records as samples of at most max_length tokens; raises as `prepare_dataset` does.

    Args:
        tokenizer: may be None where the records are tokenized already.
    """
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; expected at least 2: one token to read, one to predict")
    for sample in _encode(records, tokenizer):
        largest, smallest = max(sample.ids, default=0), min(sample.ids, default=0)
        if largest >= vocab_size or smallest < 0:
            raise records.error(
                sample.number,
                f"token id {largest if largest >= vocab_size else smallest} is outside the backbone's embedding of "
                f"{vocab_size} rows; use the tokenizer that belongs to the backbone, without added tokens "
                "(the embedding is frozen and never resized)",
            )
        yield from _fitted(records, sample, max_length)


def sample_item(number: int, ids: np.ndarray, learned: np.ndarray) -> dict[str, Any]:
    """A sample as the collator takes it: see `TokenizedDataset`."""
    input_ids = torch.from_numpy(ids.astype(np.int64))
    labels = torch.where(torch.from_numpy(learned), input_ids, IGNORE_INDEX)
    labels[0] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels, "sample_id": number}


def _fitted(records: Records, sample: Sample, max_length: int) -> Iterator[Sample]:
    """Pieces of at most max_length tokens.

    Where everything is learned, each piece starts with the last token of the one before, so that every token but the
    first is predicted exactly once. Masked samples are cut.
    """
    if len(sample.ids) < 2:
        raise records.error(sample.number, "gives fewer than two tokens: one to read, one to predict", records.shape)
    if all(sample.learned):
        for start in range(0, len(sample.ids) - 1, max_length - 1):
            piece = slice(start, start + max_length)
            yield Sample(sample.number, sample.ids[piece], sample.learned[piece])
        return
    if not any(sample.learned[1:max_length]):
        fitting = next((place for place, learned in enumerate(sample.learned) if learned and place), None)
        if fitting is None:
            raise records.error(sample.number, "has no token to learn: all labels are masked", "labels")
        raise records.error(
            sample.number,
            f"the prompt alone takes {fitting} tokens and max_length is {max_length}, so nothing of the answer is "
            "left; shorten the prompt or raise max_length",
            records.shape,
        )
    is_cut = len(sample.ids) > max_length
    yield Sample(sample.number, sample.ids[:max_length], sample.learned[:max_length], is_cut)


def _encode(records: Records, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Sample]:
    """One sample per record, of any length."""
    if records.shape == "input_ids":
        for number, row in records.rows:
            yield _tokenized(number, row)
        return
    if tokenizer is None:
        raise DataError(
            f"holds `{records.shape}`, and the backbone has no tokenizer: pass one as processing_class, or give "
            "`input_ids`",
            source=records.source,
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no EOS token, so the model could not learn where to stop; set tokenizer.eos_token"
        )
    if records.shape in MESSAGE_FIELDS:
        yield from _encode_conversations(records, tokenizer)
        return
    prefix = prefix_ids(tokenizer)
    for start in range(0, len(records), ENCODE_BATCH):
        rows = records.rows[start : start + ENCODE_BATCH]
        if records.shape == "text":
            for (number, _), ids in zip(rows, _ids(tokenizer, [row["text"] for _, row in rows]), strict=True):
                ids = _closed(_opened(ids, prefix), tokenizer)
                yield Sample(number, ids, [True] * len(ids))
        else:
            yield from _encode_completions(rows, tokenizer, prefix)


def _encode_completions(
    rows: Iterable[tuple[int, Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase, prefix: list[int]
) -> Iterator[Sample]:
    """Prompt tokens exactly as `generate` will see them, then the completion's."""
    prompts = _ids(tokenizer, [row["prompt"] for _, row in rows])
    together = _ids(tokenizer, [row["prompt"] + row["completion"] for _, row in rows])
    for (number, row), prompt, both in zip(rows, prompts, together, strict=True):
        # A token may span the border; then the halves are tokenized on their own, as they are when generating.
        joined = both[: len(prompt)] == prompt and len(both) > len(prompt)
        completion = both[len(prompt) :] if joined else _ids(tokenizer, [row["completion"]])[0]
        opening = _opened(prompt, prefix)
        completion = _closed(completion, tokenizer)
        yield Sample(number, opening + completion, [False] * len(opening) + [True] * len(completion))


def _encode_conversations(records: Records, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
    """Conversations through the tokenizer's chat template, learned where the assistant speaks."""
    if not tokenizer.chat_template:
        raise DataError(
            f"holds `{records.shape}`, but the tokenizer has no chat template; write the data as `prompt` and "
            "`completion`, or set tokenizer.chat_template (instruct versions of a backbone usually have one)",
            source=records.source,
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"`{records.shape}` need a fast tokenizer, which knows the place of every token", source=records.source
        )
    for number, row in records.rows:
        try:
            yield _conversation(number, row["messages"], tokenizer)
        except TemplateError as error:
            problem = f"{error}; mark the assistant's turns with {{% generation %}} in the template, or use `prompt`"
            raise records.error(number, problem, records.shape, row["messages"]) from error


def _conversation(number: int, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Sample:
    answered = messages[-1]["role"] == "assistant"
    if re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()):
        encoded = _rendered(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, learned = list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
        if not any(learned):
            return Sample(number, ids, learned)
        ids, learned = _with_ends_of_turn(ids, learned, answered, tokenizer)
    else:
        text, spans = assistant_spans(
            messages,
            lambda part, opening: _rendered(tokenizer, part, tokenize=False, add_generation_prompt=opening),
        )
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, learned = list(encoded["input_ids"]), _inside(encoded["offset_mapping"], spans)
    if answered and ids and ids[-1] != tokenizer.eos_token_id:
        return Sample(number, [*ids, tokenizer.eos_token_id], [*learned, True])
    return Sample(number, ids, learned)


def _inside(offsets: Iterable[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens start inside one of `spans` and cover some text."""
    inside, previous = [], 0
    for first, last in offsets:
        # ByteLevel(trim_offsets=True) gives a token of spaces alone the empty place behind them.
        begin = previous if first == last else first
        inside.append(last > begin and any(start <= begin < end for start, end in spans))
        previous = last
    return inside


def _with_ends_of_turn(
    ids: list[int], learned: list[bool], answered: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Learn the end of turn that a template writes behind its generation block, and cut off what follows the last.

    Behind an earlier turn a special token may also open the next one; it is an end of turn if it is EOS or the one
    behind the last turn.
    """

    def blank(place: int) -> bool:
        return not tokenizer.decode([ids[place]]).strip()

    learned, ends_of_turn = list(learned), {tokenizer.eos_token_id}
    blocks = [place for place in range(len(ids)) if learned[place] and not any(learned[place + 1 : place + 2])]
    for block in reversed(blocks):
        place = block + 1
        while place < len(ids) and blank(place):
            place += 1
        if place == len(ids):
            continue
        if answered and block == blocks[-1] and not tokenizer.decode([ids[place]], skip_special_tokens=True):
            ends_of_turn.add(ids[place])
        if ids[place] in ends_of_turn:
            learned[block : place + 1] = [True] * (place + 1 - block)
    if not answered:
        return ids, learned
    stop = len(ids)
    while not learned[stop - 1] and blank(stop - 1):
        stop -= 1
    spoken = stop
    while spoken > 1 and blank(spoken - 1):
        spoken -= 1
    if ids[spoken - 1] == tokenizer.eos_token_id:
        stop, learned[spoken - 1] = spoken, True
    return ids[:stop], learned[:stop]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Iterable[Mapping[str, str]], **options: Any) -> Any:
    """apply_chat_template, whose errors (as from roles that do not alternate) are the data's fault."""
    from jinja2 import TemplateError as JinjaError

    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (JinjaError, ValueError, TypeError, IndexError) as error:
        raise TemplateError(f"the chat template refuses the conversation ({error})") from error


def _tokenized(number: int, row: Mapping[str, list[int]]) -> Sample:
    """An already tokenized record, its padding dropped."""
    ids = row["input_ids"]
    learned = [label != IGNORE_INDEX for label in row.get("labels", ids)]
    mask = row.get("attention_mask", [1] * len(ids))
    return Sample(
        number,
        [token for token, keep in zip(ids, mask, strict=True) if keep],
        [flag for flag, keep in zip(learned, mask, strict=True) if keep],
    )


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text on its own, usually BOS or nothing."""
    bare = _ids(tokenizer, ["a"])[0]
    dressed = tokenizer("a", verbose=False)["input_ids"]
    place = next(start for start in range(len(dressed)) if dressed[start : start + len(bare)] == bare)
    return dressed[:place]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _opened(ids: list[int], prefix: list[int]) -> list[int]:
    """`ids` behind the prefix, which a text that spells out its BOS has already."""
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with EOS at the end, which a text that spells it out has already."""
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def show_sample(sample: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode one sample, with [[ ]] around what the loss is on."""
    ids, learned = sample["input_ids"].tolist(), (sample["labels"] != IGNORE_INDEX).tolist()
    shown, start = [], 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or learned[place] != learned[start]:
            text = tokenizer.decode(ids[start:place])
            shown.append(f"[[{text}]]" if learned[start] else text)
            start = place
    return "".join(shown)
