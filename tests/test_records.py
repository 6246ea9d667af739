"""Reading records: every malformed line has its message, and any bytes load or are a `DataError`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import CHAT, learned_text, prepared, write

from engine.data.records import DataError, read_records

PROPERTY = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXT = {"text": "fine"}
PAIR = {"prompt": "p", "completion": "c"}
TURNS = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
IDS = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}

# The lines of a file, and what is said of it: line, field, problem, what to do, and what was found.
FAULTS: dict[str, tuple[list[Any], str]] = {
    "truncated line": (
        [TEXT, b'{"text": "cut off'],
        "line 2: is not valid JSON (Unterminated string starting at column 10); expected one JSON "
        "object per line"
        '\n    found: \'{"text": "cut off\'',
    ),
    "garbage line": (
        [TEXT, b"\x00\x01garbage"],
        "line 2: is not valid JSON (Expecting value at column 1); expected one JSON object per line"
        "\n    found: '\\x00\\x01garbage'",
    ),
    "two objects in a line": (
        [b'{"text": "a"} {"text": "b"}'],
        "line 1: is not valid JSON (Extra data at column 15); expected one JSON object per line"
        '\n    found: \'{"text": "a"} {"text": "b"}\'',
    ),
    "excerpt around the fault": (
        [b'{"text": "' + b"x" * 300 + b'" "y"}'],
        "line 1: is not valid JSON (Expecting ',' delimiter at column 313); expected one JSON object "
        "per line"
        '\n    found: \'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" "y"}\'',
    ),
    "blank lines count": (
        [TEXT, b"", b"  ", b"{"],
        "line 4: is not valid JSON (Expecting property name enclosed in double quotes at column 2); "
        "expected one JSON object per line"
        "\n    found: '{'",
    ),
    "bad UTF-8": (
        [TEXT, b'{"text": "caf\xe9"}'],
        'line 2: is not UTF-8 (byte 14 of the line); save the file as UTF-8\n    found: b\'{"text": "caf\\xe9"}\'',
    ),
    "UTF-16": (
        [b"\xff\xfe{\x00}\x00"],
        "line 1: is not UTF-8 (byte 1 of the line); save the file as UTF-8\n    found: b'\\xff\\xfe{\\x00}\\x00'",
    ),
    "huge number": (
        [b'{"text": ' + b"1" * 5000 + b"}"],
        "line 1: holds a number of too many digits; expected one JSON object per line"
        '\n    found: b\'{"text": 111111111111111111111111111111111111111111111111111111111111111111...',
    ),
    "deep": (
        [b'{"text": ' + b"[" * 200_000],
        "line 1: is nested too deeply; expected one JSON object per line"
        '\n    found: b\'{"text": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[...',
    ),
    "array": (
        [[1, 2]],
        "line 1: expected a JSON object with `text`, `prompt` and `completion`, `messages`, "
        "`conversations`, or `input_ids`, got a list"
        "\n    found: [1, 2]",
    ),
    "scalar later": (
        [TEXT, 7],
        "line 2: expected a JSON object, got a number\n    found: 7",
    ),
    "no shape": (
        [{"body": "x", "id": 1}],
        "line 1: expected the fields `text`, `prompt` and `completion`, `messages`, `conversations`, or "
        "`input_ids`; got `body`, `id`"
        "\n    found: {'body': 'x', 'id': 1}",
    ),
    "no keys": (
        [{}],
        "line 1: expected the fields `text`, `prompt` and `completion`, `messages`, `conversations`, or "
        "`input_ids`; got none"
        "\n    found: {}",
    ),
    "half a pair": (
        [{"prompt": "x"}],
        "line 1: expected the fields `text`, `prompt` and `completion`, `messages`, `conversations`, or "
        "`input_ids`; got `prompt`"
        "\n    found: {'prompt': 'x'}",
    ),
    "two shapes": (
        [TEXT | PAIR],
        "line 1: holds `text` and `prompt` at once; keep the one to train on"
        "\n    found: {'text': 'fine', 'prompt': 'p', 'completion': 'c'}",
    ),
    "missing key": (
        [TEXT, {"txt": "x"}],
        "line 2, field `text`: is missing; all records need the fields of the first one (line 1)"
        "\n    found: {'txt': 'x'}",
    ),
    "mixed shapes": (
        [TEXT, CHAT],
        "line 2, field `text`: is missing; all records need the fields of the first one (line 1)"
        "\n    found: {'messages': [{'role': 'user', 'content': 'u'}, {'role': 'assistant', 'conten...",
    ),
    "null": (
        [TEXT, {"text": None}],
        "line 2, field `text`: is null; all records need the fields of the first one (line 1)"
        "\n    found: {'text': None}",
    ),
    "number instead of text": (
        [TEXT, {"text": 3.5}],
        "line 2, field `text`: expected text, got a number\n    found: 3.5",
    ),
    "true instead of text": (
        [{"prompt": True, "completion": "c"}],
        "line 1, field `prompt`: expected text, got true or false\n    found: True",
    ),
    "list instead of text": (
        [{"prompt": "p", "completion": ["c"]}],
        "line 1, field `completion`: expected text, got a list\n    found: ['c']",
    ),
    "empty text": (
        [TEXT, {"text": " \n"}],
        "line 2, field `text`: is empty; remove the record or fill it in\n    found: ' \\n'",
    ),
    "empty completion": (
        [PAIR, {"prompt": "p", "completion": ""}],
        "line 2, field `completion`: is empty; remove the record or fill it in\n    found: ''",
    ),
    "half a surrogate pair": (
        [b'{"text": "a\\ud83d"}'],
        "line 1, field `text`: holds half of a surrogate pair (an escape such as \\ud83d on its own), "
        "which is no character"
        "\n    found: 'a\\ud83d'",
    ),
    "text instead of messages": (
        [{"messages": "hi"}],
        'line 1, field `messages`: expected a list of {"role": ..., "content": ...}, got text\n    found: \'hi\'',
    ),
    "object instead of messages": (
        [{"messages": CHAT["messages"][0]}],
        'line 1, field `messages`: expected a list of {"role": ..., "content": ...}, got an object'
        "\n    found: {'role': 'user', 'content': 'u'}",
    ),
    "text instead of a message": (
        [{"messages": ["hi"]}],
        "line 1, field `messages[0]`: expected an object with role and content, got text\n    found: 'hi'",
    ),
    "message without content": (
        [{"messages": [{"role": "user"}]}],
        "line 1, field `messages[0].content`: is missing; each of `messages` needs role and content"
        "\n    found: {'role': 'user'}",
    ),
    "content that is a number": (
        [{"messages": [{"role": "user", "content": 1}]}],
        "line 1, field `messages[0].content`: expected text, got a number\n    found: 1",
    ),
    "content in parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}]}],
        "line 1, field `messages[0].content`: expected text, got a list\n    found: [{'type': 'text', 'text': 'u'}]",
    ),
    "silent assistant": (
        [{"messages": [{"role": "assistant", "content": ""}]}],
        "line 1, field `messages[0].content`: is empty; remove the record or fill it in\n    found: ''",
    ),
    "no assistant": (
        [{"messages": [CHAT["messages"][0]]}],
        "line 1, field `messages`: has no turn of the assistant, so nothing to learn from"
        "\n    found: [{'role': 'user', 'content': 'u'}]",
    ),
    "no messages": (
        [{"messages": []}],
        "line 1, field `messages`: has no turn of the assistant, so nothing to learn from\n    found: []",
    ),
    "text instead of conversations": (
        [{"conversations": "hi"}],
        'line 1, field `conversations`: expected a list of {"from": ..., "value": ...}, got text\n    found: \'hi\'',
    ),
    "unknown speaker": (
        [{"conversations": [TURNS[0], {"from": "bot", "value": "a"}]}],
        "line 1, field `conversations[1].from`: is not a role that is known here; expected one of "
        "system, human, user, gpt, chatgpt, assistant"
        "\n    found: 'bot'",
    ),
    "messages called conversations": (
        [{"conversations": CHAT["messages"]}],
        "line 1, field `conversations[0].from`: is missing; each of `conversations` needs from and value"
        "\n    found: {'role': 'user', 'content': 'u'}",
    ),
    "turn without value": (
        [{"conversations": [{"from": "human", "value": None}]}],
        "line 1, field `conversations[0].value`: is null; each of `conversations` needs from and value"
        "\n    found: {'from': 'human', 'value': None}",
    ),
    "value that is a number": (
        [{"conversations": [TURNS[0], {"from": "gpt", "value": 2}]}],
        "line 1, field `conversations[1].value`: expected text, got a number\n    found: 2",
    ),
    "silent gpt": (
        [{"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}],
        "line 1, field `conversations[1].value`: is empty; remove the record or fill it in\n    found: ' '",
    ),
    "no gpt": (
        [{"conversations": TURNS[:1]}],
        "line 1, field `conversations`: has no turn of the assistant, so nothing to learn from"
        "\n    found: [{'from': 'human', 'value': 'u'}]",
    ),
    "ids that are text": (
        [{"input_ids": [1, "2"]}],
        "line 1, field `input_ids`: expected a list of integers\n    found: [1, '2']",
    ),
    "ids that are no list": (
        [{"input_ids": 5}],
        "line 1, field `input_ids`: expected a list of integers\n    found: 5",
    ),
    "labels of another length": (
        [{"input_ids": [1, 2], "labels": [1]}],
        "line 1, field `labels`: has 1 entries where `input_ids` has 2\n    found: [1]",
    ),
    "one id": (
        [{"input_ids": [1]}],
        "line 1, field `input_ids`: needs at least two tokens: one to read, one to predict\n    found: [1]",
    ),
    "nothing to learn": (
        [{"input_ids": [1, 2], "labels": [1, -100]}],
        "line 1, field `labels`: has no token to learn: all labels are masked",
    ),
    "id beyond the embedding": (
        [TEXT, {"text": "<|assistant|>"}],
        "line 2: token id 260 is outside the backbone's embedding of 258 rows; use the tokenizer that "
        "belongs to the backbone, without added tokens (the embedding is frozen and never resized)",
    ),
    "prompt that fills max_length": (
        [PAIR, {"prompt": "x" * 70, "completion": "y"}],
        "line 2, field `prompt`: the prompt alone takes 70 tokens and max_length is 64, so nothing of "
        "the answer is left; shorten the prompt or raise max_length",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_records_are_named(tmp_path: Path, fault: str) -> None:
    lines, message = FAULTS[fault]
    path = write(tmp_path, *lines)
    with pytest.raises(DataError) as caught:
        prepared(path, vocab_size=258)
    assert str(caught.value) == f"{path}, {message}"


def test_error_carries_its_parts(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT, {"text": 3})
    with pytest.raises(DataError) as caught:
        read_records(path)
    error = caught.value
    assert (error.source, error.number, error.field, error.excerpt) == (str(path), 2, "text", "3")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"mine\.jsonl: holds no records; expected one JSON object per line"):
        read_records(write(tmp_path, content))


def test_missing_file_and_wrong_types(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: cannot be read \(No such file"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(TypeError, match=r"pass one of them, as in data\['train'\]"):
        read_records({"train": [TEXT]})
    with pytest.raises(TypeError, match="an iterator is spent after a pass"):
        read_records(iter([TEXT]))
    with pytest.raises(DataError, match="data, record 2, field `text`: expected text"):
        read_records([TEXT, {"text": 1}])


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [row["text"] for _, row in read_records(path).rows] == ["a", "b"]


def test_datasets_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([PAIR, {"prompt": "q", "completion": "dd"}])
    assert learned_text(prepared(dataset)[1]) == "dd<eos>"
    with pytest.raises(DataError, match="record 2, field `completion`: is null"):
        read_records(datasets.Dataset.from_list([PAIR, {"prompt": "q"}]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_records(draw: st.DrawFn) -> Any:
    """A good record, perhaps with another value in one of its places or without that place."""
    record = copy.deepcopy(draw(st.sampled_from([TEXT, PAIR, CHAT, {"conversations": TURNS}, IDS])))
    place: Any = record
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or draw(st.booleans()):
            break
        place = place[key]
    damage = draw(st.sampled_from(["none", "value", "gone"]))
    if damage == "value":
        place[key] = draw(json_values)
    elif damage == "gone":
        del place[key]
    return record


def load(data: Any) -> None:
    """Prepare it; where that works every sample has something to learn."""
    try:
        dataset = prepared(data, max_length=16)
    except DataError as error:
        assert str(error)
    else:
        assert all((sample["labels"] != -100).any() for sample in dataset)


@PROPERTY
@given(st.lists(st.binary(max_size=30) | json_values.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_any_lines_load_or_are_data_errors(tmp_path: Path, lines: list[bytes]) -> None:
    load(write(tmp_path, *lines))


@PROPERTY
@given(st.lists(damaged_records(), min_size=1, max_size=2), st.integers(0, 400), st.binary(max_size=3))
def test_damaged_records_load_or_are_data_errors(tmp_path: Path, rows: list[Any], cut: int, junk: bytes) -> None:
    """As parsed from a list, and as a file with a few bytes replaced somewhere."""
    load(rows)
    path = write(tmp_path, *rows)
    content = path.read_bytes()
    place = cut % (len(content) + 1)
    path.write_bytes(content[:place] + junk + content[place + len(junk) :])
    load(path)


def test_values_too_deep_to_show() -> None:
    value: Any = "x"
    for _ in range(100_000):
        value = [value]
    with pytest.raises(DataError, match="field `text`: expected text, got a list\n    found: something nested too"):
        read_records([{"text": value}])
