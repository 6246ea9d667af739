"""LadderForCausalLM: inputs that are wrong, or would be ignored, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ladders import batch, ladder_model
from transformers import DynamicCache, StaticCache

IDS = batch(2, 4)
ONES = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids must be a non-empty integer tensor \[B, T\], got torch.int64 \(4,\)"),
        ({"input_ids": IDS[:, :0]}, "input_ids must be a non-empty integer tensor"),
        ({"input_ids": IDS.float()}, "input_ids must be a non-empty integer tensor"),
        ({"attention_mask": ONES[:, :3]}, r"attention_mask must have the shape \(2, 4\) of input_ids, got \(2, 3\)"),
        ({"attention_mask": ONES[:, None, None]}, "the engine builds the causal mask itself"),
        ({"attention_mask": ONES * 0}, "attention_mask marks no real token at all"),
        (
            {"attention_mask": ONES, "position_ids": torch.tensor([[0, 1, 0, 1]])},
            "attention_mask together with packed documents.*all-ones one would let them see each other",
        ),
        (
            {"attention_mask": ONES, "cu_seq_lens_q": torch.tensor([0, 4, 8])},
            r"attention_mask together with packed documents \(cu_seq_lens_q or document_lengths\)",
        ),
        ({"position_ids": torch.zeros(4)}, r"position_ids must have shape \(2, 4\) or \(1, 4\), got \(4,\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 7])}, "cu_seq_lens_q must rise from 0 to the 8 tokens of input_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 3, 8])}, "cu_seq_lens_q must rise from 0 to the 8 tokens"),
        ({"cu_seq_lens_q": torch.tensor([8])}, "cu_seq_lens_q must be 1-D with at least 2 entries"),
        ({"document_lengths": [4, 3]}, "document_lengths must be at least 1 and sum to the 8 tokens.*which sum to 7"),
        ({"document_lengths": [4, 0, 4]}, "document_lengths must be at least 1"),
        (
            {"document_lengths": [4, 4], "cu_seq_lens_q": torch.tensor([0, 8])},
            "cu_seq_lens_q must have 3 entries beside 2 document_lengths",
        ),
        ({"document_lengths": [4, 4], "attention_mask": ONES}, "attention_mask together with packed documents"),
        ({"document_lengths": [8], "past_key_values": DynamicCache()}, "document_lengths with a cache"),
        ({"labels": IDS[:, :3]}, r"labels must have the shape of input_ids \(2, 4\), got \(2, 3\)"),
        ({"supervised_targets": IDS[0]}, r"supervised_targets \(4,\) needs supervised_rows of its 1-D shape, got None"),
        (
            {
                "supervised_targets": IDS[0],
                "supervised_rows": IDS[0],
                "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4]),
            },
            "supervised_rows index an unpadded batch: leave attention_mask out",
        ),
        ({"labels": IDS, "past_key_values": DynamicCache()}, "labels with past_key_values"),
        (
            {"past_key_values": DynamicCache(), "cu_seq_lens_q": torch.tensor([0, 8])},
            "cu_seq_lens_q or document_lengths with a cache: cached decoding takes padded batches",
        ),
        ({"past_key_values": DynamicCache(), "attention_mask": ONES[:, :2]}, "of the cached columns and input_ids"),
        (
            {"past_key_values": DynamicCache(), "position_ids": torch.tensor([[0, 1, 0, 1]])},
            "with past_key_values, position_ids must count the real tokens",
        ),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2]] * 2)}, "attention_mask must hold 0 and 1 only"),
        (
            {"past_key_values": StaticCache(config=ladder_model().config, max_cache_len=8)},
            "past_key_values must be a DynamicCache, got StaticCache",
        ),
    ],
)
def test_wrong_inputs_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ladder_model()(**({"input_ids": IDS} | inputs))


def test_inputs_that_would_be_ignored_are_refused() -> None:
    model = ladder_model()
    with pytest.raises(TypeError, match=r"LadderForCausalLM does not take \['output_hidden_states', 'lables'\]"):
        model(IDS, output_hidden_states=True, output_attentions=False, token_type_ids=None, lables=IDS)


def test_what_a_side_network_cannot_do_is_refused_with_the_reason() -> None:
    model = ladder_model()
    with pytest.raises(ValueError, match=r"cannot be merged: it runs beside the backbone.*generate.*save_pretrained"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="the frozen backbone has 288 token embeddings and cannot learn new ones"):
        model.resize_token_embeddings(300)
