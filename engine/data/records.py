"""User data as validated records: a jsonl file, a `datasets.Dataset` or a list of dictionaries.

One of five shapes, detected from the first record and required of all:

    {"text": "..."}                                             plain text
    {"prompt": "...", "completion": "..."}                      loss on the completion only
    {"messages": [{"role": "user", "content": "..."}, ...]}     loss on the assistant's turns only
    {"conversations": [{"from": "human", "value": "..."}, ...]} the same as ShareGPT writes it
    {"input_ids": [...]}                                        already tokenized; perhaps labels, attention_mask

Other fields are ignored. Whatever is wrong with a record is a `DataError` that names file, line, field and an excerpt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

Shape = Literal["text", "prompt", "messages", "conversations", "input_ids"]
REQUIRED_FIELDS: dict[Shape, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "input_ids": ("input_ids",),
}
SHAPES_HELP = "`text`, `prompt` and `completion`, `messages`, `conversations`, or `input_ids`"
MESSAGE_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
EXCERPT_LENGTH = 80


class DataError(ValueError):
    """Data that cannot be trained on.

    Attributes:
        source: the file, or a word for data that came from memory.
        number: 1-based line of the file or record of the list; None when the whole source is meant.
        field: the offending field, such as `messages[2].content`.
        excerpt: the start of what was found there.
    """

    def __init__(
        self,
        problem: str,
        *,
        source: str | None = None,
        unit: str = "line",
        number: int | None = None,
        field: str | None = None,
        excerpt: str | None = None,
    ) -> None:
        self.source, self.number, self.field, self.excerpt = source, number, field, excerpt
        place = [] if source is None else [source]
        if number is not None:
            place.append(f"{unit} {number}")
        if field is not None:
            place.append(f"field `{field}`")
        message = f"{', '.join(place)}: {problem}" if place else problem
        super().__init__(message if excerpt is None else f"{message}\n    found: {excerpt}")


@dataclass(frozen=True)
class Records:
    """Validated records of one shape.

    Attributes:
        source: file name, or a word for data from memory; used in messages.
        unit: what `number` counts, "line" or "record".
        shape: which of the five shapes all rows have.
        rows: (1-based line or record number, fields); of `conversations` they are `messages`.
    """

    source: str
    unit: str
    shape: Shape
    rows: tuple[tuple[int, Mapping[str, Any]], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def error(self, number: int | None, problem: str, field: str | None = None, value: Any = None) -> DataError:
        """A `DataError` about row `number` of this source."""
        excerpt = None if value is None else excerpt_of(value)
        return DataError(problem, source=self.source, unit=self.unit, number=number, field=field, excerpt=excerpt)

    def split(self, heldout: int, seed: int) -> tuple[Records, Records]:
        """Training and held-out records: `heldout` of them drawn with `seed`, both in their original order."""
        chosen = set(random.Random(seed).sample(range(len(self.rows)), heldout))
        kept = tuple(row for index, row in enumerate(self.rows) if index not in chosen)
        drawn = tuple(row for index, row in enumerate(self.rows) if index in chosen)
        return replace(self, rows=kept), replace(self, rows=drawn)


def excerpt_of(value: Any) -> str:
    """The first characters of a value as ASCII, so that no terminal fails to print it."""
    try:
        text = ascii(value)
    except RecursionError:
        return "something nested too deeply to show"
    return text if len(text) <= EXCERPT_LENGTH else text[: EXCERPT_LENGTH - 3] + "..."


def read_records(data: Any) -> Records:
    """Read and validate user data.

    Args:
        data: path of a jsonl file (UTF-8, one JSON object per line, blank lines skipped), a `datasets.Dataset`, or a
            sequence of mappings. `Records` pass through.

    Raises:
        DataError: the file is missing or empty, or a record is malformed; names line, field and excerpt.
        TypeError: `data` is none of these types.
    """
    if isinstance(data, Records):
        return data
    if isinstance(data, str | Path):
        source, unit, numbered = str(data), "line", _read_jsonl(Path(data))
    elif isinstance(data, Mapping):
        raise TypeError(
            f"expected one data set, got a mapping of {sorted(map(str, data))}; pass one of them, as in data['train']"
        )
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        source, unit, numbered = "data", "record", list(enumerate(data, start=1))
    else:
        raise TypeError(
            f"expected a jsonl path, a datasets.Dataset or a list of dictionaries, got {type(data).__name__}; an "
            "iterator is spent after a pass: wrap it in a datasets.IterableDataset, or write it to a jsonl file"
        )
    if not numbered:
        raise DataError("holds no records; expected one JSON object per line with " + SHAPES_HELP, source=source)
    records = _of_shape(Records(source, unit, "text", ()), *numbered[0])
    rows = tuple((number, _validated(records, numbered[0][0], number, row)) for number, row in numbered)
    return replace(records, rows=rows)


def read_stream(stream: Iterable[Any], size: int, source: str = "stream") -> Iterator[Records]:
    """Read and validate a stream, at most `size` records at a time; the first one decides the shape.

    Raises:
        DataError: a record is malformed, or the stream broke off; names the record.
    """
    numbered = _numbered(stream, source)
    records = None
    while chunk := list(islice(numbered, size)):
        if records is None:
            records = _of_shape(Records(source, "record", "text", ()), *chunk[0])
        yield replace(records, rows=tuple((number, _validated(records, 1, number, row)) for number, row in chunk))


def _numbered(stream: Iterable[Any], source: str) -> Iterator[tuple[int, Any]]:
    """(record number, record); errors of the stream itself say how far it came."""
    number = 1
    try:
        for row in stream:
            yield number, row
            number += 1
    except (DataError, MemoryError):
        raise
    except Exception as error:
        problem = f"could not be read ({type(error).__name__}: {error})"
        raise DataError(problem, source=source, unit="record", number=number) from error


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    """(line number, parsed JSON) of every line that is not blank."""
    try:
        raw_lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", source=str(path)) from error
    parsed = []
    for number, raw in enumerate(raw_lines, start=1):
        if not raw.strip():
            continue
        try:
            parsed.append((number, json.loads(raw.decode("utf-8"))))
        except UnicodeDecodeError as error:
            start = max(error.start - EXCERPT_LENGTH // 2, 0)
            problem = f"is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
            raise _line_error(path, number, problem, raw[start : error.end + 10]) from error
        except json.JSONDecodeError as error:
            start = max(error.pos - EXCERPT_LENGTH // 2, 0)
            fault = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            problem = f"is not valid JSON ({fault}); expected one JSON object per line"
            raise _line_error(path, number, problem, error.doc[start : start + EXCERPT_LENGTH]) from error
        except (ValueError, RecursionError) as error:
            fault = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number of too many digits"
            problem = f"{fault}; expected one JSON object per line"
            raise _line_error(path, number, problem, raw[:EXCERPT_LENGTH]) from error
    return parsed


def _line_error(path: Path, number: int, problem: str, found: str | bytes) -> DataError:
    return DataError(problem, source=str(path), number=number, excerpt=excerpt_of(found))


def _of_shape(records: Records, number: int, row: Any) -> Records:
    return replace(records, shape=_detect_shape(records, number, row))


def _detect_shape(records: Records, number: int, row: Any) -> Shape:
    """The one shape whose fields the first record has."""
    if not isinstance(row, Mapping):
        raise records.error(number, f"expected a JSON object with {SHAPES_HELP}, got {_type_name(row)}", value=row)
    shapes = [shape for shape, fields in REQUIRED_FIELDS.items() if all(row.get(name) is not None for name in fields)]
    if len(shapes) == 1:
        return shapes[0]
    keys = ", ".join(f"`{excerpt_of(key)[1:-1]}`" for key in row) or "none"
    if not shapes:
        raise records.error(number, f"expected the fields {SHAPES_HELP}; got {keys}", value=dict(row))
    names = " and ".join(f"`{shape}`" for shape in shapes)
    raise records.error(number, f"holds {names} at once; keep the one to train on", value=dict(row))


def _validated(records: Records, first_number: int, number: int, row: Any) -> Mapping[str, Any]:
    """`row` if it has the shape that the first record had, with every field of the right type."""
    if not isinstance(row, Mapping):
        raise records.error(number, f"expected a JSON object, got {_type_name(row)}", value=row)
    for name in REQUIRED_FIELDS[records.shape]:
        if row.get(name) is None:
            state = "is null" if name in row else "is missing"
            problem = f"{state}; all records need the fields of the first one ({records.unit} {first_number})"
            raise records.error(number, problem, name, dict(row))
    if records.shape in MESSAGE_FIELDS:
        return {"messages": _checked_messages(records, number, row[records.shape])}
    if records.shape == "input_ids":
        return _checked_ids(records, number, row)
    for name in REQUIRED_FIELDS[records.shape]:
        _check_text(records, number, name, row[name], may_be_empty=name == "prompt")
    return row


def _check_text(records: Records, number: int, field: str, value: Any, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise records.error(number, f"expected text, got {_type_name(value)}", field, value)
    if not may_be_empty and not value.strip():
        raise records.error(number, "is empty; remove the record or fill it in", field, value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = "holds half of a surrogate pair (an escape such as \\ud83d on its own), which is no character"
        raise records.error(number, problem, field, value[max(error.start - 20, 0) : error.end + 20]) from error


def _checked_messages(records: Records, number: int, messages: Any) -> list[Mapping[str, Any]]:
    """Messages, each with a role and a content that is text; those of ShareGPT under these names."""
    shape, (speaker, content) = records.shape, MESSAGE_FIELDS[records.shape]
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        problem = f'expected a list of {{"{speaker}": ..., "{content}": ...}}, got {_type_name(messages)}'
        raise records.error(number, problem, shape, messages)
    checked = []
    for index, message in enumerate(messages):
        field = f"{shape}[{index}]"
        if not isinstance(message, Mapping):
            problem = f"expected an object with {speaker} and {content}, got {_type_name(message)}"
            raise records.error(number, problem, field, message)
        for name in (speaker, content):
            if message.get(name) is None:
                state = "is null" if name in message else "is missing"
                problem = f"{state}; each of `{shape}` needs {speaker} and {content}"
                raise records.error(number, problem, f"{field}.{name}", dict(message))
            _check_text(records, number, f"{field}.{name}", message[name], may_be_empty=True)
        if shape == "conversations":
            if message[speaker] not in SHAREGPT_ROLES:
                problem = f"is not a role that is known here; expected one of {', '.join(SHAREGPT_ROLES)}"
                raise records.error(number, problem, f"{field}.{speaker}", message[speaker])
            message = {"role": SHAREGPT_ROLES[message[speaker]], "content": message[content]}
        if message["role"] == "assistant":
            _check_text(records, number, f"{field}.{content}", message["content"])
        checked.append(message)
    if not any(message["role"] == "assistant" for message in checked):
        problem = "has no turn of the assistant, so nothing to learn from"
        raise records.error(number, problem, shape, messages)
    return checked


def _checked_ids(records: Records, number: int, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """The integer lists of an already tokenized record, equal in length."""
    checked: dict[str, list[int]] = {}
    for name in ("input_ids", "labels", "attention_mask"):
        value = row.get(name)
        if value is None:
            continue
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, list) or not all(type(item) is int and abs(item) < 2**31 for item in value):
            raise records.error(number, "expected a list of integers", name, value)
        if len(value) != len(checked.get("input_ids", value)):
            problem = f"has {len(value)} entries where `input_ids` has {len(checked['input_ids'])}"
            raise records.error(number, problem, name, value)
        checked[name] = value
    if len(checked["input_ids"]) < 2:
        problem = "needs at least two tokens: one to read, one to predict"
        raise records.error(number, problem, "input_ids", checked["input_ids"])
    return checked


def _type_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
