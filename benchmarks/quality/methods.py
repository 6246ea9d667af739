"""The methods that are compared: how each is built beside a backbone, trained, and tried with which learning rates.

Every method has as many tries. Side networks take about three times the learning rate of adapters, so each grid is laid
around what its kind takes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedConfig, Trainer

from benchmarks.quality.low_rank import LowRankModel
from benchmarks.tracked_qlora import QLoRA, track_qlora
from benchmarks.tracked_step import track_ladder
from engine.backbone import Backbone
from engine.config import PRESETS, LadderConfig
from engine.model.causal_lm import LadderForCausalLM
from engine.model.connections import connections
from engine.training.trainer import LadderTrainer

REDUCTION_FACTOR = 2
"""The quickstart's, S = 64 beside D = 128: about as many parameters as adapters of rank 16 to 32 have there."""


@dataclass(frozen=True)
class Peaks:
    """Bytes at the peak of a training step in bf16 on a GPU, tracked (`benchmarks.tracker`).

    Attributes:
        plain: activations are kept.
        checkpointing: they are computed again in backward, for a third more FLOPs; None for side networks, whose layers
            always are, and for what was trained so.
    """

    plain: int
    checkpointing: int | None = None


class Method(Protocol):
    """A way to fine-tune a frozen backbone."""

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Peak learning rates that may be tried, rising, about those that are at first."""

    @property
    def trainer(self) -> type[Trainer]:
        """What trains the model that `build` returns."""

    def build(self, backbone: Backbone, seed: int) -> nn.Module:
        """The trainable model; called as `LadderForCausalLM` is, its result has `["loss"]`."""

    def peaks(self, config: PreTrainedConfig, tokens: int, batch: int) -> Peaks:
        """Of a step over `batch` documents of `tokens` tokens beside a backbone of that configuration."""

    def changed(self, values: Mapping[str, Any]) -> Method:
        """The same method with some of its settings replaced."""

    def check_fits(self, layers: int) -> None:
        """Raise a ValueError where it cannot be built beside so many blocks."""


@dataclass(frozen=True)
class LowRank:
    """LoRA on all linears of the uppermost blocks.

    Attributes:
        rank: of the adapters.
        top_share: share of the blocks, counted from the top, that carry them. At least one does.
        checkpointing: blocks run again in backward.
    """

    rank: int
    top_share: float = 1.0
    checkpointing: bool = False
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    trainer: type[Trainer] = Trainer

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1 or not 0 < self.top_share <= 1:
            raise ValueError(f"expected rank >= 1 and 0 < top_share <= 1, got {self.rank!r} and {self.top_share!r}")
        if type(self.checkpointing) is not bool:
            raise ValueError(f"checkpointing must be True or False, got {self.checkpointing!r}")

    def build(self, backbone: Backbone, seed: int) -> nn.Module:
        return LowRankModel(backbone, self.rank, self._top_blocks(backbone.config.num_layers), seed, self.checkpointing)

    def peaks(self, config: PreTrainedConfig, tokens: int, batch: int) -> Peaks:
        top_blocks = self._top_blocks(config.num_hidden_layers)
        plain, checkpointing = (
            track_qlora(config, QLoRA(again, True, True, self.rank, top_blocks), tokens, batch).peak.device_bytes
            for again in (False, True)
        )
        return Peaks(checkpointing) if self.checkpointing else Peaks(plain, checkpointing)

    def changed(self, values: Mapping[str, Any]) -> LowRank:
        if unknown := sorted(values.keys() - {"rank", "top_share", "checkpointing"}):
            raise ValueError(f"no setting {unknown[0]!r}; expected rank, top_share or checkpointing")
        return replace(self, **values)

    def check_fits(self, layers: int) -> None:
        """Adapters fit beside any number of blocks."""

    def _top_blocks(self, layers: int) -> int | None:
        return None if self.top_share == 1 else max(round(layers * self.top_share), 1)


@dataclass(frozen=True)
class SideTuning:
    """A side network of a preset of `LadderConfig`, with some fields replaced."""

    preset: str
    fields: Mapping[str, Any] = field(default_factory=lambda: {"reduction_factor": REDUCTION_FACTOR})
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    trainer: type[Trainer] = LadderTrainer

    def build(self, backbone: Backbone, seed: int) -> nn.Module:
        return LadderForCausalLM.from_backbone(backbone, self._config(seed))

    def peaks(self, config: PreTrainedConfig, tokens: int, batch: int) -> Peaks:
        return Peaks(track_ladder(config, self._config(), tokens, batch).peak.device_bytes)

    def changed(self, values: Mapping[str, Any]) -> SideTuning:
        if "seed" in values:
            raise ValueError("the seed is the run's; use --seeds")
        changed = replace(self, fields={**self.fields, **values})
        changed._config()  # refuses what LadderConfig does
        return changed

    def check_fits(self, layers: int) -> None:
        connections(self._config(), layers)

    def _config(self, seed: int = 0) -> LadderConfig:
        return LadderConfig.preset(self.preset, **{**self.fields, "seed": seed})


METHODS: dict[str, Method] = {
    "qlora_r8": LowRank(8),
    "qlora_r16": LowRank(16),
    "qlora_r16_checkpointing": LowRank(16, checkpointing=True),
    "qlora_r64": LowRank(64),
    "lora_top_half": LowRank(16, top_share=0.5),
    "lora_top_quarter": LowRank(32, top_share=0.25),
    **{preset: SideTuning(preset) for preset in PRESETS},
}


def find_method(text: str) -> Method:
    """The method of a name, or of `NAME:setting=value,...`: `xladder:num_taps=2`, `qlora_r16:rank=32`.

    Raises:
        ValueError: no such method or setting, or a value that it cannot have.
    """
    name, _, settings = text.partition(":")
    if any(character.isspace() for character in text):
        raise ValueError(f"method {text!r}: expected no white space")
    if name not in METHODS:
        raise ValueError(
            f"no method {name!r}; expected one of {', '.join(METHODS)}, or such a name with :SETTING=VALUE"
        )
    if not settings:
        return METHODS[name]
    values = {}
    for setting in settings.split(","):
        key, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"method {text!r}: expected SETTING=VALUE behind the colon, got {setting!r}")
        values[key] = _literal(value)
    try:
        return METHODS[name].changed(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {text!r}: {error}") from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
