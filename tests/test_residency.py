"""Streamed layers: the bits of resident ones under every placement, whatever order layers are asked for in."""

from __future__ import annotations

import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladders import batch, checkpoint_folder, ladder_model, tiny_backbone, trained
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.backbone import Backbone, load_backbone, loader, packed_cache, residency
from engine.backbone.block import Block
from engine.backbone.layout import PackedBlock, describe, pack, packed_nbytes
from engine.backbone.residency import Layers, Placement, place
from engine.model.adapter import save_adapter
from engine.model.causal_lm import LadderForCausalLM
from engine.sequence import SequenceLayout

NUM_LAYERS = 4
GARBAGE = 0xFF  # NaN as a floating-point number


class LateCopier:
    """A device whose copies end as late as they may: at the wait. Until then the buffer holds garbage."""

    def __init__(self, slots: int) -> None:
        self._pending: list[tuple[Tensor, Tensor] | None] = [None] * slots
        self._is_read = [False] * slots
        self.num_copies = 0

    def copy(self, slot: int, source: Tensor, target: Tensor) -> None:
        assert not self._is_read[slot], "filled while a layer may still be computed with it"
        target.fill_(GARBAGE)
        self._pending[slot] = (source, target)
        self.num_copies += 1

    def wait(self, slot: int) -> None:
        assert not self._is_read[slot]
        if self._pending[slot] is not None:
            source, target = self._pending[slot]
            target.copy_(source)
        self._pending[slot], self._is_read[slot] = None, True

    def release(self, slot: int) -> None:
        self._is_read[slot] = False


@pytest.fixture(autouse=True)
def late_copies(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """All copies end late, unless a test asks for those of the CPU."""
    if "direct_copies" not in request.fixturenames:
        monkeypatch.setattr(residency, "copier_for", lambda device, slots: LateCopier(slots))


@pytest.fixture
def direct_copies() -> None:
    """The copier of the CPU."""


@cache
def layer_nbytes(family: str = "qwen2") -> int:
    return packed_nbytes(tiny_backbone(family).blocks[0])


PLACEMENTS: dict[str, dict[str, Any]] = {
    "host-1": {"residency": "host"},
    "host-2": {"residency": "host", "prefetch": 2},
    # All but what is resident passes through two or three staging buffers.
    "1-resident": {"residency": "auto", "layer_budget": 3},
    "1-resident-2": {"residency": "auto", "layer_budget": 4, "prefetch": 2},
    "all-resident": {"residency": "auto", "layer_budget": 4},
}


def streamed_backbone(placement: str, family: str = "qwen2") -> Backbone:
    """A tiny backbone; budgets are in layers."""
    arguments = dict(PLACEMENTS[placement])
    if "layer_budget" in arguments:
        arguments["layer_budget"] *= layer_nbytes(family)
    return load_backbone(checkpoint_folder(family), dtype=torch.float32, **arguments)


def all_states(backbone: Backbone, seed: int = 0) -> list[Tensor]:
    return [hidden for _, hidden in backbone.hidden_states(batch(11, seed=seed), SequenceLayout.packed([4, 7]))]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.isfinite(other).all() and torch.equal(one, other), f"h_{index}"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_hidden_states_have_the_same_bits(family: str, placement: str) -> None:
    expected = tiny_backbone(family)
    backbone = streamed_backbone(placement, family)
    assert (backbone.nbytes, backbone.fingerprint()) == (expected.nbytes, expected.fingerprint())
    for seed in range(3):  # the first pass starts with empty buffers, the others with what was fetched ahead
        assert_equal(all_states(backbone, seed), all_states(expected, seed))


def test_the_copier_of_a_cpu_gives_the_same_bits(direct_copies: None) -> None:
    for placement in PLACEMENTS:
        backbone = streamed_backbone(placement)
        for seed in range(2):
            assert_equal(all_states(backbone, seed), all_states(tiny_backbone(), seed))


@pytest.mark.parametrize("options", [{"quantize": False}, {"double_quant": False}], ids=str)
def test_other_formats_are_streamed_as_well(options: dict[str, bool]) -> None:
    expected = load_backbone(checkpoint_folder("llama_bias"), dtype=torch.float32, **options)
    backbone = load_backbone(checkpoint_folder("llama_bias"), dtype=torch.float32, residency="host", **options)
    assert_equal(all_states(backbone), all_states(expected))


@pytest.mark.parametrize("placement", ["host-1", "host-2", "1-resident"])
@pytest.mark.parametrize("preset", ["ladder", "xladder"])
def test_losses_and_gradients_have_the_same_bits(preset: str, placement: str) -> None:
    expected, model = (
        trained(ladder_model(preset, backbone)).train() for backbone in (tiny_backbone(), streamed_backbone(placement))
    )
    for seed in range(2):
        ids = batch(2, 9, seed=seed)
        losses = []
        for each in (expected, model):
            each.zero_grad()
            losses.append(each(ids, labels=ids).loss)
            losses[-1].backward()
        assert torch.equal(*losses)
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("placement", ["host-1", "1-resident-2"])
def test_generation_has_the_same_tokens(placement: str) -> None:
    expected, model = (trained(ladder_model(backbone=b)) for b in (tiny_backbone(), streamed_backbone(placement)))
    ids = batch(2, 5)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(ids, **arguments), expected.generate(ids, **arguments))


def test_abandoned_passes_leave_a_true_state() -> None:
    backbone, expected = streamed_backbone("host-1"), all_states(tiny_backbone())
    for stop in range(NUM_LAYERS + 1):
        states = backbone.hidden_states(batch(11), SequenceLayout.packed([4, 7]))
        assert_equal([hidden for _, (_, hidden) in zip(range(stop + 1), states, strict=False)], expected[: stop + 1])
        states.close()
        assert_equal(all_states(backbone), expected)


@pytest.mark.parametrize("placement", ["host-1", "host-2", "1-resident"])
def test_passes_may_alternate(placement: str) -> None:
    backbone, layout = streamed_backbone(placement), SequenceLayout.packed([4, 7])
    first, second = (backbone.hidden_states(batch(11, seed=seed), layout) for seed in (0, 1))
    next(second), next(second)
    pairs = [(next(first)[1], state[1]) for state in second]
    expected = all_states(tiny_backbone(), 0), all_states(tiny_backbone(), 1)
    assert_equal([one for one, _ in pairs], expected[0][: len(pairs)])
    assert_equal([other for _, other in pairs], expected[1][2:])
    assert_equal([hidden for _, hidden in first], expected[0][len(pairs) :])


def test_an_error_while_computing_leaves_a_true_state() -> None:
    backbone = streamed_backbone("host-1")
    with pytest.raises(KeyError), backbone.layers.on_device(1):
        raise KeyError
    assert_equal(all_states(backbone), all_states(tiny_backbone()))


def test_a_failed_copy_leaves_a_true_state(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = streamed_backbone("host-1")
    all_states(backbone)  # after which the buffers hold the last layer and the first

    def fail(slot: int, source: Tensor, target: Tensor) -> None:
        target.fill_(GARBAGE)
        raise RuntimeError("copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(backbone.layers._copier, "copy", fail)
        with pytest.raises(RuntimeError, match="copy failed"):
            all_states(backbone)
    last = NUM_LAYERS - 1
    with backbone.layers.on_device(last) as block:
        pairs = zip(block.tensors(), backbone.blocks[last].tensors(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    assert_equal(all_states(backbone), all_states(tiny_backbone()))


def numbered_blocks(count: int) -> list[Block]:
    """Blocks of two layouts, whose every tensor holds the number of its layer."""
    kinds = [tiny_backbone("qwen2").blocks[0], tiny_backbone("qwen3", quantize=False).blocks[0]]
    return [kinds[i % 3 == 1].map(lambda tensor, i=i: torch.full_like(tensor, i)) for i in range(count)]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_layers_gives_the_asked_ones(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7))
    streamed = data.draw(st.sets(st.integers(0, count - 1)))
    order = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    packed = [pack(block) for block in numbered_blocks(count)]
    buffers = {index: packed[index].buffer for index in streamed}
    blocks = [layer.block for layer in packed]
    layers = Layers(blocks, torch.device("cpu"), buffers, prefetch=data.draw(st.integers(1, 2)))
    for index in order:
        with layers.on_device(index) as block:
            assert describe(block) == describe(blocks[index])
            assert all(bool((tensor == index).all()) for tensor in block.tensors())


@pytest.mark.parametrize("prefetch", [1, 2])
def test_every_streamed_layer_is_copied_once_a_pass_and_ahead(prefetch: int) -> None:
    packed = [pack(block) for block in numbered_blocks(7)]
    layers = place(packed, torch.device("cpu"), Placement("host", prefetch=prefetch))
    copier = layers._copier
    assert isinstance(copier, LateCopier)
    for _ in range(3):
        for index in range(7):
            before = copier.num_copies
            with layers.on_device(index):
                assert copier.num_copies == before or before == 0, "copied when asked for, not ahead"
    assert copier.num_copies == 3 * 7 + prefetch


def test_two_streamed_layers_are_never_in_use_on_one_buffer() -> None:
    layers = streamed_backbone("host-1").layers
    with layers.on_device(0), layers.on_device(1):
        with pytest.raises(RuntimeError, match="layer 2 cannot be streamed while other layers are in use"):
            layers.on_device(2).__enter__()
        with pytest.raises(RuntimeError, match="layer 1 cannot be streamed"):
            layers.on_device(1).__enter__()


class CountedStorages(TorchDispatchMode):
    """Sizes of all storages that ops return, in order of their first appearance."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._seen.setdefault(tensor.untyped_storage()._cdata, tensor)  # kept alive: no address comes twice
        return out

    def sizes(self) -> list[int]:
        return [tensor.untyped_storage().nbytes() for tensor in self._seen.values()]


@pytest.mark.parametrize("placement", ["host-1", "host-2", "1-resident"])
def test_nothing_is_allocated_in_the_loop(placement: str, direct_copies: None) -> None:
    sizes = []
    for backbone in (tiny_backbone(), streamed_backbone(placement)):
        all_states(backbone)
        with CountedStorages() as storages:
            all_states(backbone)
        sizes.append(storages.sizes())
    assert sizes[0] == sizes[1] and max(sizes[0]) < layer_nbytes()


def test_a_pass_with_fake_tensors_leaves_real_layers() -> None:
    backbone = streamed_backbone("host-1")
    all_states(backbone)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        ids, layout = fake.from_tensor(batch(11)), SequenceLayout.packed([11])
        for _ in zip(range(3), backbone.hidden_states(ids, layout), strict=False):
            pass
    assert_equal(all_states(backbone), all_states(tiny_backbone()))


def test_passes_in_inference_mode_and_outside_of_it() -> None:
    with torch.inference_mode():
        backbone = streamed_backbone("host-1").to("cpu")
        all_states(backbone)
    assert_equal(all_states(backbone), all_states(tiny_backbone()))


def test_moves_leave_streamed_layers_in_host_memory() -> None:
    backbone = streamed_backbone("1-resident")
    backbone.to("meta")
    devices = [{tensor.device.type for tensor in block.tensors()} for block in backbone.blocks]
    assert devices == [{"meta"}, {"cpu"}, {"cpu"}, {"cpu"}]
    with backbone.layers.on_device(1) as block:
        assert {tensor.device.type for tensor in block.tensors()} == {"meta"}


# ---- placement


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    budget=st.integers(1, 80),
    prefetch=st.integers(1, 2),
)
def test_a_budget_is_kept_and_used(sizes: list[int], budget: int, prefetch: int) -> None:
    def needed(count: int) -> int:
        streamed = residency._spread(count, len(sizes))
        assert len(streamed) == count
        staging = min(count, prefetch + 1) * max((sizes[i] for i in streamed), default=0)
        return staging + sum(size for i, size in enumerate(sizes) if i not in streamed)

    fitting = [count for count in range(len(sizes) + 1) if needed(count) <= budget]
    if fitting:
        assert residency._num_streamed(sizes, budget, prefetch) == fitting[0]
    else:
        with pytest.raises(
            ValueError, match=f"layer_budget {budget:,} bytes is too small: .* needs {needed(len(sizes)):,}"
        ):
            residency._num_streamed(sizes, budget, prefetch)


@pytest.mark.parametrize(("total", "count"), [(28, 1), (28, 13), (64, 40), (5, 5), (3, 0)])
def test_streamed_layers_are_spread(total: int, count: int) -> None:
    streamed = residency._spread(count, total)
    gaps = {after - before for before, after in zip([-1, *streamed], streamed, strict=False)}
    assert len(streamed) == count and len(gaps) <= 2 and (not gaps or max(gaps) - min(gaps) <= 1)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_bytes_on_the_device_stay_within_the_budget(layers: int) -> None:
    backbone = load_backbone(
        checkpoint_folder(), dtype=torch.float32, residency="auto", layer_budget=layers * layer_nbytes()
    )
    resident = {2: 0, 3: 1, 4: 4}[layers]
    assert backbone.layers.device_nbytes <= layers * layer_nbytes()
    assert backbone.layers.host_nbytes == (NUM_LAYERS - resident) * layer_nbytes()
    with pytest.raises(ValueError, match=r"layer_budget .* is too small"):
        load_backbone(checkpoint_folder(), dtype=torch.float32, residency="auto", layer_budget=layer_nbytes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residency": "disk"}, "residency: expected one of device, host, auto, got 'disk'"),
        ({"residency": "auto"}, "residency 'auto' and layer_budget belong together"),
        ({"layer_budget": 10**9}, "residency 'auto' and layer_budget belong together"),
        ({"residency": "auto", "layer_budget": 0}, "layer_budget: expected a number of bytes, got 0"),
        ({"residency": "auto", "layer_budget": 1e9}, "layer_budget: expected a number of bytes, got 1000000000.0"),
        ({"residency": "host", "prefetch": 3}, "prefetch: expected 1 or 2 layers, got 3"),
        ({"residency": "host", "prefetch": True}, "prefetch: expected 1 or 2 layers, got True"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone("no such/folder", **options)


@pytest.mark.parametrize("options", [{}, {"packed_cache": "layers.cache"}], ids=["memory", "cache"])
def test_no_layer_is_held_twice_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    unpacked: list[weakref.ref[Any]] = []

    def watched(block: Block) -> PackedBlock:
        assert all(storage() is None for storage in unpacked), "an earlier layer is still held as it was loaded"
        unpacked.extend(weakref.ref(tensor.untyped_storage()) for tensor in block.tensors())
        return pack(block)

    monkeypatch.setattr(loader, "pack", watched)
    monkeypatch.setattr(packed_cache, "pack", watched)
    options = {name: str(tmp_path / value) for name, value in options.items()}
    load_backbone(checkpoint_folder(), dtype=torch.float32, residency="host", **options)
    assert len(unpacked) == NUM_LAYERS * len(tiny_backbone().blocks[0].tensors())


def test_models_pass_the_options_on(tmp_path: Path) -> None:
    model = trained(ladder_model())
    save_adapter(tmp_path, model.ladder_config, model.backbone, model.side_network.state_dict())
    loaded = LadderForCausalLM.from_pretrained(tmp_path, residency="host", prefetch=2)
    assert loaded.backbone.layers.host_nbytes == NUM_LAYERS * layer_nbytes()
    assert torch.equal(loaded(batch(1, 6)).logits, model(batch(1, 6)).logits)
    with pytest.raises(TypeError, match=r"\['residency'\] are options of loading, but the backbone is loaded already"):
        LadderForCausalLM.from_pretrained(tmp_path, model.backbone, residency="host")
    fresh = LadderForCausalLM.from_backbone(checkpoint_folder(), residency="host")
    assert fresh.backbone.layers.host_nbytes == NUM_LAYERS * packed_nbytes(fresh.backbone.blocks[0])
