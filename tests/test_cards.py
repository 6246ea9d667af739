"""Which cards are known, and the arithmetic of a pass: what model FLOPs utilization is made of."""

from __future__ import annotations

import pytest
import torch
from ladders import ladder_model

from engine.memory.cards import CARDS, card_of, pass_flops


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_is_known_by_its_name(card: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card.cuda_name)
    assert card_of(torch.device("cuda")) is card
    assert card_of(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 3060 Laptop GPU", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "T4"],
)
def test_a_card_of_another_speed_is_not_taken_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert card_of(torch.device("cuda")) is None


def test_arithmetic_of_a_pass() -> None:
    """Two floating-point operations for each weight and row, from the shapes of the qwen2 checkpoint by hand."""
    model = ladder_model("xladder")
    config, ladder = model.backbone.config, model.ladder_config
    width, inner, heads, kv_heads, head_dim, layers, vocab = 64, 96, 4, 2, 16, 4, 288
    layer = width * head_dim * (2 * heads + 2 * kv_heads) + 3 * width * inner
    side = sum(p.numel() for p in model.side_network.parameters())
    per_row = layers * 2 * layer + 8 * side
    # Causal scores are half of tokens^2: q k^T and probabilities v, 2 FLOP a product.
    attention = layers * 2 * 2 * heads * head_dim * (5**2 + 3**2) / 2
    # The frozen head, forward and dX, of supervised rows alone.
    assert pass_flops(config, ladder, [5, 3], 6) == 8 * per_row + attention + 6 * 2 * 2 * width * vocab
    assert pass_flops(config, ladder, [8], 6) > pass_flops(config, ladder, [5, 3], 6)
