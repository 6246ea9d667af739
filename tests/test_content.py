"""The digest of a data set of which only some samples are read."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from engine.data.content import SAMPLED, sampled_digest

ROWS = [{"input_ids": list(range(n, n + 5)), "labels": [-100, *range(n, n + 4)]} for n in range(200)]


def changed(place: int, name: str, value: Any) -> list[dict[str, Any]]:
    rows = [dict(row) for row in ROWS]
    rows[place][name] = value
    return rows


@pytest.mark.parametrize(
    "other",
    [
        changed(0, "input_ids", [9] * 5),
        changed(-1, "input_ids", [9] * 5),
        changed(0, "labels", [-100] * 5),
        changed(0, "text", "x"),
        ROWS[:-1],
        ROWS[::-1],
        [],
    ],
    ids=["first", "last", "mask", "column", "length", "order", "empty"],
)
def test_what_differs_is_seen(other: list[dict[str, Any]]) -> None:
    assert sampled_digest(other) != sampled_digest(ROWS)


def test_the_container_does_not_matter() -> None:
    tensors = [{name: torch.tensor(values) for name, values in row.items()} for row in ROWS]
    arrays = [{name: values.numpy() for name, values in row.items()} for row in tensors]
    encodings = [BatchEncoding(row) for row in tensors]
    assert len({sampled_digest(rows) for rows in (ROWS, tensors, arrays, encodings)}) == 1
    half = [{"input_ids": torch.ones(2, dtype=torch.bfloat16)}]
    assert sampled_digest(half) == sampled_digest([{"input_ids": [1.0, 1.0]}])


def test_only_a_few_are_read_and_addresses_do_not_count() -> None:
    class Counted:
        def __init__(self) -> None:
            self.read: set[int] = set()

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.read.add(index)
            return {"input_ids": [index], "image": object()}

    data = Counted()
    assert sampled_digest(data) == sampled_digest(Counted())
    assert len(data.read) == SAMPLED and {0, 10**9 - 1} <= data.read


def test_samples_that_are_drawn_anew_are_told_by_their_number() -> None:
    class Drawn(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            return random.random()

    assert sampled_digest(Drawn(ROWS)) == sampled_digest(Drawn(ROWS)) != sampled_digest(Drawn(ROWS[1:]))


def test_what_no_json_can_hold_does_not_stop_a_training() -> None:
    circle: dict[str, Any] = {}
    circle["self"] = circle
    for odd in ({("a", "b"): 1}, {b"a": 1}, circle, {"image": torch.eye(3).to_sparse()}):
        assert sampled_digest([odd]).startswith("1:")


def test_looking_draws_no_random_numbers() -> None:
    class Drawn:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": [random.random(), np.random.rand(), torch.rand(()).item()]}

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first, then = Drawn()[0], Drawn()[1]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert Drawn()[0] == first
    assert sampled_digest(Drawn()) == "4:drawn"
    assert Drawn()[1] == then
