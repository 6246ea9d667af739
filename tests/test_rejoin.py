"""A side network whose output joins below the top blocks: gradients come down through frozen NF4 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ladders import batch, checkpoint_folder, ladder_model, tiny_backbone, trained
from numerics import assert_close_to_truth, assert_same_bits
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from engine.backbone import load_backbone
from engine.config import LadderConfig
from engine.model.causal_lm import LadderForCausalLM
from engine.sequence import SequenceLayout
from engine.training.lockstep import Lockstep
from ladder_kernels import Workspace, dequantize_nf4, frozen_linear, nf4_linear, quantize_nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 64, 128), (37, 96, 64), (130, 33, 70), (0, 64, 64)])
def test_frozen_linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """The forward pass has the bits of nf4_linear, its gradient obeys the tolerance rule."""
    torch.manual_seed(0)
    weight = quantize_nf4(torch.randn(outputs, inputs).to(dtype))
    x = torch.randn(rows, inputs).to(dtype).requires_grad_()
    bias, dout = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    out = frozen_linear(x, weight, bias, workspace=Workspace())
    with torch.no_grad():
        assert_same_bits("out", out, nf4_linear(x, weight, bias))
    (dx,) = torch.autograd.grad(out, x, dout)
    dense = dequantize_nf4(weight, dtype)
    assert_close_to_truth("dx", dx, dout.double() @ dense.double(), dout @ dense)


def test_frozen_linear_refuses_gradients_it_does_not_have() -> None:
    weight, x = quantize_nf4(torch.randn(64, 64)), torch.randn(3, 64, requires_grad=True)
    with pytest.raises(ValueError, match="bias requires a gradient"):
        frozen_linear(x, weight, torch.zeros(64, requires_grad=True))
    (dx,) = torch.autograd.grad(frozen_linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_frozen_linear_keeps_nothing() -> None:
    saved: list[Tensor] = []
    weight, x = quantize_nf4(torch.randn(64, 64)), torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(x, weight).sum().backward()
    assert not saved


def model_of(rejoin: float = 0.5, preset: str = "ladder", **overrides: Any) -> LadderForCausalLM:
    return trained(ladder_model(preset, rejoin=rejoin, **overrides))


def gradients(model: LadderForCausalLM, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.any() for gradient in found.values())
    return found


def test_step_0_is_the_backbone_bit_for_bit() -> None:
    ids = batch(2, 13)
    assert_same_bits("logits", ladder_model(rejoin=0.5)(ids).logits, ladder_model()(ids).logits)


def test_one_input_of_each_block_is_kept() -> None:
    """In place of the taps of the blocks above: a step keeps as many hidden states, whatever the share."""
    counts = []
    kept: list[Tensor]
    for rejoin in (0.0, 0.25, 0.5):
        model, kept = model_of(rejoin).train(), []
        ids, shape = batch(1, 29), (29, model.backbone.config.hidden_size)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            loss = model(ids, supervised_rows=torch.tensor([3]), supervised_targets=torch.tensor([7])).loss
        loss.backward()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved = {t.untyped_storage().data_ptr() for t in kept if t.shape == shape} - parameters
        counts.append(len(saved))
    assert counts == [model.backbone.config.num_layers] * 3


def test_documents_do_not_see_each_other() -> None:
    model, lengths = model_of(), (5, 1, 8)
    ids = batch(1, sum(lengths))
    packed = model(ids, cu_seq_lens_q=torch.tensor([0, 5, 6, 14])).logits[0]
    alone = torch.cat([model(part).logits[0] for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residency", ["host", "device"])
def test_streamed_layers_give_the_same_gradients(residency: str) -> None:
    """Backward asks for them from the top down."""
    ids = batch(1, 21)
    expected = gradients(model_of(0.75), input_ids=ids, labels=ids)
    placed = load_backbone(checkpoint_folder(), dtype=torch.float32, residency=residency)
    model = trained(ladder_model("ladder", placed, rejoin=0.75))
    for name, gradient in gradients(model, input_ids=ids, labels=ids).items():
        assert_same_bits(name, gradient, expected[name])


@pytest.mark.parametrize("prefetch", [1, 2])
def test_streamed_layers_are_there_before_backward_asks_for_them(prefetch: int) -> None:
    placed = load_backbone(checkpoint_folder(), dtype=torch.float32, residency="host", prefetch=prefetch)
    model, ids = trained(ladder_model("ladder", placed, rejoin=0.75)), batch(1, 21)
    layers, asked = placed.layers, []
    stock = layers.on_device

    def noting(index: int, then: Any = None) -> Any:
        asked.append((index, index in layers._holds))
        return stock(index, then)

    for _ in range(2):
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "on_device", noting)
            model(ids, labels=ids).loss.backward()
    assert asked == [(index, True) for index in (0, 1, 2, 3, 3, 2, 1)]


def test_a_cache_and_gradients_and_streamed_layers_at_once_are_refused() -> None:
    """The weights that backward reads would be gone."""
    placed = load_backbone(checkpoint_folder(), dtype=torch.float32, residency="host")
    model = trained(ladder_model("ladder", placed, rejoin=0.5))
    with pytest.raises(ValueError, match=r"use_cache with streamed layers: .*under torch.no_grad"):
        model(batch(1, 5), use_cache=True)
    with torch.no_grad():
        model(batch(1, 5), use_cache=True)


def test_slices_of_rows_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.backbone.chunks.MIN_CHUNK_TOKENS", 128)
    ids, model = batch(1, 300), model_of()
    whole = gradients(model, input_ids=ids, labels=ids)
    monkeypatch.setattr("engine.backbone.chunks.CHUNK_BYTES", 1)
    for name, gradient in gradients(model, input_ids=ids, labels=ids).items():
        assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm(), name


def test_gradients_of_a_dense_backbone_come_through_too() -> None:
    ids = batch(1, 17)
    dense = tiny_backbone(quantize=False)
    model = trained(ladder_model("xladder", dense, rejoin=0.5))
    assert gradients(model, input_ids=ids, labels=ids)


def test_a_cache_may_be_filled_with_gradients_on() -> None:
    ids, model = batch(1, 9), model_of()
    with torch.no_grad():
        expected = model(ids).logits
    logits = model(ids, use_cache=True).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_a_backward_under_autocast_computes_in_the_backbones_dtype(dtype: torch.dtype, autocast: torch.dtype) -> None:
    """The block computed again multiplies, attends and adds biases of one dtype, as in the forward pass."""
    backbone = tiny_backbone("llama_bias", dtype)
    hidden, layout = backbone.embed(batch(9)), SequenceLayout.packed([9])

    def gradient(is_autocast: bool) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        out = backbone.run_above(leaf, 1, layout)
        with torch.autocast("cpu", autocast, enabled=is_autocast):
            return torch.autograd.grad(out, leaf, torch.ones_like(out))[0]

    assert_same_bits("dhidden", gradient(True), gradient(False))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_frozen_linear_under_autocast(autocast: torch.dtype) -> None:
    weight, x = quantize_nf4(torch.randn(64, 64)), torch.randn(3, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(frozen_linear(x, weight).sum(), x)
    with torch.autocast("cpu", autocast):
        out = frozen_linear(x, weight)
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert_same_bits("out", out, frozen_linear(x, weight))
    assert_same_bits("dx", dx, expected)


def test_networks_that_join_at_different_blocks_share_a_pass() -> None:
    """To the bit what each computes alone; the pass ends where the last one joins."""
    ids = batch(1, 15)
    first = ladder_model(rejoin=0.5)
    models = [first, *(first.beside(LadderConfig(reduction_factor=2, rejoin=share)) for share in (0.75, 0.25))]
    expected = [gradients(trained(model), input_ids=ids, labels=ids) for model in models]
    passes: list[int] = []
    stock = type(first.backbone).hidden_states

    def counted(backbone: Any, *arguments: Any) -> Any:
        states = list(stock(backbone, *arguments))
        passes.append(len(states) - 1)
        return iter(states)

    found: dict[int, dict[str, Tensor]] = {}
    jobs = [lambda i=i: found.update({i: gradients(models[i], input_ids=ids, labels=ids)}) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(first.backbone), "hidden_states", counted)
        outcomes = Lockstep(first.model).run(jobs)
    assert [outcome.error for outcome in outcomes] == [None] * 3 and passes == [3]
    for index, of_one in enumerate(expected):
        for name, gradient in of_one.items():
            assert_same_bits(name, found[index][name], gradient)


def test_states_above_are_freed_as_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a gradient passes block i, the inputs of the blocks above it are gone."""
    backbone, ids = tiny_backbone(), batch(1, 11)
    hidden = backbone.embed(ids[0]).requires_grad_()
    inputs: list[StorageWeakRef] = []
    gone: list[list[bool]] = []
    run, back = backbone._run_block, backbone._block_gradient

    def noting(block: Any, index: int, hidden: Tensor, rows: Any) -> Tensor:
        inputs.append(StorageWeakRef(hidden.untyped_storage()))
        return run(block, index, hidden, rows)

    def looking(dout: Tensor, *rest: Any) -> Tensor:
        gone.append([storage.expired() for storage in inputs])
        return back(dout, *rest)

    monkeypatch.setattr(backbone, "_run_block", noting)
    monkeypatch.setattr(backbone, "_block_gradient", looking)
    torch.autograd.grad(backbone.run_above(hidden, 1, SequenceLayout.packed([11])).square().sum(), hidden)
    assert gone == [[False, False, False], [False, False, True], [False, True, True]]


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "half", float("nan")])
def test_shares_out_of_range(share: Any) -> None:
    with pytest.raises(ValueError, match="rejoin must be a number from 0 to 1"):
        LadderConfig(rejoin=share)


def test_some_block_is_left_to_follow() -> None:
    with pytest.raises(ValueError, match=r"rejoin=0.9 leaves none of the backbone's 4 blocks to the side network"):
        ladder_model(rejoin=0.9)
    assert [LadderConfig(rejoin=share).joins_at(28) for share in (0, 0.01, 0.25, 0.5)] == [28, 28, 21, 14]
