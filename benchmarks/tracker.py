"""Bytes a training step holds, counted storage by storage, by part and by phase, without allocating any of them.

The step runs on fake CPU tensors (`FakeTensorMode`), which have shapes, dtypes and storages but no memory, so a 70B
model is tracked on a laptop. `StorageTracker` sees every storage that torch makes and every one that is dropped.
`gpu_code` lets the engine take the path of a GPU there: its launchers allocate what they allocate and launch nothing.
Memory that an op allocates inside itself is invisible here, which is why scratch comes from a `Workspace`.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves

from ladder_kernels import checks, dispatch, launch, panels

ACTIVATIONS = "activations"
HOST = ""  # the part that is not on the device
SM_COUNT = 28  # RTX 3060


@dataclass
class Peak:
    """The most that was held at once: bytes on the device, what they were, and the most on the host meanwhile."""

    device_bytes: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    host_bytes: int = 0


class StorageTracker(TorchDispatchMode):
    """Counts live storages by part while it is entered; push it above a `FakeTensorMode`.

    Attributes:
        peaks: by phase name, in order of first use; outside of phases nothing is noted.
        live: bytes held now on the device, by part.
        live_host: bytes held now on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, Peak] = {}
        self.live: Counter[str] = Counter()
        self.live_host = 0
        self._total = 0
        self._phase: str | None = None
        self._made_as = ACTIVATIONS
        self._parts: dict[int, tuple[str, int]] = {}  # of each live storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    @property
    def peak(self) -> Peak:
        """Of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.device_bytes)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside count for this phase; what is held already counts from its start."""
        previous, self._phase = self._phase, name
        self._note()
        try:
            yield
        finally:
            self._phase = previous

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """Storages made inside belong to `part`, which may be `HOST`."""
        previous, self._made_as = self._made_as, part
        try:
            yield
        finally:
            self._made_as = previous

    def makes(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose storages belong to `part`."""

        def labelled(*args: Any, **kwargs: Any) -> Any:
            with self.making(part):
                return function(*args, **kwargs)

        return labelled

    def label(self, tensor: Tensor, part: str, *, only_from: str | None = None) -> None:
        """The tensor's storage belongs to `part` from now on; with only_from, if it belonged to that part."""
        key = tensor.untyped_storage()._cdata
        known = self._parts.get(key)
        if known is not None and known[0] and only_from in (None, known[0]):
            self.live[known[0]] -= known[1]
            self.live[part] += known[1]
            self._parts[key] = (part, known[1])

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._parts:
            return
        size = storage.nbytes()
        self._parts[key] = (self._made_as, size)
        if self._made_as == HOST:
            self.live_host += size
        else:
            self.live[self._made_as] += size
            self._total += size
        weakref.finalize(storage, self._drop, key).atexit = False
        self._note()

    def _drop(self, key: int) -> None:
        part, size = self._parts.pop(key)
        if part == HOST:
            self.live_host -= size
        else:
            self.live[part] -= size
            self._total -= size

    def _note(self) -> None:
        if self._phase is None:
            return
        peak = self.peaks.setdefault(self._phase, Peak())
        peak.host_bytes = max(peak.host_bytes, self.live_host)
        if self._total > peak.device_bytes:
            peak.device_bytes, peak.parts = self._total, Counter(self.live)


@contextmanager
def tracked(tracker: StorageTracker, fake: FakeTensorMode) -> Iterator[None]:
    """Everything inside is fake, takes a GPU's path and is counted."""
    with warnings.catch_warnings(), gpu_code(), fake, tracker:
        # Launchers look at the alignment of pointers.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


@contextmanager
def gpu_code(sm_count: int = SM_COUNT) -> Iterator[None]:
    """CPU tensors are taken for those of a card of the architecture 86 with so many multiprocessors.

    Dispatch says "Triton, eagerly", launches do nothing, and scratch is kept as it is outside of fake tensors. A packed
    head is decoded into one panel, where a GPU has two.
    """
    from ladder_kernels.gpu import elementwise, nf4_linear, side_layer, tap  # noqa: F401, imported to be replaced

    card = (nf4_linear.architecture(torch.device("cpu")), sm_count)
    chunk_bytes = launch.logit_chunk_bytes("cuda")
    replaced: dict[Callable[..., Any], Callable[..., Any]] = {
        dispatch.runs_eagerly: lambda *_: True,
        dispatch.uses_triton: lambda *_: True,
        dispatch.uses_triton_products: lambda *_: True,
        is_in_torch_dispatch_mode: lambda: False,  # asked by Workspace, which would keep nothing
        checks.check_targets: lambda *_: None,
        launch.logit_chunk_bytes: lambda device: chunk_bytes,
        nf4_linear.card: lambda device: card,
        panels.panel_linear_dx: lambda *_: None,  # widens its factors on a CPU, and nothing on a GPU
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(type(elementwise._rms_norm_fwd_kernel), "__getitem__", _launches_nothing))
        for name, module in list(sys.modules.items()):
            if name.startswith("ladder_kernels"):
                for key, value in list(vars(module).items()):
                    if callable(value) and value in replaced:
                        stack.enter_context(patch.object(module, key, replaced[value]))
        yield


def _launches_nothing(*_: Any) -> Callable[..., None]:
    return lambda *_, **__: None
