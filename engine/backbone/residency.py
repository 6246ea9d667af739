"""Where the layers of a backbone live: on its device, or in host memory, streamed to the device while it computes.

    compute   | layer 0 | layer 1 | layer 2 | ...          copy i+1 runs beside compute i; the buffer it fills is free
    copy      | 0 |  1  |    2    |    3    | ...          once the event behind the last compute on it has happened

A streamed layer is one buffer in host memory (`layout`), so one copy moves it, into one of `prefetch + 1` staging
buffers that exist from the start: nothing is allocated in a pass. What a staging buffer holds is the only state, and it
stays true whatever order layers are asked for in: a pass may be abandoned, two may alternate, and the first layers of
the next pass are fetched while the last ones of this one compute. Streaming hides behind compute from about
0.52 bytes a weight / (bytes per second of the bus) * (FLOPs per second) / 2 tokens a pass: at 25 GB/s, PCIe 4.0,
computed 260 on an RTX 3060 and 600 on a 4070.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from engine.backbone.block import Block
from engine.backbone.host_memory import pin, unpin
from engine.backbone.layout import PackedBlock, describe, views

RESIDENCIES = ("device", "host", "auto")


@dataclass(frozen=True)
class Placement:
    """Where layers shall live, as the arguments of `load_backbone` say it.

    Raises:
        ValueError: values out of range, or a budget without "auto" or the other way round.
    """

    residency: str = "device"
    layer_budget: int | None = None
    prefetch: int = 1
    packed_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.residency not in RESIDENCIES:
            raise ValueError(f"residency: expected one of {', '.join(RESIDENCIES)}, got {self.residency!r}")
        if type(self.prefetch) is not int or self.prefetch not in (1, 2):
            raise ValueError(f"prefetch: expected 1 or 2 layers, got {self.prefetch!r}")
        budget = self.layer_budget
        if (self.residency == "auto") != (budget is not None):
            raise ValueError(
                "residency 'auto' and layer_budget belong together: expected the bytes that layers may take on the "
                f"device with 'auto' and none otherwise, got residency {self.residency!r} with {budget!r}"
            )
        if budget is not None and (type(budget) is not int or budget < 1):
            raise ValueError(f"layer_budget: expected a number of bytes, got {budget!r}")

    @property
    def is_direct(self) -> bool:
        """Whether layers go to the device as they are loaded, not through host memory or a file."""
        return self.residency == "device" and self.packed_cache is None


PLACEMENT_OPTIONS = frozenset(field.name for field in fields(Placement))


class Copier(Protocol):
    """Fills staging buffers in the order it is asked to, beside the computation that reads others."""

    def copy(self, slot: int, source: Tensor, target: Tensor) -> None:
        """Start to fill `target`, the buffer of `slot`, once the computation before its `release` has ended."""

    def wait(self, slot: int) -> None:
        """Hold back computation that is issued from now on until the slot's last copy has ended."""

    def release(self, slot: int) -> None:
        """Computation issued so far was the last to read what the slot holds."""


class StreamCopier:
    """Copies on a stream of their own; the host waits for nothing while sources are pinned."""

    def __init__(self, device: torch.device, slots: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(slots)]
        self._computed = [torch.cuda.Event() for _ in range(slots)]
        for slot in range(slots):  # whoever had the staging memory before may still compute on it
            self.release(slot)

    def copy(self, slot: int, source: Tensor, target: Tensor) -> None:
        """See `Copier.copy`."""
        self._refuse_capture()
        target.record_stream(self._stream)  # if the buffer goes, its memory is not reused before the copy has ended
        self._stream.wait_event(self._computed[slot])
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._copied[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        """See `Copier.wait`."""
        self._refuse_capture()
        torch.cuda.current_stream(self._device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        """See `Copier.release`."""
        self._computed[slot].record(torch.cuda.current_stream(self._device))

    def _refuse_capture(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "streamed layers cannot be captured in a CUDA graph: what the staging buffers hold would depend on the "
                "capture; load the backbone with residency='device'"
            )


class DirectCopier:
    """Copies at once, where computation is over when its call returns."""

    def copy(self, slot: int, source: Tensor, target: Tensor) -> None:
        """See `Copier.copy`."""
        target.copy_(source)

    def wait(self, slot: int) -> None:
        """See `Copier.wait`."""

    def release(self, slot: int) -> None:
        """See `Copier.release`."""


def copier_for(device: torch.device, slots: int) -> Copier:
    """How staging buffers of a device are filled."""
    return StreamCopier(device, slots) if device.type == "cuda" else DirectCopier()


class Layers:
    """The blocks of a backbone, each on its device or streamed to it.

    One pass at a time computes with a block, as with the backbone's scratch memory: not for several threads.

    Args:
        blocks: one per layer, in order; resident ones on `device`, streamed ones as views into their buffers.
        device: where blocks are computed with.
        buffers: host memory of the streamed layers by index; none where all are resident.
        prefetch: how many streamed layers are fetched ahead.
        pin_memory: page-lock the buffers for a CUDA device. Not for buffers that are mapped from a file, of which
            every page would be read and kept in memory.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        device: torch.device,
        buffers: Mapping[int, Tensor] | None = None,
        *,
        prefetch: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.blocks = list(blocks)
        self._buffers = dict(buffers or {})
        self.prefetch = prefetch
        self._pin_memory = pin_memory
        self._stage(device)

    def _stage(self, device: torch.device) -> None:
        """Build staging buffers, and the blocks in them, on the device."""
        slots = min(self.prefetch + 1, len(self._buffers))
        size = max((buffer.nbytes for buffer in self._buffers.values()), default=0)
        with torch.inference_mode(False), torch.no_grad():  # they are written to in every mode
            self._staging = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
            alike: dict[str, list[Block]] = {}
            self._staged: dict[int, list[Block]] = {}
            for index in self._buffers:
                kind = describe(self.blocks[index])
                if kind not in alike:
                    alike[kind] = [views(self.blocks[index], buffer) for buffer in self._staging]
                self._staged[index] = alike[kind]
        self._holds: list[int | None] = [None] * slots
        self._unused = list(range(slots))  # least recently used first
        self._copier = copier_for(device, slots)
        if device.type == "cuda" and self._pin_memory:
            self._pin_memory = False  # once: it stays pinned if the model moves
            with torch.cuda.device(device):
                pinned = pin(list(self._buffers.values()), device)
            weakref.finalize(self, unpin, pinned, device).atexit = False

    @property
    def num_streamed(self) -> int:
        """Layers that are streamed."""
        return len(self._buffers)

    @property
    def device_nbytes(self) -> int:
        """Bytes on the device: resident layers and staging buffers."""
        resident = (block for index, block in enumerate(self.blocks) if index not in self._buffers)
        staging = sum(buffer.nbytes for buffer in self._staging)
        return staging + sum(tensor.nbytes for block in resident for tensor in block.tensors())

    @property
    def host_nbytes(self) -> int:
        """Bytes of streamed layers in host memory, or mapped from a file."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @contextmanager
    def on_device(self, index: int, then: Sequence[int] | None = None) -> Iterator[Block]:
        """The block of a layer on the device, to compute with inside the context only.

        On leaving it the layers that come next are fetched: behind the computation, because a copy from memory that is
        not pinned holds up the host.

        Args:
            index: of the layer.
            then: which layers will be asked for next, in order; None: those that follow, and then the first ones.
        """
        if index not in self._buffers:
            yield self.blocks[index]
        else:
            slot = self._holds.index(index) if index in self._holds else self._fetch(index, self._unused[:1])
            if slot is None or slot not in self._unused:
                raise RuntimeError(
                    f"layer {index} cannot be streamed while other layers are in use: leave one context of "
                    "on_device() before entering the next"
                )
            self._unused.remove(slot)
            self._copier.wait(slot)
            try:
                yield self._staged[index][slot]
            finally:
                self._copier.release(slot)
                self._unused.append(slot)
        order = itertools.chain(range(index + 1, len(self.blocks)), range(index + 1)) if then is None else then
        upcoming = list(itertools.islice((layer for layer in order if layer in self._buffers), self.prefetch))
        for wanted in upcoming:
            if wanted not in self._holds:
                self._fetch(wanted, [slot for slot in self._unused if self._holds[slot] not in upcoming])

    def _fetch(self, index: int, slots: Sequence[int]) -> int | None:
        """Start to copy a layer into the first of `slots`, which is returned; None where there is none."""
        if not slots:
            return None
        slot, source = slots[0], self._buffers[index]
        self._holds[slot] = None  # should the copy fail, the slot holds neither layer
        with _unfaked(self._staging[slot]):
            self._copier.copy(slot, source, self._staging[slot][: source.nbytes])
        self._holds[slot] = index
        return slot

    def to(self, device: torch.device | str) -> None:
        """Move resident layers, and stream the others to `device` from now on."""
        device = torch.device(device)
        self.blocks = [
            block if index in self._buffers else block.map(lambda tensor: tensor.to(device))
            for index, block in enumerate(self.blocks)
        ]
        self._stage(device)


def _unfaked(buffer: Tensor) -> AbstractContextManager[object]:
    """No dispatch modes while real memory is filled: under fake tensors it would stay empty, and count as filled."""
    is_faked = is_in_torch_dispatch_mode() and type(buffer) is Tensor and detect_fake_mode() is not None
    return _disable_current_modes() if is_faked else nullcontext()


def place(packed: list[PackedBlock], device: torch.device, placement: Placement) -> Layers:
    """Layers from packed blocks in host memory, of which as many become resident as the placement says.

    With "auto" resident layers are evenly spread, so that each streamed one has the computation of several to hide
    behind.

    Args:
        packed: emptied while layers move to the device, so that no layer is held twice.

    Raises:
        ValueError: the budget is smaller than the staging buffers.
    """
    if placement.layer_budget is not None:
        sizes = [layer.buffer.nbytes for layer in packed]
        num_streamed = _num_streamed(sizes, placement.layer_budget, placement.prefetch)
    else:
        num_streamed = len(packed) if placement.residency == "host" else 0
    streamed = set(_spread(num_streamed, len(packed)))
    blocks, buffers = [], {}
    packed.reverse()
    for index in range(len(packed)):
        layer = packed.pop()
        if index in streamed:
            buffers[index] = layer.buffer
        elif device.type != "cpu":
            layer = PackedBlock(layer.buffer, views(layer.block, layer.buffer.to(device)))
        blocks.append(layer.block)
    is_mapped = placement.packed_cache is not None
    return Layers(blocks, device, buffers, prefetch=placement.prefetch, pin_memory=not is_mapped)


def _spread(count: int, total: int) -> list[int]:
    """`count` of `total` indices, evenly spread, the last one always among them."""
    return [index for index in range(total) if (index + 1) * count // total > index * count // total]


def _num_streamed(sizes: Sequence[int], budget: int, prefetch: int) -> int:
    """The fewest streamed layers with which staging buffers and resident layers fit."""
    for count in range(len(sizes) + 1):
        streamed = set(_spread(count, len(sizes)))
        resident = sum(size for index, size in enumerate(sizes) if index not in streamed)
        staging = min(prefetch + 1, count) * max((sizes[index] for index in streamed), default=0)
        if resident + staging <= budget:
            return count
    raise ValueError(
        f"layer_budget {budget:,} bytes is too small: streaming with prefetch={prefetch} needs {staging:,} bytes for "
        f"{min(prefetch + 1, len(sizes))} staging buffers, all layers resident {sum(sizes):,}"
    )
