"""Scratch memory that is allocated once and reused: decode panels, loss chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Workspace:
    """Named, reusable scratch buffers.

    A buffer grows to the largest size ever taken under its name and is then handed out again and again, so that a
    training loop allocates no scratch after its first step. Two live tensors need two names: taking a name again
    hands out the same memory. Contents are undefined.

    One workspace per thread: two threads that share one would write to the same memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        # What was handed out last under a name: making a view costs as much as a small product.
        self._views: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A contiguous tensor of the given shape inside the buffer `name` of that device."""
        if torch.compiler.is_compiling() or (
            is_in_torch_dispatch_mode() and type(torch.empty(0, device=device)) is not Tensor
        ):
            # Fake tensors must not outlive the mode that makes them, nor meet real memory in it.
            return torch.empty(shape, dtype=dtype, device=device)
        key = (name, device if isinstance(device, torch.device) else torch.device(device))
        last = self._views.get(key)
        if last is not None and last.shape == shape and last.dtype == dtype and not last.requires_grad:
            return last
        needed = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(key)
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if buffer is None or buffer.numel() < needed:
                # Drop the old buffer first, so that both are never alive together.
                self._buffers.pop(key, None)
                self._views.pop(key, None)
                del buffer, last
                buffer = self._buffers[key] = torch.empty(needed, dtype=torch.uint8, device=device)
            view = buffer[:needed].view(dtype).view(shape)
        self._views[key] = view
        return view

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def buffers(self) -> tuple[Tensor, ...]:
        """The memory held now. Who keeps these keeps its addresses valid, also when a larger take replaces it here."""
        return tuple(self._buffers.values())

    def clear(self) -> None:
        """Give the memory back; later takes allocate again."""
        self._buffers.clear()
        self._views.clear()
