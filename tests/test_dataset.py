"""User data: every shape, masks by position, and the collator against its definition."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import CHAT, learned_text, prepared, token_ids, write
from tokenizers.processors import TemplateProcessing

from engine.data.collator import Collator
from engine.data.records import DataError, read_records

EOS = 256
TEXT = {"text": "fine"}
PAIR = {"prompt": "p", "completion": "c"}
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(st.lists(st.tuples(st.text(max_size=8), st.text(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_any_pairs_load_or_are_data_errors(pairs: list[tuple[str, str]]) -> None:
    try:
        dataset = prepared([{"prompt": prompt, "completion": completion} for prompt, completion in pairs], 128)
    except DataError:
        assert any(not completion.strip() for _, completion in pairs)
        return
    for (prompt, completion), sample in zip(pairs, dataset, strict=True):
        start = max(len(prompt.encode()), 1)
        ids = list((prompt + completion).encode())
        assert len(sample["input_ids"]) == len(ids) + 1
        assert (sample["labels"][:start] == -100).all()
        assert torch.equal(sample["labels"][start:], sample["input_ids"][start:])


# Masks


def test_text_is_learned_to_its_end() -> None:
    sample = prepared([{"text": "ab"}])[0]
    assert sample["input_ids"].tolist()[-1] == EOS
    assert sample["labels"].tolist() == [-100, *sample["input_ids"].tolist()[1:]]


def test_completion_only_and_eos_supervised_even_if_it_is_padding() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    sample = prepared([{"prompt": "q<eos>", "completion": "a<eos>b"}], tokenizer=tokenizer)[0]
    assert learned_text(sample) == "a<eos>b<eos>"
    assert sample["labels"].tolist()[:2] == [-100, -100]


def test_eos_spelled_out_is_not_doubled() -> None:
    assert learned_text(prepared([{"prompt": "q", "completion": "a<eos>"}])[0]) == "a<eos>"


def test_prompt_tokens_are_those_of_the_prompt_alone() -> None:
    """A tokenizer that merges across the border must not change the prompt that `generate` will see."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2, "<eos>": 3}
    merging = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    merging.pre_tokenizer, merging.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<eos>")
    sample = prepared([{"prompt": "aa", "completion": "bab"}], tokenizer=tokenizer)[0]
    assert sample["input_ids"].tolist() == [0, 0, 1, 2, 3]
    assert sample["labels"].tolist() == [-100, -100, 1, 2, 3]


def test_beginning_of_text_is_added_once() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 257)])
    for text in ("ab", "<pad>ab"):
        assert prepared([{"text": text}], tokenizer=tokenizer)[0]["input_ids"].tolist()[:1] == [257]
        sample = prepared([{"prompt": text, "completion": "c"}], tokenizer=tokenizer)[0]
        assert tokenizer.decode(sample["input_ids"]) == "<pad>abc<eos>"
        assert tokenizer.decode(sample["labels"][sample["labels"] != -100]) == "c<eos>"


def test_sharegpt_conversations_are_messages() -> None:
    turns = [("system", "s"), ("human", "u"), ("gpt", "a"), ("human", "v"), ("gpt", "b")]
    roles = {"human": "user", "gpt": "assistant"}
    rows = [{"conversations": [{"from": speaker, "value": value} for speaker, value in turns], "id": "x"}]
    same = [{"messages": [{"role": roles.get(speaker, speaker), "content": value} for speaker, value in turns]}]
    sample, expected = prepared(rows)[0], prepared(same)[0]
    assert all(torch.equal(sample[name], expected[name]) for name in ("input_ids", "labels"))
    assert learned_text(sample).startswith("a") and "u" not in learned_text(sample)


def test_missing_template_and_missing_eos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no chat template; write the data as `prompt` and `completion`"):
        prepared(write(tmp_path, CHAT), tokenizer=tiny_tokenizer(chat_template=False))
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        prepared(write(tmp_path, TEXT), tokenizer=tokenizer)


def test_token_ids_beyond_the_embedding(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "fine"}, {"text": "<|assistant|>"})
    with pytest.raises(DataError, match="line 2: token id 260 is outside the backbone's embedding of 258 rows; use"):
        prepared(path, vocab_size=258)
    with pytest.raises(DataError, match="record 1: token id -1 is outside"):
        prepared([{"input_ids": [-1, 5]}])


# Lengths


@PROPERTY
@given(st.integers(1, 40), st.integers(2, 12))
def test_long_text_loses_nothing(length: int, max_length: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    dataset = prepared([{"text": text}], max_length=max_length)
    targets = [token for sample in dataset for token in sample["labels"].tolist() if token != -100]
    assert targets == [*token_ids(text)[1:], EOS]
    assert all(2 <= len(sample["input_ids"]) <= max_length for sample in dataset)
    assert dataset.truncated == 0


def test_prompt_that_fills_max_length(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR, {"prompt": "x" * 10, "completion": "y"})
    with pytest.raises(DataError, match="line 2, field `prompt`: the prompt alone takes 10 tokens and max_length is"):
        prepared(path, max_length=10)
    assert learned_text(prepared(path, max_length=11)[1]) == "y"


def test_long_completion_is_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = prepared([PAIR, {"prompt": "p", "completion": "y" * 20}], max_length=8)
    assert dataset.truncated == 1
    assert learned_text(dataset[1]) == "y" * 7
    assert "1 of 2 samples are longer than max_length 8 and were cut" in caplog.text


def test_max_length_of_one() -> None:
    with pytest.raises(DataError, match="max_length is 1; expected at least 2"):
        prepared([TEXT], max_length=1)


def test_tokenized_records() -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 0]}]
    sample = prepared(rows)[0]
    assert sample["input_ids"].tolist() == [5, 6, 7]
    assert sample["labels"].tolist() == [-100, -100, 7]
    with pytest.raises(DataError, match="record 1, field `labels`: has no token to learn"):
        prepared([{"input_ids": [5, 6], "labels": [5, -100]}])


def test_split_is_seeded_and_complete() -> None:
    records = read_records([{"text": str(i)} for i in range(20)])
    train, heldout = records.split(5, seed=1)
    assert (len(train), len(heldout)) == (15, 5)
    assert sorted(train.rows + heldout.rows) == sorted(records.rows)
    assert records.split(5, seed=1)[1].rows == heldout.rows != records.split(5, seed=2)[1].rows


def test_digest_is_of_ids_mask_and_lengths() -> None:
    """The same for the same samples, whatever made them; another for another border, mask or order."""
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    digest = prepared(rows).digest()
    assert digest == prepared(rows).digest() and len(digest) == 64
    others = [
        [{"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}],
        [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9]}],
        rows[::-1],
    ]
    assert len({digest, *(prepared(other).digest() for other in others)}) == 4


def test_samples_know_their_record(tmp_path: Path) -> None:
    dataset = prepared(write(tmp_path, {"text": "abcdefgh"}, b"", {"text": "x"}), max_length=6)
    assert [sample["sample_id"] for sample in dataset] == [1, 1, 3]
    samples = [dataset[i] for i in range(3)]
    assert Collator()(samples)["sample_ids"] == [1, 1, 3]
    assert "sample_ids" not in Collator()([*samples, {"input_ids": [1, 2]}])


def test_dataset_indexing() -> None:
    dataset = prepared([{"text": "a"}, {"text": "bcd"}])
    assert len(dataset) == 2 and dataset.num_tokens == 6
    assert dataset[-1]["input_ids"].tolist() == dataset[1]["input_ids"].tolist() == [*token_ids("bcd"), EOS]
    with pytest.raises(IndexError):
        dataset[2]


# Collator


documents = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5
)


@PROPERTY
@given(documents, st.integers(1, 7))
def test_collator_equals_its_definition(documents: list[list[tuple[int, bool]]], bucket: int) -> None:
    samples = [
        {
            "input_ids": torch.tensor([token for token, _ in document]),
            "labels": torch.tensor([token if learned else -100 for token, learned in document]),
        }
        for document in documents
    ]
    batch = Collator(row_bucket=bucket)(samples)
    expected: list[tuple[int, int]] = []
    positions, ids, starts = [], [], [0]
    for document in documents:
        for place, (token, _) in enumerate(document):
            if place + 1 < len(document) and document[place + 1][1]:
                expected.append((len(ids), document[place + 1][0]))
            ids.append(token)
            positions.append(place)
        starts.append(len(ids))
    pairs = list(zip(batch["supervised_rows"].tolist(), batch["supervised_targets"].tolist(), strict=True))
    assert pairs[: len(expected)] == expected
    assert set(pairs[len(expected) :]) <= {(0, -100)}
    assert len(pairs) == max(-(-len(expected) // bucket), 1) * bucket
    assert batch["input_ids"].tolist() == [ids] and batch["position_ids"].tolist() == [positions]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == starts
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == max(len(document) for document in documents)
    assert batch["document_lengths"] == [len(document) for document in documents]
    # Shifted labels, as anything that ignores the two supervised tensors would use them, mean the same.
    shifted = batch["labels"][0, 1:]
    assert [(row, target) for row, target in enumerate(shifted.tolist()) if target != -100] == expected


def test_collator_drops_padding_and_takes_lists() -> None:
    batch = Collator()([{"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]}, {"input_ids": [7, 8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8]]


def test_collator_fills_samples_up() -> None:
    batch = Collator(pad_to=4)([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, -100]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 8, 9, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, -100, -100, -100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 8] and batch["document_lengths"] == [4, 4]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    with pytest.raises(ValueError, match="a sample has 5 tokens and pad_to is 4; raise it, or cut the sample"):
        Collator(pad_to=4)([{"input_ids": [1, 2, 3, 4, 5]}])


def test_collator_drops_samples_of_nothing_but_padding() -> None:
    empty = {"input_ids": [0, 0], "attention_mask": [0, 0]}
    batch = Collator()([empty, {"input_ids": [7, 8]}])
    assert batch["cu_seq_lens_q"].tolist() == [0, 2] and batch["document_lengths"] == [2]
    with pytest.raises(ValueError, match="a batch of 1 samples holds no token"):
        Collator()([empty])
