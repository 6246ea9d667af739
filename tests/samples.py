"""Data for tests: jsonl files, records prepared with the tiny tokenizer, and what of them is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import tiny_tokenizer

from engine.data.dataset import TokenizedDataset, prepare_dataset

VOCAB_SIZE = 288
CHAT = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}


def write(tmp_path: Path, *lines: Any) -> Path:
    """A jsonl file of the given lines; bytes are written as they are."""
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def prepared(data: Any, max_length: int = 64, **overrides: Any) -> TokenizedDataset:
    tokenizer = overrides.pop("tokenizer", None) or tiny_tokenizer()
    return prepare_dataset(data, tokenizer, max_length=max_length, vocab_size=overrides.pop("vocab_size", VOCAB_SIZE))


def learned_text(sample: dict[str, torch.Tensor]) -> str:
    return tiny_tokenizer().decode(sample["labels"][sample["labels"] != -100])


def token_ids(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]
