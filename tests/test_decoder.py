"""The backbone's forward: parity with transformers, packing, cached decoding, and what it does not do."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from engine.backbone import Backbone, load_backbone
from engine.backbone.block import Linear
from engine.sequence import SequenceLayout
from ladder_kernels import NF4Weight, dequantize_nf4

LENGTH = 23


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def token_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 288, (count,), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def states_and_logits(backbone: Backbone, ids: Tensor, layout: SequenceLayout) -> tuple[list[Tensor], Tensor]:
    states = []
    for index, hidden in backbone.hidden_states(ids, layout):
        assert index == len(states)
        states.append(hidden)
    return states, backbone.final_norm(states[-1]) @ backbone.head_weight.T


def peer_states_and_logits(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Embeddings, the output of every block, logits. By hooks: transformers' last hidden state is normed."""
    states: list[Tensor] = [model.get_input_embeddings()(ids)]

    def keep(module: torch.nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        states.append((out if isinstance(out, Tensor) else out[0])[0])

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    logits = model(ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    return states, logits


def assert_parity(backbone: Backbone, model: PreTrainedModel) -> None:
    ids = token_ids(LENGTH)
    states, logits = states_and_logits(backbone, ids, SequenceLayout.packed([LENGTH]))
    with torch.no_grad():
        peer_states, peer_logits = peer_states_and_logits(model, ids)
    assert len(states) == len(peer_states) == backbone.config.num_layers + 1
    for index, (hidden, peer) in enumerate(zip(states, peer_states, strict=True)):
        assert relative_error(hidden, peer) <= 1e-5, f"h_{index}"
    assert relative_error(logits, peer_logits) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_transformers(checkpoints: dict[str, Path], family: str) -> None:
    backbone = load_backbone(checkpoints[family], dtype=torch.float32, quantize=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32, attn_implementation="eager")
    assert_parity(backbone, model)


@pytest.mark.parametrize(("family", "double_quant"), [*((family, True) for family in FAMILIES), ("llama_bias", False)])
def test_nf4_equals_transformers_on_dequantized_weights(
    checkpoints: dict[str, Path], family: str, double_quant: bool
) -> None:
    backbone = load_backbone(checkpoints[family], dtype=torch.float32, double_quant=double_quant)
    model = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32)
    entries = ["query", "key", "value", "output", "gate", "up", "down"]
    with torch.no_grad():
        for block, layer in zip(backbone.blocks, model.model.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            peers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
            for entry, peer in zip(entries, [*peers, mlp.gate_proj, mlp.up_proj, mlp.down_proj], strict=True):
                packed = getattr(block, entry).weight
                assert isinstance(packed, NF4Weight) and packed.double_quant == double_quant
                before = peer.weight.clone()
                peer.weight.copy_(dequantize_nf4(packed, torch.float32))
                assert 0.01 < relative_error(peer.weight, before) < 0.15, "not an NF4 rounding of this weight"
    assert_parity(backbone, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_separate_ones(checkpoints: dict[str, Path], family: str) -> None:
    backbone = load_backbone(checkpoints[family], dtype=torch.float64, quantize=False)
    lengths = [7, 1, 12, 3]
    documents = [token_ids(length, seed) for seed, length in enumerate(lengths)]
    packed, logits = states_and_logits(backbone, torch.cat(documents), SequenceLayout.packed(lengths))
    alone = [states_and_logits(backbone, ids, SequenceLayout.packed([len(ids)])) for ids in documents]
    for index, hidden in enumerate(packed):
        separate = torch.cat([states[index] for states, _ in alone])
        assert relative_error(hidden, separate) <= 1e-12, f"h_{index}"
    assert relative_error(logits, torch.cat([document for _, document in alone])) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_lengths_take_the_same_path_as_ragged_ones(checkpoints: dict[str, Path], family: str) -> None:
    backbone = load_backbone(checkpoints[family], dtype=torch.float64, quantize=False)
    ids = token_ids(24)
    equal, _ = states_and_logits(backbone, ids, SequenceLayout.packed([8, 8, 8]))
    ragged, _ = states_and_logits(backbone, torch.cat([ids, token_ids(5, 1)]), SequenceLayout.packed([8, 8, 8, 5]))
    assert relative_error(equal[-1], ragged[-1][:24]) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [[9, 1, 1, 1], [4, 5, 3]], ids=["prefill+decode", "chunks"])
def test_cached_decoding_equals_uncached_with_left_padding(
    checkpoints: dict[str, Path], family: str, steps: list[int]
) -> None:
    backbone = load_backbone(checkpoints[family], dtype=torch.float64, quantize=False)
    columns = sum(steps)
    ids = torch.stack([token_ids(columns, seed) for seed in range(3)])
    padding = torch.ones(3, columns, dtype=torch.bool)
    padding[0, :3], padding[1, :6] = False, False
    cache, seen, chunks = DynamicCache(), 0, []
    for step in steps:
        layout = SequenceLayout.cached(padding[:, : seen + step], step)
        rows = ids[:, seen : seen + step].reshape(-1)
        *_, (_, hidden) = backbone.hidden_states(rows, layout, cache)
        chunks.append((backbone.final_norm(hidden) @ backbone.head_weight.T).unflatten(0, (3, step)))
        seen += step
    cached = torch.cat(chunks, dim=1)
    assert torch.isfinite(cached).all()
    for row in range(3):
        real = ids[row, padding[row]]
        _, logits = states_and_logits(backbone, real, SequenceLayout.packed([len(real)]))
        assert relative_error(cached[row, padding[row]], logits) <= 1e-12


def test_a_window_shorter_than_the_text_matters(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    windowed = load_backbone(checkpoints["mistral"], dtype=torch.float64, quantize=False)
    full = load_backbone(tiny_checkpoint(tmp_path, "mistral", sliding_window=None), dtype=torch.float64, quantize=False)
    ids, layout = token_ids(12), SequenceLayout.packed([12])
    short, _ = states_and_logits(windowed, ids, layout)
    long, _ = states_and_logits(full, ids, layout)
    assert torch.equal(short[-1][0], long[-1][0])
    assert relative_error(short[-1][-1], long[-1][-1]) > 1e-2


@pytest.fixture
def backbone(checkpoints: dict[str, Path]) -> Backbone:
    return load_backbone(checkpoints["qwen2"], dtype=torch.float32)


def test_gradients_are_off_inside_and_untouched_outside(backbone: Backbone) -> None:
    probe = torch.ones(1, requires_grad=True)
    for _, hidden in backbone.hidden_states(token_ids(5), SequenceLayout.packed([5])):
        assert not hidden.requires_grad and not hidden.is_inference()
        assert torch.is_grad_enabled()
        assert (hidden.sum() * probe).requires_grad
    with torch.no_grad():
        for _ in backbone.hidden_states(token_ids(5), SequenceLayout.packed([5])):
            assert not torch.is_grad_enabled()
    states = backbone.hidden_states(token_ids(5), SequenceLayout.packed([5]))
    next(states)
    states.close()
    assert torch.is_grad_enabled()


def test_yielded_states_are_never_written_to(backbone: Backbone) -> None:
    kept = [(hidden, hidden.clone()) for _, hidden in backbone.hidden_states(token_ids(9), SequenceLayout.packed([9]))]
    assert all(torch.equal(hidden, copy) for hidden, copy in kept)
    assert len({hidden.untyped_storage().data_ptr() for hidden, _ in kept}) == len(kept)


def test_a_dropped_state_dies_before_the_next_one_arrives(backbone: Backbone) -> None:
    previous = None
    for _, hidden in backbone.hidden_states(token_ids(9), SequenceLayout.packed([9])):
        assert previous is None or previous() is None
        previous = weakref.ref(hidden.untyped_storage())
        del hidden


def test_final_norm_has_the_gradient_of_rms_norm(checkpoints: dict[str, Path]) -> None:
    backbone = load_backbone(checkpoints["llama2"], dtype=torch.float64, quantize=False)
    y = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(backbone.final_norm, y)
    assert not backbone.norm_weight.requires_grad and not backbone.head_weight.requires_grad


@pytest.mark.parametrize("quantize", [True, False])
def test_half_precision_stays_close_to_fp32(checkpoints: dict[str, Path], quantize: bool) -> None:
    ids, layout = token_ids(LENGTH), SequenceLayout.packed([LENGTH])
    wide = load_backbone(checkpoints["qwen3"], dtype=torch.float32, quantize=quantize)
    narrow = load_backbone(checkpoints["qwen3"], dtype=torch.bfloat16, quantize=quantize)
    expected, actual = states_and_logits(wide, ids, layout)[1], states_and_logits(narrow, ids, layout)[1]
    assert narrow.dtype == actual.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected) < 0.05


def test_moves_take_every_weight_along(checkpoints: dict[str, Path]) -> None:
    backbone = load_backbone(checkpoints["qwen2"], dtype=torch.float32)
    assert backbone.to("meta") is backbone and backbone.head_weight is backbone.embedding
    assert backbone.device.type == backbone.norm_weight.device.type == "meta"
    assert {tensor.device.type for block in backbone.blocks for tensor in block.tensors()} == {"meta"}
    assert backbone.rotary(torch.arange(3, device="meta"))[0].device.type == "meta"


def test_bytes_count_a_tied_head_once(checkpoints: dict[str, Path]) -> None:
    tied = load_backbone(checkpoints["llama3"], dtype=torch.float32, quantize=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama3"], dtype=torch.float32)
    assert tied.nbytes == sum(parameter.nbytes for parameter in model.parameters())
    packed = load_backbone(checkpoints["llama3"], dtype=torch.float32)
    linears = [value for block in packed.blocks for value in vars(block).values() if isinstance(value, Linear)]
    dense = [value for block in tied.blocks for value in vars(block).values() if isinstance(value, Linear)]
    saved = sum(linear.weight.nbytes for linear in dense) - sum(linear.weight.nbytes for linear in linears)
    assert packed.nbytes == tied.nbytes - saved and saved > 0.8 * sum(linear.weight.nbytes for linear in dense)


def test_tokenizer_and_config_come_from_the_folder(backbone: Backbone, checkpoints: dict[str, Path]) -> None:
    assert backbone.tokenizer().decode(backbone.tokenizer()("Grüße").input_ids) == "Grüße"
    assert backbone.source == str(checkpoints["qwen2"]) and backbone.hf_config.model_type == "qwen2"
