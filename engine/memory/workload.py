"""The two arguments of a memory plan: what a step trains on, and where it keeps what in how many bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GB = 10**9  # bytes


@dataclass(frozen=True)
class MemoryPolicies:
    """Where things are kept and in how many bits: what a claim about memory has to name.

    The defaults are what training does unless it is told otherwise.

    Attributes:
        residency: packed layers stay on the "device", or are streamed from the "host" as they are needed.
        resident_layers: of "host", the layers that stay on the device all the same.
        prefetch: of "host", layers copied ahead of the one that computes.
        taps: hidden states kept for tap_down's gradient: on the "device" in the compute dtype, as "int8" there, on the
            "host", or "none" (for a down-projection that is not trained).
        head_dtype: the frozen head in the compute dtype ("dense"), as "int8" or "nf4".
        embedding: on the "device", or on the "host", from where the rows of a batch are gathered; a dense head that is
            the embedding as well is on the device.
        optimizer: "adamw" with fp32 moments, or "adamw_8bit".
    """

    residency: Literal["device", "host"] = "device"
    resident_layers: int = 0
    prefetch: int = 1
    taps: Literal["device", "int8", "host", "none"] = "device"
    head_dtype: Literal["dense", "int8", "nf4"] = "dense"
    embedding: Literal["device", "host"] = "host"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"

    def describe(self) -> str:
        """As one line for people."""
        layers = "all layers on the device" if self.residency == "device" else "layers streamed from the host"
        if self.residency == "host" and self.resident_layers:
            layers = f"{self.resident_layers} layers on the device, the others streamed from the host"
        taps = {"device": "in 16 bits", "int8": "as int8", "host": "on the host", "none": "not kept"}[self.taps]
        return f"{layers}; taps {taps}; head {self.head_dtype}; embedding on the {self.embedding}; {self.optimizer}"


@dataclass(frozen=True)
class Workload:
    """What a step trains on, and where.

    Attributes:
        tokens: of one document.
        batch: documents in one pass.
        accumulation: micro-batches per optimizer step; beyond one, gradients are there during their passes too.
        device_type: "cuda" or "cpu".
        itemsize: bytes of the compute dtype.
        group: micro-batches that pass the backbone together, see `engine.training.layer_major`.
        eval_batch: documents in a pass of an evaluation; 0 without one.
    """

    tokens: int
    batch: int = 1
    accumulation: int = 1
    device_type: str = "cuda"
    itemsize: int = 2
    group: int = 1
    eval_batch: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "accumulation", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def rows(self) -> int:
        """Rows T of a micro-batch, all of them supervised: the most there can be."""
        return self.tokens * self.batch

    @property
    def pass_rows(self) -> int:
        """Rows of a pass of the backbone."""
        return self.rows * self.group
