"""Attention over documents against a dense fp64 softmax, and the cached layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from engine.sequence import SequenceLayout, attention, rotary_table
from ladder_kernels import rotary


def truth(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the columns `allowed` [Tq, Tk], one head after the other, in fp64."""
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // groups].double().T / math.sqrt(query.shape[2])
        heads.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ value[:, head // groups].double())
    return torch.cat(heads, dim=-1)


def heads(rows: int, count: int, seed: int) -> Tensor:
    return torch.randn(rows, count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.none() | st.integers(1, 10),
)
def test_packed_attention_stays_inside_documents(
    lengths: list[int], counts: tuple[int, int], window: int | None
) -> None:
    rows = sum(lengths)
    query, key, value = heads(rows, counts[0], 0), heads(rows, counts[1], 1), heads(rows, counts[1], 2)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    allowed = (document[:, None] == document) & (distance >= 0) & (distance < (window or rows))
    out = attention(query, key, value, SequenceLayout.packed(lengths), window=window)
    torch.testing.assert_close(out, truth(query, key, value, allowed), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.lists(st.integers(0, 6), min_size=1, max_size=3),
    st.none() | st.integers(1, 6),
)
def test_cached_attention_sees_earlier_real_columns_only(steps: list[int], pads: list[int], window: int | None) -> None:
    batch, columns = len(pads), sum(steps)
    padding = torch.arange(columns) >= torch.tensor(pads)[:, None]
    full = [heads(batch * columns, count, seed).unflatten(0, (batch, columns)) for seed, count in enumerate((4, 2, 2))]
    cache, seen, out = DynamicCache(), 0, []
    for step in steps:
        layout = SequenceLayout.cached(padding[:, : seen + step], step)
        new = [tensor[:, seen : seen + step].flatten(0, 1) for tensor in full]
        out.append(attention(*new, layout, window=window, cache=cache, layer=0).unflatten(0, (batch, step)))
        seen += step
    got = torch.cat(out, dim=1)
    assert torch.isfinite(got).all()
    distance = torch.arange(columns)[:, None] - torch.arange(columns)
    allowed = (distance >= 0) & (distance < (window or columns))
    for row in range(batch):
        real = padding[row]
        expected = truth(*(tensor[row] for tensor in full), (allowed & real) | (distance == 0))
        torch.testing.assert_close(got[row, real], expected[real], rtol=1e-12, atol=1e-12)


def test_a_cache_grows_at_its_own_layer() -> None:
    cache = DynamicCache()
    for layer in (0, 1):
        layout = SequenceLayout.cached(torch.ones(2, 3, dtype=torch.bool), 3)
        attention(heads(6, 4, 0), heads(6, 2, 1), heads(6, 2, 2), layout, cache=cache, layer=layer)
    assert [cache.get_seq_length(layer) for layer in (0, 1)] == [3, 3]
    assert cache.layers[1].keys.shape == (2, 2, 3, 8)


@pytest.mark.parametrize(("columns", "cached"), [(3, 5), (10, 0)])
def test_a_cache_that_does_not_hold_the_columns_of_the_mask_is_refused(columns: int, cached: int) -> None:
    cache = DynamicCache()
    if cached:
        attention(*(heads(cached, 2, 0),) * 3, SequenceLayout.cached(torch.ones(1, cached), cached), cache=cache)
    layout = SequenceLayout.cached(torch.ones(1, columns), 3)
    with pytest.raises(
        ValueError, match=f"all {columns} columns of the mask in every layer, got {cached + 3} in layer 0"
    ):
        attention(*(heads(3, 2, 0),) * 3, layout, cache=cache)


def test_layouts_count_positions_per_document() -> None:
    assert SequenceLayout.packed([3, 1, 2]).positions.tolist() == [0, 1, 2, 0, 0, 1]
    padding = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert SequenceLayout.cached(padding, 4).positions.tolist() == [0, 0, 0, 1, 0, 1, 2, 3]
    last = SequenceLayout.cached(padding, 1)
    assert last.positions.tolist() == [1, 3] and last.lengths == (1, 1)


@pytest.mark.parametrize("window", [None, 2])
def test_masks_are_built_once_per_window(window: int | None) -> None:
    layout = SequenceLayout.cached(torch.ones(1, 4, dtype=torch.bool), 2)
    mask = layout.mask(window)
    assert layout.mask(window) is mask
    expected = [[True, True, True, False], [True] * 4] if window is None else [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert mask[0, 0].tolist() == [[bool(entry) for entry in row] for row in expected]


def test_no_mask_where_causality_is_all_there_is() -> None:
    real, padded = torch.ones(2, 4, dtype=torch.bool), torch.tensor([[False, True, True, True], [True] * 4])
    for query_length, window, padding, has_mask in (
        (1, None, real, False),
        (4, None, real, False),
        (1, 4, real, False),
        (1, 3, real, True),
        (2, None, real, True),
        (1, None, padded, True),
        (4, None, padded, True),
    ):
        assert (SequenceLayout.cached(padding, query_length).mask(window) is not None) == has_mask


def test_rotary_rotates_pairs_by_position_times_frequency() -> None:
    frequencies, positions = torch.tensor([1.0, 0.1]), torch.tensor([0, 3, 7])
    cos, sin = rotary_table(positions, frequencies, torch.float64, scale=0.5)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    rotated = rotary(x, cos, sin)
    pairs, out = torch.complex(x[..., :2], x[..., 2:]), torch.complex(rotated[..., :2], rotated[..., 2:])
    angles = (positions[:, None].float() * frequencies).double()
    torch.testing.assert_close(
        out, pairs * torch.polar(torch.full_like(angles, 0.5), angles)[:, None], rtol=0, atol=1e-6
    )
    assert cos.shape == sin.shape == (3, 4)
    torch.testing.assert_close(rotated[0], 0.5 * x[0])
