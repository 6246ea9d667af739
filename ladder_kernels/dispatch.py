"""When an op may skip the dispatcher, and what it is shielded from."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ladder_kernels.gpu.spec import ARCHITECTURES, architecture

_PLAIN = (Tensor, torch.nn.Parameter)


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """True if plain tensors are computed on here and now: no compilation, no tracing, no fake tensors, no transform.

    A one-row `nf4_linear` on a 64 x 64 weight took 2.6 times as long through its Python op (measured on a Xeon), and a
    pass over a 7B backbone makes some 200 calls, so ops without a gradient call their implementation directly where
    nobody else needs to see the call.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch.jit.is_tracing():
        return False
    # vmap, jvp and their like, and dual numbers: their tensors look plain, and hold more than their memory.
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:  # a generator expression would take as long as the rest
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    return True


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(*tensors: Tensor | None) -> bool:
    """True if these are the Triton kernels' to compute on: CUDA tensors, none of them fp64.

    Without Triton, which has no wheel for some platforms, plain torch computes on the GPU.
    """
    for tensor in tensors:
        if tensor is not None and (not tensor.is_cuda or tensor.dtype == torch.float64):
            return False
    return _has_triton()


def uses_triton_products(x: Tensor, *others: Tensor | None) -> bool:
    """`uses_triton` for matrix products: Triton 3.7 multiplies without tensor cores on Turing, and spills."""
    return uses_triton(x, *others) and architecture(x.device) >= ARCHITECTURES[0]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: an op that promises its result's dtype must not have its own products cast."""
    # torch.autocast refuses devices such as meta.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
