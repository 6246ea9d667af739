"""SideNetwork alone: sizes, initial weights, what it keeps of the stream of hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from engine.config import LadderConfig
from engine.model.side_network import SideNetwork
from engine.model.tap_store import TapKeeper
from engine.sequence import SequenceLayout

QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
TINY = QWEN_7B | {"hidden_size": 48, "intermediate_size": 80, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2}


def network(preset: str = "ladder", **overrides: Any) -> SideNetwork:
    return SideNetwork(LadderConfig.preset(preset, **overrides), SimpleNamespace(**TINY))


def stream(tokens: int = 6, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor]]:
    for index in range(TINY["num_layers"] + 1):
        yield index, torch.randn(tokens, TINY["hidden_size"]).to(dtype)


def run(side: SideNetwork, hidden: Iterator[tuple[int, Tensor]] | None = None) -> tuple[Tensor, Tensor]:
    return side(hidden or stream(), SequenceLayout.packed([6]))


@pytest.mark.parametrize(
    ("preset", "overrides", "expected"),
    [
        # 28 x (D S + S (7 + 2) 32 + S S + 3 S F + 2 S) + D S + 27 gates, S = 224, F = 1184
        ("ladder", {}, 28 * (802_816 + 64_512 + 50_176 + 795_648 + 448) + 802_816 + 27),
        ("xladder", {}, 28 * (64_512 + 50_176 + 795_648 + 448) + 15 * 802_816 + 13),
        ("lst", {}, 28 * (802_816 + 64_512 + 50_176 + 795_648 + 448) + 2 * 802_816 + 28 + 224),
        ("qst", {}, 28 * (64_512 + 50_176 + 795_648 + 448) + 29 * 16 * (3584 + 224) + 802_816 + 28 + 1),
        ("ladder", {"merge": "sum", "tap_down": "avg_pool"}, 28 * (64_512 + 50_176 + 795_648 + 448) + 802_816),
    ],
)
def test_parameter_counts_beside_qwen_7b(preset: str, overrides: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        side = SideNetwork(LadderConfig.preset(preset, **overrides), SimpleNamespace(**QWEN_7B))
    assert sum(parameter.numel() for parameter in side.parameters()) == expected


def test_ladder_beside_qwen_7b_has_49_million_parameters() -> None:
    with torch.device("meta"):
        side = SideNetwork(LadderConfig(), SimpleNamespace(**QWEN_7B))
    assert round(sum(parameter.numel() for parameter in side.parameters()) / 1e6) == 49
    assert (side.dims.side_dim, side.dims.num_heads, side.dims.head_dim, side.dims.num_kv_heads) == (224, 7, 32, 1)


def test_gates_exist_where_there_is_something_to_merge() -> None:
    def gated(side: SideNetwork) -> list[bool]:
        return [tap.gate_logit is not None for tap in side.taps]

    assert gated(network("ladder")) == [False, True, True, True, True]
    assert gated(network("xladder")) == [False, True]
    assert gated(network("qst")) == gated(network("lst")) == [True] * 5
    assert gated(network("ladder", merge="sum")) == [False] * 5
    assert network("lst").embedding_tap.gate_logit is None


def test_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = network("ladder", seed=7).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state is left alone"
    torch.manual_seed(4)
    second, other = network("ladder", seed=7).state_dict(), network("ladder", seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.qkv"], other["layers.0.qkv"])


def test_initial_scales() -> None:
    side = SideNetwork(LadderConfig.preset("xladder"), SimpleNamespace(**(TINY | {"hidden_size": 2048})))
    layers = side.num_side_layers
    assert side.taps[0].weight.std().item() == pytest.approx(2048**-0.5, rel=0.02)
    qkv, out = side.layers[0].qkv, side.layers[0].attention_out
    assert qkv.std().item() == pytest.approx(qkv.shape[1] ** -0.5, rel=0.02)
    assert out.std().item() == pytest.approx((out.shape[1] * 2 * layers) ** -0.5, rel=0.02)
    assert not side.side_up.any()
    assert side.taps[1].gate_logit.item() == 0
    assert (side.layers[0].mlp_norm == 1).all()


def test_only_a_residual_output_starts_closed() -> None:
    assert not network("ladder").side_up.any()
    assert network("lst").side_up.all()
    assert network("qst").side_up.all()
    assert network("qst").mix_alpha.item() == 1
    assert network("lst").final_norm is not None
    assert network("qst").final_norm is network("ladder").final_norm is None


@pytest.mark.parametrize("preset", ["ladder", "xladder", "lst", "qst", "rejoin"])
def test_untrained_combination_is_the_backbone_except_for_lst(preset: str) -> None:
    side = network(preset)
    hidden, state = run(side)
    assert torch.equal(side.combine(hidden, state), hidden) == (preset != "lst")


def test_every_parameter_of_qst_gets_a_gradient_after_one_step() -> None:
    side = network("qst")
    hidden, state = run(side)
    side.combine(hidden, state).square().sum().backward()
    assert side.mix_alpha.grad.item() != 0, "alpha learns at step 0"
    with torch.no_grad():
        side.mix_alpha.sub_(0.01)
    side.zero_grad()
    side.combine(*run(side)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in side.parameters())


@pytest.mark.parametrize("preset", ["ladder", "xladder", "lst", "qst", "rejoin"])
def test_no_parameter_is_unused(preset: str) -> None:
    side = network(preset)
    side.combine(*run(side)).sum().backward()
    assert all(parameter.grad is not None for parameter in side.parameters())


@pytest.mark.parametrize("tap_down", ["linear", "low_rank", "adapter", "avg_pool", "max_pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_in_the_dtype_of_the_taps_and_trains_in_fp32(tap_down: str, dtype: torch.dtype) -> None:
    side = network("ladder", tap_down=tap_down)
    hidden, state = run(side, stream(dtype=dtype))
    assert hidden.dtype == state.dtype == side.combine(hidden, state).dtype == dtype
    state.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in side.named_parameters() if name != "side_up"}
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


def test_pooling_handles_a_width_that_is_no_multiple_of_the_side_width() -> None:
    hidden = torch.randn(3, TINY["hidden_size"])
    side = network("ladder", tap_down="avg_pool")
    assert TINY["hidden_size"] % side.dims.side_dim != 0
    # Adaptive pooling: output i averages the inputs from floor(i D / S) to ceil((i + 1) D / S).
    width, side_dim = TINY["hidden_size"], side.dims.side_dim
    bounds = [(i * width // side_dim, -(-(i + 1) * width // side_dim)) for i in range(side_dim)]
    expected = torch.stack([hidden[:, low:high].mean(1) for low, high in bounds], 1)
    torch.testing.assert_close(side.taps[0](hidden, None, TapKeeper("device")), expected, rtol=1e-6, atol=1e-6)
    expected = torch.stack([hidden[:, low:high].amax(1) for low, high in bounds], 1)
    assert torch.equal(network("ladder", tap_down="max_pool").taps[0](hidden, None, TapKeeper("device")), expected)


def watched(alive_when_asked: list[list[int]], grad: bool) -> Iterator[tuple[int, Tensor]]:
    """A stream that notes, each time it is asked for more, which earlier states still exist."""
    storages: list[StorageWeakRef] = []
    for index in range(TINY["num_layers"] + 1):
        hidden = torch.randn(6, TINY["hidden_size"])
        storages.append(StorageWeakRef(hidden.untyped_storage()))
        with torch.set_grad_enabled(grad):
            yield index, hidden
        del hidden
        alive_when_asked.append([i for i, storage in enumerate(storages) if not storage.expired()])


def test_untapped_states_die_at_once() -> None:
    side, alive = network("xladder"), []
    hidden, state = run(side, watched(alive, grad=True))
    # Blocks 4 and 5 of 5 are tapped; a linear tap keeps its input for its weight gradient.
    assert alive == [[], [], [], [], [4], [4, 5]]
    assert hidden is not None
    state.sum().backward()


def test_nothing_is_kept_without_gradients_or_by_pooling() -> None:
    for side, grad in ((network("ladder"), False), (network("ladder", tap_down="avg_pool"), True)):
        alive: list[list[int]] = []
        with torch.set_grad_enabled(grad):
            run(side, watched(alive, grad))
        assert alive == [[], [], [], [], [], [5]], "only h_L, which is returned"


def test_stream_is_consumed_lazily() -> None:
    order: list[str] = []
    side = network("ladder")
    for j, layer in enumerate(side.layers):
        layer.register_forward_hook(lambda *_, j=j: order.append(f"side {j}"))

    def noting() -> Iterator[tuple[int, Tensor]]:
        for index, hidden in stream():
            order.append(f"block {index}")
            yield index, hidden

    run(side, noting())
    assert order[:5] == ["block 0", "block 1", "side 0", "block 2", "side 1"]
