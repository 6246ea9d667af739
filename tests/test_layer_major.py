"""Micro-batches that pass the backbone together: the weights of one-by-one accumulation, each layer touched once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import ladder_model, tiny_backbone, trained
from torch import Tensor

from engine import LadderArguments, LadderForCausalLM, LadderTrainer
from engine.backbone import Backbone
from engine.config import LadderConfig
from engine.model.tap_store import TapPolicy
from engine.training.layer_major import LayerMajor

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (9, 17, 5, 13, 11, 21, 7)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass of the backbone, in order."""
    seen: list[int] = []
    stock = Backbone.hidden_states

    def counted(self: Backbone, input_ids: Tensor, *rest: Any) -> Iterator[tuple[int, Tensor]]:
        seen.append(len(input_ids))
        return stock(self, input_ids, *rest)

    monkeypatch.setattr(Backbone, "hidden_states", counted)
    return seen


def samples() -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 256, (n,), generator=draw).tolist()} for n in LENGTHS]


def train(folder: Path, group_tokens: int, preset: str = "ladder", policy: TapPolicy = "device") -> dict[str, Tensor]:
    """In fp64, which the order of sums does not reach: Adam makes a step of any small difference."""
    backbone = tiny_backbone(dtype=torch.float64, quantize=False)
    model = LadderForCausalLM.from_backbone(backbone, LadderConfig.preset(preset, reduction_factor=2))
    model.side_network.double()
    args = LadderArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        taps=policy,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = LadderTrainer(model, args, train_dataset=samples())
    trainer.group_tokens = group_tokens
    trainer.train()
    return model.side_network.state_dict()


@pytest.mark.parametrize("policy", ["device", "host", "none"])
@pytest.mark.parametrize("preset", ["ladder", "xladder"])
def test_weights_are_those_of_accumulation_one_by_one(
    tmp_path: Path, passes: list[int], preset: str, policy: TapPolicy
) -> None:
    expected = train(tmp_path, 1, preset, policy)
    assert len(passes) == 2 * len(LENGTHS)
    passes.clear()
    together = train(tmp_path, 10_000, preset, policy)
    assert len(passes) == 2 * 3 and sum(passes) == 2 * sum(LENGTHS)
    for name, weight in expected.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-9, atol=1e-12, msg=name)


def test_taps_on_the_host_train_the_same_weights_and_none_trains_fewer(tmp_path: Path) -> None:
    expected, on_host, frozen = (train(tmp_path, 10_000, policy=policy) for policy in ("device", "host", "none"))
    assert all(torch.equal(on_host[name], weight) for name, weight in expected.items())
    start = LadderForCausalLM.from_backbone(tiny_backbone(), LadderConfig.preset("ladder", reduction_factor=2))
    moved = {name for name, weight in start.side_network.state_dict().items() if not torch.equal(frozen[name], weight)}
    assert moved and not any(name.startswith("taps") and name.endswith("weight") for name in moved)


@pytest.mark.parametrize("policy", ["device", "int8", "host"])
def test_gradients_beside_a_packed_backbone(policy: TapPolicy) -> None:
    model = trained(ladder_model("xladder", tiny_backbone(dtype=torch.float32)))
    model.side_network.tap_policy = policy
    batches = [
        {"input_ids": torch.tensor([s["input_ids"]]), "labels": torch.tensor([s["input_ids"]])} for s in samples()
    ]
    gradients = []
    for passed in ([None] * len(batches), model.run_ahead(batches)):
        model.zero_grad()
        for batch, ahead in zip(batches, passed, strict=True):
            model(**batch, passed=ahead).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, alone in gradients[0].items():
        assert alone is not None and gradients[1][name] is not None
        assert (gradients[1][name] - alone).norm() <= 1e-5 * alone.norm(), name


def test_what_was_computed_of_another_batch_is_refused() -> None:
    model = ladder_model("ladder", tiny_backbone())
    (passed,) = model.run_ahead([{"input_ids": torch.zeros(1, 12, dtype=torch.int64)}])
    ids = torch.zeros(1, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"passed holds 12 rows: expected .* this very batch of 8"):
        model(input_ids=ids, labels=ids.long(), passed=passed)
    with pytest.raises(ValueError, match="with labels or targets"):
        model(input_ids=torch.zeros(1, 12, dtype=torch.int64), passed=passed)


def test_groups_are_as_large_as_fits_and_foreign_batches_run_alone() -> None:
    batches = [{"input_ids": torch.zeros(1, tokens, dtype=torch.int64)} for tokens in (4, 4, 9, 3, 3)]
    ran: list[list[int]] = []

    class Model:
        def run_ahead(self, group: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
            ran.append([batch["input_ids"].numel() for batch in group])
            return [(batch["input_ids"], batch["input_ids"]) for batch in group]

    def take(groups: LayerMajor, batch: dict[str, Tensor]) -> Any:
        return groups.take(Model(), batch, lambda batch: batch)  # type: ignore[arg-type]

    groups = LayerMajor(8)
    groups.begin(batches)
    taken = [take(groups, batch) for batch in batches]
    assert ran == [[4, 4], [3, 3]]
    assert [None if passed is None else passed[0].numel() for passed in taken] == [4, 4, None, 3, 3]
    groups.begin(batches)
    assert take(groups, {"input_ids": batches[0]["input_ids"]}) is None  # equal, but not what was announced
    assert take(groups, batches[0]) is None and len(ran) == 2
