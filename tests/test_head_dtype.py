"""A packed head in a whole model: loading, loss, logits, generation, and what an adapter remembers of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from numerics import assert_same_bits
from torch import Tensor

from engine.backbone import load_backbone
from engine.config import LadderConfig
from engine.model.adapter import CONFIG_NAME, read_adapter
from engine.model.causal_lm import LadderForCausalLM
from ladder_kernels import decode_head, quantize_int8, quantize_nf4

CONFIG = LadderConfig.preset("ladder", reduction_factor=4)
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """qwen2 ties its head to the embedding, llama2 has one of its own."""
    return {family: tiny_checkpoint(tmp_path_factory.mktemp(family), family) for family in ("qwen2", "llama2")}


def model_with(folder: Path, head_dtype: str) -> LadderForCausalLM:
    model = LadderForCausalLM.from_backbone(folder, CONFIG, dtype=torch.float32, head_dtype=head_dtype)
    with torch.no_grad():
        model.side_network.side_up.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model.eval()


def gradients(model: LadderForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(IDS, labels=IDS).loss
    named = dict(model.side_network.named_parameters())
    return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("head_dtype", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["qwen2", "llama2"])
def test_a_packed_head_is_the_decoded_one(folders: dict[str, Path], family: str, head_dtype: str) -> None:
    model, dense = model_with(folders[family], head_dtype), model_with(folders[family], "dense")
    packed, whole = model.backbone.head_weight, dense.backbone.head_weight
    expected = quantize_int8(whole) if head_dtype == "int8" else quantize_nf4(whole)
    assert_same_bits("head", decode_head(packed, torch.float32), decode_head(expected, torch.float32))
    assert model.backbone.head_dtype == head_dtype and packed.nbytes < whole.nbytes / 3
    assert_same_bits("embedding", model.backbone.embedding, dense.backbone.embedding)

    dense.backbone.head_weight = decode_head(packed, torch.float32)
    assert_same_bits("head module", model.get_output_embeddings().weight, dense.backbone.head_weight)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)
    (loss, ours), (expected_loss, theirs) = gradients(model), gradients(dense)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), dense.generate(IDS, **options))


@pytest.mark.parametrize("head_dtype", ["int8", "nf4"])
def test_an_adapter_is_loaded_beside_the_head_it_was_trained_with(
    folders: dict[str, Path], tmp_path: Path, head_dtype: str
) -> None:
    model = model_with(folders["llama2"], head_dtype)
    model.save_pretrained(tmp_path)
    assert read_adapter(tmp_path).backbone.head_dtype == head_dtype
    again = LadderForCausalLM.from_pretrained(tmp_path)
    assert again.backbone.head_dtype == head_dtype
    with torch.no_grad():
        assert_same_bits("logits", again(IDS).logits, model(IDS).logits)
    other = load_backbone(folders["llama2"], dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"head {head_dtype}, fingerprint .* but got"):
        LadderForCausalLM.from_pretrained(tmp_path, backbone=other)


def test_an_adapter_that_names_no_head_has_a_dense_one(folders: dict[str, Path], tmp_path: Path) -> None:
    model_with(folders["llama2"], "dense").save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    content = json.loads(path.read_text())
    assert "head_dtype" not in content["backbone"]
    assert LadderForCausalLM.from_pretrained(tmp_path).backbone.head_dtype == "dense"
    for wrong, message in (("int3", "head_dtype must be one of dense, int8, nf4, got 'int3'"), (8, "must be a str")):
        content["backbone"]["head_dtype"] = wrong
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path)


def test_a_dense_head_keeps_its_fingerprint_and_others_have_their_own(folders: dict[str, Path]) -> None:
    found = {
        name: load_backbone(folders["qwen2"], dtype=torch.float32, head_dtype=name).fingerprint()
        for name in ("dense", "int8", "nf4")
    }
    assert len(set(found.values())) == 3
    assert found["dense"] == load_backbone(folders["qwen2"], dtype=torch.float32).fingerprint()


def test_wrong_arguments(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="head_dtype: expected one of dense, int8, nf4, got 'bf16'"):
        load_backbone(folders["qwen2"], head_dtype="bf16")
    with pytest.raises(ValueError, match=r'float64 needs head_dtype="dense", got \'int8\''):
        load_backbone(folders["qwen2"], dtype=torch.float64, quantize=False, head_dtype="int8")
