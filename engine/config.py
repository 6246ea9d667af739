"""What a side network looks like: one frozen dataclass, its presets, and the sizes that follow from a backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

PRESETS: dict[str, dict[str, Any]] = {
    "ladder": {},
    "xladder": {"connection": "xladder"},
    "lst": {"tap_embeddings": True, "output": "side_only"},
    "qst": {"tap_embeddings": True, "output": "mix", "tap_down": "adapter"},
    "rejoin": {"connection": "xladder", "rejoin": 0.5},
}
"""What each preset changes from the defaults of `LadderConfig`."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "preset_name": tuple(PRESETS),
    "connection": ("ladder", "xladder"),
    "merge": ("lst", "sum"),
    "tap_down": ("linear", "low_rank", "adapter", "avg_pool", "max_pool"),
    "output": ("residual", "side_only", "mix"),
}
# Upper bounds keep a hostile file from asking for terabytes; no published model comes near them.
_INTEGERS: dict[str, tuple[int, int]] = {
    "reduction_factor": (1, 1024),
    "num_side_layers": (1, 1024),
    "num_taps": (1, 1024),
    "tap_every": (1, 1024),
    "tap_rank": (1, 4096),
    "seed": (0, 2**63 - 1),
}
_OPTIONAL = ("num_side_layers", "num_taps")


@dataclass(frozen=True)
class LadderConfig:
    """A side network, independent of the backbone that it will sit beside.

    Attributes:
        preset_name: the preset this configuration started from; a label that nothing branches on.
        reduction_factor: backbone width D over side width S (S is rounded up to a multiple of 32).
        connection: "ladder" taps every `tap_every`-th backbone block, one side layer each; "xladder" feeds the top
            `num_taps` blocks to the first side layers and leaves the others without a tap.
        num_side_layers: side layers l. None: as many as there are taps (ladder), as blocks that are followed (xladder).
        num_taps: tapped blocks delta, xladder only. None: half of the side layers.
        tap_every: distance of tapped blocks, ladder only, counted down from the last block, which is always tapped.
        tap_embeddings: the side network starts from the projected embeddings s_0 = tap_down_0(h_0), so that the first
            tapped layer merges too (LST, QST).
        merge: "lst" g*s + (1-g)*z with a trained scalar g = sigmoid(gate_logit / gate_temperature); "sum" s + z.
        tap_down: D -> S as "linear", "low_rank" (two factors), "adapter" (two factors, SiLU between, as in QST),
            "avg_pool" or "max_pool" (adaptive pooling along D, no parameters).
        tap_rank: inner width of "low_rank" and "adapter".
        output: "residual" y = h_L + up(s); "side_only" y = up(norm(s)) (LST); "mix" y = a*h_L + (1-a)*up(s), a trained
            scalar that starts at 1 (QST).
        rejoin: share of the backbone's blocks that y still passes, k = round(rejoin * L) of them. The side network
            follows the lower L - k blocks, y takes the place of h_{L-k} (which stands for h_L above), and gradients
            come down to it through the top k blocks.
        gate_temperature: of the "lst" gate.
        seed: of the initial weights.

    Raises:
        ValueError: a value out of range, or fields that contradict each other.
    """

    preset_name: str = "ladder"
    reduction_factor: int = 16
    connection: str = "ladder"
    num_side_layers: int | None = None
    num_taps: int | None = None
    tap_every: int = 1
    tap_embeddings: bool = False
    merge: str = "lst"
    tap_down: str = "linear"
    tap_rank: int = 16
    output: str = "residual"
    rejoin: float = 0.0
    gate_temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
        if type(self.tap_embeddings) is not bool:
            raise ValueError(f"tap_embeddings must be true or false, got {self.tap_embeddings!r}")
        for name, low, high in (("gate_temperature", 1e-3, 1e3), ("rejoin", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
        if self.connection == "ladder" and self.num_taps is not None:
            raise ValueError(
                f"num_taps={self.num_taps} belongs to connection='xladder'; a ladder taps every tap_every-th block: "
                "set tap_every, or use the preset xladder"
            )
        if self.connection == "xladder" and self.tap_every != 1:
            raise ValueError(
                f"tap_every={self.tap_every} belongs to connection='ladder'; xladder taps the top num_taps blocks: "
                "set num_taps"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LadderConfig:
        """The named preset (a key of `PRESETS`) with some fields replaced.

        Raises:
            ValueError: an unknown preset or field, or what `LadderConfig` itself refuses.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
        return cls.from_dict({"preset_name": name} | PRESETS[name] | overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LadderConfig:
        """The inverse of `to_dict`, for untrusted input: unknown keys are an error.

        Raises:
            ValueError: an unknown key, or what `LadderConfig` itself refuses.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a ladder configuration is a JSON object, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"unknown ladder configuration keys {unknown[:5]}; known keys: {', '.join(known)}")
        return cls(**values)

    def joins_at(self, num_layers: int) -> int:
        """Number of the hidden state that the output takes the place of, L - k, beside a backbone of L blocks.

        Raises:
            ValueError: it would be the embeddings, so that no block is left to follow.
        """
        index = num_layers - round(self.rejoin * num_layers)
        if index < 1:
            raise ValueError(
                f"rejoin={self.rejoin} leaves none of the backbone's {num_layers} blocks to the side network: choose "
                "less"
            )
        return index

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)


class BackboneShape(Protocol):
    """The part of `engine.backbone.BackboneConfig` that a side network is sized from."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def rope_theta(self) -> float: ...


@dataclass(frozen=True)
class SideDims:
    """Sizes of one side layer.

    Attributes:
        side_dim: width S.
        head_dim: size of a head; 64 where it divides S, else 32.
        num_heads: query heads, S / head_dim.
        num_kv_heads: key and value heads.
        intermediate_size: inner width of the MLP.
    """

    side_dim: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


def side_dims(backbone: BackboneShape, reduction_factor: int) -> SideDims:
    """Sizes of a side layer beside `backbone`.

    S = ceil(D / reduction_factor / 32) * 32, the MLP's width likewise. Heads keep a useful size and shrink in number.
    The backbone's queries per key head are kept where that divides the side heads, else the largest divisor below is
    taken.
    """

    def reduced(width: int) -> int:
        return math.ceil(width / reduction_factor / 32) * 32

    side_dim = reduced(backbone.hidden_size)
    head_dim = 64 if side_dim % 64 == 0 else 32
    num_heads = side_dim // head_dim
    group = min(backbone.num_heads // backbone.num_kv_heads, num_heads)
    while num_heads % group:
        group -= 1
    return SideDims(side_dim, head_dim, num_heads, num_heads // group, reduced(backbone.intermediate_size))
