"""generate(): backbone and side network decode together from one cache, and say what they say without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from ladders import batch, ladder_model, tiny_backbone, trained
from torch import Tensor
from transformers import DynamicCache

from engine.backbone import load_backbone
from engine.model.causal_lm import LadderForCausalLM

FAMILIES = ("qwen2", "mistral", "qwen2_window")
"""Plain attention, a window in every layer, a window in some."""


def model_of(preset: str, family: str = "qwen2") -> LadderForCausalLM:
    return trained(ladder_model(preset, tiny_backbone(family)))


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = batch(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((4, 0, 7)):
        ids[row, :padding], mask[row, :padding] = 257, 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["ladder", "xladder", "lst", "qst", "rejoin"])
def test_cached_logits_equal_a_full_pass(preset: str, family: str) -> None:
    model = model_of(preset, family)
    ids = batch(1, 14)
    full = model(ids).logits
    cache, steps, start = DynamicCache(), [], 0
    for width in (6, 1, 1, 4, 2):
        out = model(ids[:, start : start + width], past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        steps.append(out.logits)
        start += width
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == model.backbone.config.num_layers + model.side_network.num_side_layers
    assert {layer.get_seq_length() for layer in cache.layers} == {14}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": False}, id="greedy"),
        pytest.param({"do_sample": True, "top_k": 20, "temperature": 0.8}, id="sampling"),
        pytest.param({"num_beams": 2, "num_return_sequences": 2, "do_sample": False}, id="beam"),
    ],
)
def test_cached_tokens_equal_uncached_tokens(family: str, options: dict[str, Any]) -> None:
    model = model_of("xladder", family)
    ids, mask = left_padded()
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=4, use_cache=use_cache, pad_token_id=257, **options)
        )
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] == 9 + 4


@pytest.mark.parametrize("preset", ["ladder", "qst", "rejoin"])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(preset: str) -> None:
    model = model_of(preset)
    ids, mask = left_padded()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=257)
    for row in range(3):
        alone = model.generate(ids[row][mask[row].bool()][None], max_new_tokens=6, do_sample=False, pad_token_id=257)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_the_side_network_matters_to_what_is_generated() -> None:
    ids = batch(4, 9)
    plain, moved = ladder_model(), model_of("ladder")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 257}
    assert not torch.equal(plain.generate(ids, **options), moved.generate(ids, **options))


def test_a_cache_continues_a_conversation() -> None:
    model = model_of("ladder")
    ids = batch(1, 12)
    cache = DynamicCache()
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 257}
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))


def test_positions_given_with_a_cache_are_accepted_where_they_count_real_tokens() -> None:
    model = model_of("ladder")
    ids, mask = left_padded()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cached = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    torch.testing.assert_close(
        cached.logits[:, -1], model(ids, attention_mask=mask).logits[:, -1], rtol=1e-4, atol=1e-4
    )


def test_no_cache_unless_asked() -> None:
    ids = batch(1, 4)
    assert ladder_model()(ids).past_key_values is None
    assert ladder_model()(ids, use_cache=True).past_key_values.get_seq_length() == 4
    assert ladder_model()(ids, labels=ids, use_cache=True).past_key_values is None


def test_generation_settings_come_from_the_backbone(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2")
    settings = {"eos_token_id": [256, 3], "pad_token_id": 257, "temperature": 0.3, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = LadderForCausalLM.from_backbone(load_backbone(folder))
    config = model.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.temperature) == ([256, 3], 257, 0.3)

    (folder / "generation_config.json").unlink()
    model = LadderForCausalLM.from_backbone(load_backbone(folder))
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (256, 257)
