"""Connection maps are pure functions: their properties are tested without any model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import LadderConfig
from engine.model.connections import Connections, connections, ladder_connections, xladder_connections


def check(pairs: Connections, num_layers: int, num_side_layers: int) -> None:
    backbone_layers, side_layers = zip(*pairs, strict=True)
    assert list(side_layers) == list(range(len(pairs))), "the tapped side layers are the first ones, one tap each"
    assert len(pairs) <= num_side_layers
    assert list(backbone_layers) == sorted(set(backbone_layers)), "a block is tapped once, in order"
    assert backbone_layers[0] >= 1
    assert backbone_layers[-1] == num_layers, "the last block is always tapped"


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 100))
def test_ladder(data: st.DataObject, num_layers: int) -> None:
    tap_every = data.draw(st.integers(1, num_layers))
    pairs = ladder_connections(num_layers, tap_every)
    check(pairs, num_layers, len(pairs))
    assert len(pairs) == -(-num_layers // tap_every)
    assert all(b - a == tap_every for (a, _), (b, _) in itertools.pairwise(pairs))


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 100))
def test_xladder(data: st.DataObject, num_layers: int) -> None:
    num_taps = data.draw(st.integers(1, num_layers))
    num_side_layers = data.draw(st.integers(num_taps, 200))
    pairs = xladder_connections(num_layers, num_taps, num_side_layers)
    check(pairs, num_layers, num_side_layers)
    assert len(pairs) == num_taps
    assert pairs[0][0] == num_layers - num_taps + 1, "the top blocks"


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 50))
def test_xladder_of_twice_delta_side_layers_has_depth_l_plus_delta(num_taps: int) -> None:
    num_layers, num_side_layers = 60, 2 * num_taps
    last_block, last_tapped = xladder_connections(num_layers, num_taps, num_side_layers)[-1]
    free_layers = num_side_layers - 1 - last_tapped
    assert last_block + free_layers == num_layers + num_taps


def test_named_maps() -> None:
    assert ladder_connections(4) == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert ladder_connections(5, 2) == [(1, 0), (3, 1), (5, 2)]
    assert ladder_connections(6, 2) == [(2, 0), (4, 1), (6, 2)]
    assert xladder_connections(6, 2, 5) == [(5, 0), (6, 1)]


@pytest.mark.parametrize(
    ("config", "num_layers", "expected"),
    [
        (LadderConfig(), 3, ([(1, 0), (2, 1), (3, 2)], 3)),
        (LadderConfig(tap_every=3), 7, ([(1, 0), (4, 1), (7, 2)], 3)),
        (LadderConfig(tap_every=3, num_side_layers=3), 7, ([(1, 0), (4, 1), (7, 2)], 3)),
        (LadderConfig.preset("xladder"), 6, ([(4, 0), (5, 1), (6, 2)], 6)),
        (LadderConfig.preset("xladder"), 1, ([(1, 0)], 1)),
        (LadderConfig.preset("xladder", num_side_layers=4), 6, ([(5, 0), (6, 1)], 4)),
        (LadderConfig.preset("xladder", num_taps=1), 4, ([(4, 0)], 4)),
        (LadderConfig.preset("xladder", num_taps=4, num_side_layers=4), 4, ([(1, 0), (2, 1), (3, 2), (4, 3)], 4)),
    ],
)
def test_maps_of_configurations(config: LadderConfig, num_layers: int, expected: tuple[Connections, int]) -> None:
    assert connections(config, num_layers) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LadderConfig(tap_every=5), "tap_every must be from 1 to the 4 blocks that the side network follows, got 5"),
        (LadderConfig(num_side_layers=3), "num_side_layers=3, but tap_every=1 taps 4 of 4 blocks.*preset xladder"),
        (
            LadderConfig(tap_every=3, rejoin=0.5),
            "tap_every must be from 1 to the 2 blocks that the side network follows",
        ),
        (
            LadderConfig.preset("xladder", num_taps=5),
            "num_taps must be from 1 to the 4 blocks that the side network follows, got 5",
        ),
        (
            LadderConfig.preset("xladder", num_taps=3, num_side_layers=2),
            "num_taps=3 needs at least as many side layers, got num_side_layers=2: lower num_taps or raise",
        ),
        (
            LadderConfig.preset("xladder", num_side_layers=10),
            "num_taps must be from 1 to the 4 blocks that the side network follows, got 5",
        ),
    ],
)
def test_maps_that_do_not_fit_are_refused(config: LadderConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        connections(config, 4)
