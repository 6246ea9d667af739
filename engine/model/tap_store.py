"""Where the hidden states that the taps' backward reads wait for it.

The gradient of a down-projection is dW = dz^T h, so every tapped h [T, D] is needed once more, in reverse order.

    policy     kept for a tap, bytes                        gradient
    "device"   h itself, 2 T D in 16 bits                   exact
    "int8"     codes and one fp32 scale per 64, 1.06 T D    of the decoded copy: see `ladder_kernels.tap`
    "host"     h in pinned host memory; 4 T D in flight     exact
    "none"     nothing: the projections are not trained     none

"host" copies on a stream of its own while the backbone computes the next block, and fetches the copy of the block below
while backward works on the one above. On a CPU the same code copies within host memory.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ladder_kernels import tap

TapPolicy = Literal["device", "int8", "host", "none"]


def check_tap_policy(policy: str) -> None:
    """Raises ValueError for anything but a `TapPolicy`."""
    if policy not in get_args(TapPolicy):
        raise ValueError(f"taps must be one of {', '.join(get_args(TapPolicy))}, got {policy!r}")


class TapKeeper:
    """The taps of one pass, each keeping what its backward reads where the policy says.

    Side networks that tap the same hidden states share h itself, and its copy on the host; int8 codes each makes anew.

    Args:
        policy: see above.
    """

    def __init__(self, policy: TapPolicy) -> None:
        self._policy = policy
        self._last: weakref.ref[_HostCopy] | None = None  # the graph owns the copies: backward frees each as it passes
        self._copied: weakref.ref[Tensor] | None = None  # what of

    def tap(self, hidden: Tensor, weight: Tensor, state: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """`ladder_kernels.tap`."""
        if self._policy == "host" and torch.is_grad_enabled():
            with self._keeping_on_host(hidden):
                return tap(hidden, weight, state, gate)
        return tap(hidden, weight, state, gate, keep="int8" if self._policy == "int8" else "input")

    def _keeping_on_host(self, hidden: Tensor) -> AbstractContextManager[object]:
        """Within it, whatever autograd saves of `hidden` waits in host memory; all else stays where it is."""
        address, shape = hidden.data_ptr(), hidden.shape  # the graph keeps pack, which must not keep hidden
        known = self._last if self._copied is not None and self._copied() is hidden else None
        self._copied = weakref.ref(hidden)

        def pack(tensor: Tensor) -> Tensor | _HostCopy:
            if tensor.data_ptr() != address or tensor.shape != shape:
                return tensor
            copy = None if known is None else known()
            if copy is None:
                copy = _HostCopy(tensor, self._last)
                self._last = weakref.ref(copy)
            return copy

        def unpack(kept: Tensor | _HostCopy) -> Tensor:
            return kept.fetched() if isinstance(kept, _HostCopy) else kept

        return saved_tensors_hooks(pack, unpack)


class _HostCopy:
    """A tensor in host memory that comes back when it is asked for, and brings the one before it on its way."""

    def __init__(self, tensor: Tensor, before: weakref.ref[_HostCopy] | None) -> None:
        self._before = before
        self._device = tensor.device
        self._side_stream = _side_stream(tensor.device) if tensor.is_cuda else None
        self._arriving: Tensor | None = None
        self._host = _host_buffer(tensor)
        self._on_side_stream(lambda: self._host.copy_(tensor, non_blocking=True))
        if self._side_stream is not None:
            tensor.record_stream(self._side_stream)  # its memory is not reused before the copy has read it

    def fetch(self) -> None:
        """Start the way back; nothing waits."""
        if self._arriving is None:
            self._arriving = self._on_side_stream(lambda: self._host.to(self._device, non_blocking=True, copy=True))

    def fetched(self) -> Tensor:
        """The tensor on its device, for work queued on the current stream from here on."""
        self.fetch()
        tensor, self._arriving = self._arriving, None
        assert tensor is not None
        if self._side_stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._side_stream)
            tensor.record_stream(current)
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()
        return tensor

    def _on_side_stream(self, copy: Callable[[], Tensor]) -> Tensor:
        if self._side_stream is None:
            return copy()
        self._side_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side_stream):
            return copy()


def _host_buffer(tensor: Tensor) -> Tensor:
    """Host memory for a copy, pinned for a GPU as far as the system allows."""
    if tensor.is_cuda:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError as error:
            _warn_pageable(str(error).partition("\n")[0])
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@functools.cache
def _warn_pageable(reason: str) -> None:
    warnings.warn(
        f"no more host memory could be pinned for taps ({reason}); the rest waits in pageable memory, which is copied "
        "more slowly. Free host memory, raise the limit of the container or virtual machine, or train with taps int8",
        RuntimeWarning,
        stacklevel=2,
    )


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
