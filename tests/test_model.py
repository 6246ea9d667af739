"""LadderForCausalLM: equality with the backbone at step 0, gradients, memory rules, batches, loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ladders import (
    backbone_logits,
    batch,
    checkpoint_folder,
    ladder_model,
    naive_logits,
    tiny_backbone,
    trained,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from engine.backbone import Backbone, load_backbone
from engine.config import LadderConfig
from engine.model.causal_lm import LadderForCausalLM
from engine.model.rows import rows_of_batch
from engine.model.transformers_config import LadderModelConfig
from ladder_kernels import NF4Weight

PRESETS = ("ladder", "xladder", "lst", "qst")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{preset: (preset, {}) for preset in PRESETS},
    "every-second": ("ladder", {"tap_every": 2}),
    "sum": ("ladder", {"merge": "sum"}),
    "low-rank": ("xladder", {"tap_down": "low_rank", "tap_rank": 5}),
    "avg-pool": ("ladder", {"tap_down": "avg_pool", "tap_embeddings": True}),
    "rejoin": ("ladder", {"rejoin": 0.25}),
    "xladder-rejoin": ("xladder", {"rejoin": 0.5}),
    "lst-rejoin": ("lst", {"rejoin": 0.5, "tap_every": 2}),
    "qst-rejoin": ("qst", {"rejoin": 0.3}),
    "max-pool": ("xladder", {"tap_down": "max_pool", "num_taps": 3, "num_side_layers": 6}),
}


def exact(name: str) -> LadderForCausalLM:
    """A model that computes in fp64 throughout, on an unquantized backbone."""
    preset, overrides = VARIANTS[name]
    return trained(ladder_model(preset, tiny_backbone(dtype=torch.float64, quantize=False), **overrides)).double()


def assert_near(actual: Tensor, expected: Tensor, name: str = "", tolerance: float = 1e-9) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance}"


def gradients(model: LadderForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("preset", ["ladder", "xladder", "qst"])
@pytest.mark.parametrize("quantize", [True, False])
def test_step_0_is_the_backbone_bit_for_bit(preset: str, quantize: bool) -> None:
    backbone = tiny_backbone("qwen3", quantize=quantize)
    model = ladder_model(preset, backbone)
    ids = batch(1, 17)
    assert torch.equal(model(ids).logits[0], backbone_logits(backbone, ids[0]))
    assert not torch.equal(trained(model)(ids).logits[0], backbone_logits(backbone, ids[0]))


def test_step_0_of_lst_is_not_the_backbone() -> None:
    ids = batch(1, 17)
    assert not torch.allclose(ladder_model("lst")(ids).logits[0], backbone_logits(tiny_backbone(), ids[0]))


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_side_gradients_equal_full_autograd(name: str) -> None:
    model = exact(name)
    ids = batch(1, 11)
    loss = model(ids, labels=ids).loss
    loss.backward()
    actual = gradients(model)

    model.zero_grad()
    logits = naive_logits(model.side_network, model.ladder_config, "qwen2", ids[0])
    expected = F.cross_entropy(logits[:-1], ids[0, 1:])
    expected.backward()
    assert_near(loss, expected, "loss")
    assert_near(model(ids).logits[0], logits, "logits")
    for parameter_name, gradient in gradients(model).items():
        assert_near(actual[parameter_name], gradient, parameter_name)
        assert gradient.any(), f"{parameter_name}: the test must see a gradient"


def backbone_storages(backbone: Backbone) -> set[int]:
    """Addresses of every block weight, packed or not, and of every decode panel."""
    tensors: list[Tensor] = [panel for panel in backbone._workspace._buffers.values()]
    for block in backbone.blocks:
        for part in vars(block).values():
            for value in vars(part).values() if hasattr(part, "weight") else (part,):
                if isinstance(value, NF4Weight):
                    tensors += [t for t in vars(value).values() if isinstance(t, Tensor)]
                elif isinstance(value, Tensor):
                    tensors.append(value)
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_of_a_backbone_block_is_saved_for_backward(preset: str, quantize: bool, monkeypatch: Any) -> None:
    backbone = tiny_backbone(quantize=quantize)
    model = trained(ladder_model(preset, backbone)).train()
    ids, tokens = batch(1, 13), 13
    yielded: dict[int, Tensor] = {}
    hidden_states = backbone.hidden_states

    def noting(*args: Any) -> Iterator[tuple[int, Tensor]]:
        for index, hidden in hidden_states(*args):
            yielded[index] = hidden
            yield index, hidden

    monkeypatch.setattr(backbone, "hidden_states", noting)
    saved: list[Tensor] = []
    supervised = torch.tensor([3, 7])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(ids, supervised_rows=supervised, supervised_targets=ids[0, supervised + 1]).loss
    loss.backward()

    storages = {tensor.untyped_storage().data_ptr() for tensor in saved}
    forbidden = backbone_storages(backbone)
    assert len(forbidden) > 7 * backbone.config.num_layers, "the test must see the weights"
    assert not storages & forbidden
    side = model.side_network
    tapped = set(side.side_layer_of) | ({0} if side.embedding_tap is not None else set())
    allowed = {yielded[index].untyped_storage().data_ptr() for index in tapped}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    wide = [t for t in saved if t.dim() == 2 and t.shape[0] == tokens and t.shape[1] >= backbone.config.hidden_size]
    of_side_mlp = 2 * side.dims.intermediate_size
    foreign = {t.shape for t in wide if t.untyped_storage().data_ptr() not in allowed | parameters}
    assert foreign <= {(tokens, of_side_mlp), (tokens, of_side_mlp // 2), (tokens, 96)}, "only the side layers' own"
    untapped = {yielded[i].untyped_storage().data_ptr() for i in yielded if i not in tapped}
    assert not storages & untapped


def test_packed_equals_separate() -> None:
    model = exact("xladder")
    lengths = (5, 1, 7)
    ids = batch(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    separate = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    cu_seq_lens = torch.tensor([0, 5, 5, 6, 13], dtype=torch.int32)
    for packed in (
        model(ids, position_ids=positions),
        model(ids, cu_seq_lens_q=cu_seq_lens, cu_seq_lens_k=cu_seq_lens, max_length_q=7, max_length_k=7),
        model(ids, position_ids=positions, cu_seq_lens_q=cu_seq_lens),
        model(ids, document_lengths=lengths),
    ):
        assert_near(packed.logits, separate, "logits", tolerance=1e-12)
    assert (model(ids).logits - separate).abs().max() > 1e-3, "the test must see a leak"
    losses = [F.cross_entropy(model(p).logits[0, :-1], p[0, 1:], reduction="sum") for p in ids.split(lengths, 1)]
    assert_near(model(ids, position_ids=positions, labels=ids).loss, torch.stack(losses).sum() / (4 + 0 + 6), "loss")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(side: str) -> None:
    model = exact("ladder")
    lengths, width = (3, 6, 1), 6
    ids, mask = torch.full((3, width), 257), torch.zeros(3, width, dtype=torch.long)
    labels = torch.full((3, width), -100)
    sequences = [batch(length, seed=length) for length in lengths]
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, place], labels[row, place], mask[row, place] = sequence, sequence, 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.shape == (3, width, 288)
    for row, sequence in enumerate(sequences):
        assert_near(logits[row][mask[row].bool()], model(sequence[None]).logits[0], f"row {row}", tolerance=1e-12)
    assert not logits[mask == 0].any(), "padding has zero logits"

    total = sum(F.cross_entropy(model(s[None]).logits[0, :-1], s[1:], reduction="sum") for s in sequences)
    assert_near(model(ids, attention_mask=mask, labels=labels).loss, total / (2 + 5), "loss")
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, logits)


def test_logits_to_keep() -> None:
    model = trained(ladder_model())
    ids = batch(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    for attention_mask in (None, mask):
        full = model(ids, attention_mask=attention_mask).logits
        for count in (0, 1, 3, 6, 9):
            last = model(ids, attention_mask=attention_mask, logits_to_keep=count).logits
            torch.testing.assert_close(last, full[:, -count:], rtol=1e-5, atol=1e-5)
        chosen = torch.tensor([4, 0, 2])
        some = model(ids, attention_mask=attention_mask, logits_to_keep=chosen).logits
        torch.testing.assert_close(some, full[:, chosen], rtol=1e-5, atol=1e-5)


def test_supervised_rows_equal_labels() -> None:
    model = exact("ladder")
    ids = batch(1, 9)
    labels = torch.tensor([[-100, -100, 5, 6, -100, 9, -100, 3, 4]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    # Token 5 starts a document, so its label 9 is predicted by nothing.
    rows, targets = torch.tensor([1, 2, 6, 7, 0, 0]), torch.tensor([5, 6, 3, 4, -100, -100])
    model(ids, position_ids=positions, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = model(ids, position_ids=positions, labels=labels, supervised_rows=rows, supervised_targets=targets).loss
    loss.backward()
    assert_near(loss, model(ids, position_ids=positions, labels=labels).loss, "loss", 1e-12)
    for name, gradient in gradients(model).items():
        assert_near(gradient, expected[name], name)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_supervised_tokens_are_the_shifted_labels_of_each_document(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    total = sum(lengths)
    labels = torch.tensor([data.draw(st.lists(st.sampled_from([-100, 1, 2, 3]), min_size=total, max_size=total))])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    rows, targets = rows_of_batch(torch.zeros(1, total, dtype=torch.long), position_ids=positions).supervised(labels)
    expected, start = [], 0
    for length in lengths:
        document = labels[0, start : start + length].tolist()
        expected += [(start + i - 1, document[i]) for i in range(1, length) if document[i] != -100]
        start += length
    assert list(zip(rows.tolist(), targets.tolist(), strict=True)) == expected


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("supervised", [[], [0]])
def test_nothing_supervised_is_a_zero_loss(supervised: list[int], count: int | Tensor | None) -> None:
    model = ladder_model()
    labels = torch.full((1, 5), -100)
    labels[0, supervised] = 7
    loss = model(batch(1, 5), labels=labels, num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole_batch(micro_batch: int) -> None:
    model = exact("ladder")
    ids = batch(8, 6)
    labels = ids.masked_fill(torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
    items = (labels[:, 1:] != -100).sum()
    model(ids, labels=labels, num_items_in_batch=items).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for some_ids, some_labels in zip(ids.split(micro_batch), labels.split(micro_batch), strict=True):
        model(some_ids, labels=some_labels, num_items_in_batch=int(items)).loss.backward()
    for name, gradient in gradients(model).items():
        assert_near(gradient, expected[name], name)


def test_mean_over_supervised_tokens_without_a_count() -> None:
    model = trained(ladder_model())
    ids = batch(1, 6)
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, model(ids, labels=ids, num_items_in_batch=1).loss / 5)
    assert loss.dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    model = trained(ladder_model())
    ids = batch(1, 6)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(ids, labels=ids).loss, expected)


def test_base_model_and_head_give_the_logits() -> None:
    model = trained(ladder_model())
    ids, mask = batch(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    head = model.get_output_embeddings()
    assert head.bias is None
    assert head.weight.data_ptr() == model.backbone.head_weight.data_ptr()
    torch.testing.assert_close(head(hidden), model(ids, attention_mask=mask).logits, rtol=1e-5, atol=1e-5)
    assert not list(head.parameters()) and not head.state_dict()


def test_only_the_side_network_is_visible_to_torch() -> None:
    model = ladder_model()
    side = sum(parameter.numel() for parameter in model.side_network.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == side == model.num_parameters()
    assert all(name.startswith("model.side_network.") for name in model.state_dict())
    assert not list(model.buffers())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not hasattr(model, "is_loaded_in_4bit")


def test_copies_share_the_backbone_and_not_the_side_network() -> None:
    model = ladder_model()
    twin = copy.deepcopy(model)
    assert twin.backbone is model.backbone
    with torch.no_grad():
        twin.side_network.side_up.fill_(1)
    assert not model.side_network.side_up.any()


def test_device_moves_take_the_backbone_along_and_dtype_casts_do_not() -> None:
    model = ladder_model(backbone=load_backbone(checkpoint_folder(), dtype=torch.float32))
    packed = model.backbone.blocks[0].query.weight.packed
    model.to(torch.bfloat16)
    assert model.backbone.dtype == torch.float32
    assert model.backbone.blocks[0].query.weight.packed is packed
    assert model.dtype == torch.bfloat16
    torch.nn.Sequential(model).to("meta")
    assert model.backbone.device.type == model.device.type == "meta"
    assert model.backbone.dtype == torch.float32


def test_gradient_checkpointing_is_accepted_without_effect() -> None:
    model = trained(ladder_model()).train()
    ids = batch(1, 5)
    expected = model(ids, labels=ids).loss
    assert model.supports_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(model(ids, labels=ids).loss, expected)
    model.gradient_checkpointing_disable()
    assert torch.equal(model(ids, labels=ids).loss, expected)


def test_registered_with_the_auto_classes() -> None:
    assert AutoModelForCausalLM._model_mapping[LadderModelConfig] is LadderForCausalLM
    assert isinstance(AutoConfig.for_model("ladder"), LadderModelConfig)


def test_tuple_output() -> None:
    model = ladder_model()
    ids = batch(1, 4)
    (logits,) = model(ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = ladder_model()
    model.print_trainable_parameters()
    trainable = model.num_parameters()
    total = trainable + AutoModelForCausalLM.from_pretrained(checkpoint_folder()).num_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    )


def test_from_backbone_loads_a_path() -> None:
    model = LadderForCausalLM.from_backbone(checkpoint_folder(), dtype=torch.float64, quantize=False)
    assert (model.backbone.dtype, model.ladder_config) == (torch.float64, LadderConfig())
    with pytest.raises(TypeError, match=r"\['dtype'\] are options of loading, but the backbone is loaded already"):
        LadderForCausalLM.from_backbone(model.backbone, dtype=torch.float32)
