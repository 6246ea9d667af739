"""Long contexts: stages in slices of tokens, attention without a matrix of scores, memory that does not grow with L."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from checkpoints import FAMILIES, tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close_to_truth, assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config

from engine.backbone import Backbone, chunks, load_backbone
from engine.backbone.chunks import by_rows, chunk_tokens
from engine.backbone.families import backbone_config, expected_tensors
from engine.backbone.loader import assemble_block, with_layers
from engine.backbone.residency import Layers
from engine.sequence import SequenceLayout
from ladder_kernels import NF4Weight, attention

TOKENS = 45


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made since it was entered and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in known:
                self.sizes[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def fake_backbone(mode: FakeTensorMode, **differences: Any) -> Backbone:
    """An NF4 backbone without values, of Qwen2.5-7B's shape but for the differences."""
    shape = {"vocab_size": 1024, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
    hf_config = Qwen2Config(**(shape | {"num_key_value_heads": 4, "num_hidden_layers": 1} | differences))
    config = backbone_config(hf_config)
    loaded: dict[str, Tensor | NF4Weight] = {}
    with mode:
        for name, expected in expected_tensors(config).items():
            if expected.linear:
                rows, cols = expected.shape
                packed, absmax = torch.empty(rows * cols // 2, dtype=torch.uint8), torch.empty(rows * cols // 64)
                loaded[name] = NF4Weight(packed, absmax, torch.empty(16), (rows, cols), torch.bfloat16)
            else:
                loaded[name] = torch.empty(expected.shape, dtype=torch.bfloat16)
    layers = Layers([assemble_block(config, index, loaded) for index in range(config.num_layers)], torch.device("cpu"))
    return Backbone(config, hf_config, *with_layers(config, loaded, layers))


def peak_of_pass(backbone: Backbone, tokens: int) -> int:
    ids, layout = torch.zeros(tokens, dtype=torch.int64), SequenceLayout.packed([tokens])
    with LiveBytes() as live:
        for _, hidden in backbone.hidden_states(ids, layout):
            del hidden
    return live.peak


def last_states(backbone: Backbone, layout: SequenceLayout) -> list[Tensor]:
    ids = torch.randint(0, 288, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return [hidden for _, hidden in backbone.hidden_states(ids, layout)]


@pytest.fixture
def in_slices(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Cuts every stage into slices of so many tokens from now on."""

    def cut(tokens: int) -> None:
        for name, value in (("CHUNK_BYTES", 1), ("MIN_CHUNK_TOKENS", tokens), ("_ROW_MULTIPLE", 1)):
            monkeypatch.setattr(chunks, name, value)

    return cut


@pytest.mark.parametrize(("family", "size"), [*((family, 16) for family in FAMILIES), ("qwen3", 1), ("qwen3", 44)])
def test_slices_equal_one_piece_within_rounding(
    tmp_path: Path, in_slices: Callable[[int], None], family: str, size: int
) -> None:
    """By the numerics rule and not to the bit: matrix products of other sizes may sum in another order."""
    folder, layout = tiny_checkpoint(tmp_path, family), SequenceLayout.packed([20, 25])
    for quantize, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        backbone = load_backbone(folder, dtype=dtype, quantize=quantize)
        whole = last_states(backbone, layout)
        truth = whole if quantize else last_states(load_backbone(folder, dtype=torch.float64, quantize=False), layout)
        with pytest.MonkeyPatch.context() as patch:
            in_slices(size)
            cut = last_states(backbone, layout)
            patch.undo()
        in_slices(1 << 30)
        for index, (ours, plain, true) in enumerate(zip(cut, whole, truth, strict=True)):
            if quantize:
                assert float((ours - plain).norm() / plain.norm()) < 0.02, f"h_{index}"
            else:
                assert_close_to_truth(f"h_{index}", ours, true, plain)


def test_slices_are_bit_equal_where_rows_are_independent(in_slices: Callable[[int], None]) -> None:
    x = torch.randn(TOKENS, 8)
    whole = by_rows(lambda rows: (rows.exp(), rows * 2), (x,), 1)
    in_slices(7)
    for name, ours, expected in zip(
        ("exp", "double"), by_rows(lambda r: (r.exp(), r * 2), (x,), 1), whole, strict=True
    ):
        assert_same_bits(name, ours, expected)


def test_a_yielded_state_is_never_written_to(tmp_path: Path, in_slices: Callable[[int], None]) -> None:
    backbone = load_backbone(tiny_checkpoint(tmp_path, "llama2"), dtype=torch.float32)
    in_slices(10)
    ids, kept = torch.arange(TOKENS), []
    for _, hidden in backbone.hidden_states(ids, SequenceLayout.packed([TOKENS])):
        kept.append((hidden, hidden.clone()))
    assert len({hidden.data_ptr() for hidden, _ in kept}) == len(kept)
    for index, (hidden, copy) in enumerate(kept):
        assert_same_bits(f"h_{index}", hidden, copy)


@given(tokens=st.integers(0, 200_000), bytes_per_token=st.integers(1, 1 << 20))
@settings(max_examples=200, deadline=None)
def test_slices_fit_their_budget_and_are_long(tokens: int, bytes_per_token: int) -> None:
    size = chunk_tokens(tokens, bytes_per_token)
    limit = max(chunks.MIN_CHUNK_TOKENS, chunks.CHUNK_BYTES // bytes_per_token)
    if size >= tokens:
        assert tokens <= limit
    else:
        assert chunks.MIN_CHUNK_TOKENS // 2 <= size <= -(-limit // 128) * 128 and size % 128 == 0
        assert tokens - (-(-tokens // size) - 1) * size > 0, "an empty slice"


def test_two_thousand_tokens_are_one_piece_and_32k_of_7b_are_few() -> None:
    mlp_of_70b, mlp_of_7b = 2 * 2 * (8192 + 28672), 2 * 2 * (3584 + 18944)
    assert chunk_tokens(2048, mlp_of_70b) == 2048
    assert -(-32768 // chunk_tokens(32768, mlp_of_7b)) == 12


@pytest.mark.parametrize("slice_tokens", [16, 1 << 30], ids=["slices", "one piece"])
def test_live_bytes_of_a_pass_are_flat_in_the_number_of_layers(
    tmp_path: Path, in_slices: Callable[[int], None], slice_tokens: int
) -> None:
    in_slices(slice_tokens)
    peaks = []
    for layers in (4, 16):
        folder = tiny_checkpoint(tmp_path, "qwen3", num_hidden_layers=layers)
        backbone = load_backbone(folder, dtype=torch.float32)
        peak_of_pass(backbone, TOKENS)  # the workspace grows once
        peaks.append(peak_of_pass(backbone, TOKENS))
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("window", [None, 4096])
def test_a_7b_layer_at_32k_tokens_holds_four_hidden_states_and_a_slice(window: int | None) -> None:
    tokens, state = 32768, 32768 * 3584 * 2
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    backbone = fake_backbone(mode, **sliding)
    with mode:
        peak = peak_of_pass(backbone, tokens)
    assert peak < 4 * state + 2 * chunks.CHUNK_BYTES, f"{peak / 1e9:.2f} GB"


@pytest.mark.parametrize("block", [1, 4, 7, 512])
def test_a_window_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(sys.modules["ladder_kernels.attention"], "_WINDOW_QUERIES", block)
    query, key, value = torch.randn(30, 4, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)
    distance = torch.arange(30)[:, None] - torch.arange(30)

    def plain(dtype: torch.dtype) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", query.to(dtype), key.repeat_interleave(2, 1).to(dtype)) / 8**0.5
        scores.masked_fill_((distance < 0) | (distance >= 5), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(2, 1).to(dtype)).flatten(1)

    out = attention(query, key, value, [30], window=5)
    assert_close_to_truth("out", out, plain(torch.float64), plain(torch.float32))
