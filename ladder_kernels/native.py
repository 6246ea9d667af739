"""The native CPU library: the only place that knows ctypes.

The library is looked for on first use, never on import. Where it is absent the plain-torch `reference` serves, several
times slower, after one warning: codes and decoded weights to the bit, sums in another order. Environment:
`LADDER_NATIVE_LIB` names a library file to use instead of the installed one, `LADDER_CPU_ISA` one of ISAS instead of
the fastest.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladder_kernels import native_abi as abi
from ladder_kernels.nf4_tensors import NF4Tensors
from ladder_kernels.reference import IGNORE_INDEX

if TYPE_CHECKING:
    from ladder_kernels.decoder_block import DecoderWeights
    from ladder_kernels.side_layer import SideLayerCall, SideLayerWeights
    from ladder_kernels.workspace import Workspace

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY_NAME = f"libladder_native{_SUFFIX}"
ISAS = ("amx", "avx512bf16", "avx512", "avx2", "scalar")


@dataclass(frozen=True)
class NativeStatus:
    """Which CPU implementation runs, and why.

    Attributes:
        implementation: "native" or "reference".
        path: the library file in use, None without one.
        isa: the instruction set in use, None without a library.
        reason: one sentence for a person.
    """

    implementation: str
    path: Path | None
    isa: str | None
    reason: str


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL | None
    path: Path | None
    reason: str


def status() -> NativeStatus:
    """Load the library if that has not happened, without the warning, and say what is in use."""
    loaded = _load()
    if loaded.library is None:
        return NativeStatus("reference", None, None, loaded.reason)
    return NativeStatus("native", loaded.path, loaded.library.ladder_isa().decode(), loaded.reason)


def available() -> bool:
    """True if the library is in use. The first call that finds none warns."""
    loaded = _load()
    if loaded.library is None:
        _warn_absent(loaded.reason)
        return False
    return True


def isa() -> str | None:
    """The instruction set in use, or None without a library; the first call that finds none warns."""
    return _library().ladder_isa().decode() if available() else None


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build and this CPU can run, fastest first; empty without a library."""
    library = _load().library
    return () if library is None else tuple(isa for isa in ISAS if library.ladder_isa_available(isa.encode()))


def select_isa(isa: str) -> None:
    """Use the named instruction set from now on, or the fastest with "".

    Raises:
        ValueError: the library, or the CPU, does not have it.
    """
    library = _load().library
    if library is None or library.ladder_select_isa(isa.encode()) != 0:
        offered = ", ".join(available_isas()) or "none, for there is no native library"
        raise ValueError(f"expected one of the instruction sets available here ({offered}), got {isa!r}")


def dequantize_nf4(nf4: NF4Tensors, first_row: int, out: Tensor, rounded_to: torch.dtype | None = None) -> None:
    """`reference.dequantize_nf4` for checked, contiguous CPU tensors.

    With rounded_to, weights are rounded to that 16-bit dtype and kept in `out` of fp32.
    """
    _library().ladder_dequantize_nf4(
        ctypes.byref(_view(nf4)),
        first_row * out.shape[1],
        out.numel(),
        abi.DTYPE_CODES[out.dtype] if rounded_to is None else abi.IN_FLOAT32_CODES[rounded_to],
        out.data_ptr(),
        torch.get_num_threads(),
    )


def nf4_linear(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, nf4: NF4Tensors, scratch: Tensor, out: Tensor
) -> None:
    """out [T, N] = x [T, K] @ W^T + bias, rounded, + residual for few tokens T, from packed weights.

    Checked, contiguous CPU tensors; K and the block size are multiples of 64; scratch as in `launch.linear_plan`. The
    sums are in fp32 and do not depend on the number of threads.
    """
    product = abi.Product(
        x.data_ptr(),
        _address(bias),
        _address(residual),
        out.data_ptr(),
        scratch.data_ptr(),
        *out.shape,
        x.shape[1],
        abi.DTYPE_CODES[x.dtype],
    )
    _library().ladder_nf4_linear(ctypes.byref(_view(nf4)), ctypes.byref(product), torch.get_num_threads())


def cross_entropy(logits: Tensor, targets: Tensor, need_grad: bool) -> Tensor:
    """`reference.cross_entropy` for checked, contiguous CPU tensors of up to 32 bits; the softmax needs no scratch.

    Targets outside of [0, V) that are not IGNORE_INDEX would be read as addresses.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    problem = abi.CrossEntropy(
        logits.data_ptr(),
        targets.data_ptr(),
        losses.data_ptr(),
        *logits.shape,
        IGNORE_INDEX,
        abi.DTYPE_CODES[logits.dtype],
        need_grad,
    )
    _library().ladder_cross_entropy(ctypes.byref(problem), torch.get_num_threads())
    return losses


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`reference.rms_norm` of [R, D] with contiguous rows and weight."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call = abi.RmsNorm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, x.stride(0), epsilon, abi.DTYPE_CODES[x.dtype]
    )
    _library().ladder_rms_norm(ctypes.byref(call), torch.get_num_threads())
    return out


def rms_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """residual + the gradient of x [R, D], and that of the weight, fp32 [D], contiguous tensors of one dtype given.

    Sums over rows are in fp32 and do not depend on the number of threads.
    """
    rows, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(-(-rows // abi.NORM_BLOCK), width, dtype=torch.float32, device=x.device)
    tensors = (dout, x, weight, residual, dx, dweight)
    call = abi.RmsNormBackward(*(t.data_ptr() for t in tensors), rows, width, epsilon, abi.DTYPE_CODES[x.dtype])
    _library().ladder_rms_norm_backward(ctypes.byref(call), torch.get_num_threads())
    return dx, dweight.sum(dim=0)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotary` of [T, H, d] with contiguous tokens and tables."""
    return _rotary(x, cos, sin, torch.empty(x.shape, dtype=x.dtype, device=x.device), is_backward=False)


def rotary_backward(dout: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """The gradient of `rotary` into `out` of the same shape, both [T, H, d] with contiguous tokens."""
    return _rotary(dout, cos, sin, out, is_backward=True)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, is_backward: bool) -> Tensor:
    pointers = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    call = abi.Rotary(*pointers, *x.shape, x.stride(0), out.stride(0), abi.DTYPE_CODES[x.dtype], is_backward)
    _library().ladder_rotary(ctypes.byref(call), torch.get_num_threads())
    return out


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """`reference.swiglu` of [R, F] with contiguous rows, into contiguous `out`, which may be gate."""
    call = abi.SwiGlu(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        *gate.shape,
        gate.stride(0),
        up.stride(0),
        abi.DTYPE_CODES[gate.dtype],
    )
    _library().ladder_swiglu(ctypes.byref(call), torch.get_num_threads())
    return out


def swiglu_backward(gate_up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu` [R, F] of the halves of gate_up [R, 2 F], and their gradients [R, 2 F], contiguous tensors given."""
    out = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
    dgate_up = torch.empty(gate_up.shape, dtype=dout.dtype, device=dout.device)
    tensors = (gate_up, dout, out, dgate_up)
    call = abi.SwiGluBackward(*(t.data_ptr() for t in tensors), *dout.shape, abi.DTYPE_CODES[dout.dtype])
    _library().ladder_swiglu_backward(ctypes.byref(call), torch.get_num_threads())
    return out, dgate_up


def side_layer(state: Tensor, weights: SideLayerWeights, call: SideLayerCall) -> Tensor:
    """`plain_side_layer` of a few rows, checked: weights are rounded as they are read, sums are in fp32."""
    (tokens, width), (heads, kv_heads, head_dim, _, epsilon) = state.shape, call.shape
    inner, dtype = weights.mlp_out.shape[1], state.dtype
    rotated = torch.empty(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=state.device)
    out = torch.empty(tokens, width, dtype=dtype, device=state.device)
    arguments = abi.SideLayer(
        state.data_ptr(),
        None,
        call.cos.data_ptr(),
        call.sin.data_ptr(),
        tuple(weight.data_ptr() for weight in weights),
        rotated.data_ptr(),
        tokens,
        width,
        inner,
        heads,
        kv_heads,
        head_dim,
        epsilon,
        abi.DTYPE_CODES[dtype],
        weights.qkv.dtype != dtype,
    )
    threads = torch.get_num_threads()
    _library().ladder_side_layer(ctypes.byref(arguments), threads)
    mixed = call.attention(*rotated.split((heads, kv_heads, kv_heads), dim=1)).contiguous()
    arguments.mixed, arguments.out = mixed.data_ptr(), out.data_ptr()
    _library().ladder_side_layer(ctypes.byref(arguments), threads)
    return out


def decoder_structure(weights: DecoderWeights) -> abi.DecoderBlock:
    """Where the checked weights of a decoder block are now."""
    linears = (
        abi.DecoderLinear(_view(weight.tensors), _address(bias), *weight.shape) for weight, bias in weights.linears
    )
    return abi.DecoderBlock(*linears, *(_address(norm) for norm in weights.norms))


def decoder_heads(
    block: abi.DecoderBlock, hidden: Tensor, cos: Tensor, sin: Tensor, epsilon: float, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [T, Hq, d], key and value [T, Hkv, d] of few rows [T, D], checked: query and key normed and rotated."""
    (tokens, size), dtype, device = cos.shape, hidden.dtype, hidden.device
    heads, kv_heads = block.query.rows // size, block.key.rows // size
    query, key, value = (
        torch.empty(tokens, count, size, dtype=dtype, device=device) for count in (heads, kv_heads, kv_heads)
    )
    tensors = (hidden, cos, sin, None, query, key, value, None)
    rows = abi.DecoderRows(*map(_address, tensors), None, tokens, size, epsilon, abi.DTYPE_CODES[dtype])
    _run_decoder(_library().ladder_decoder_heads, block, rows, workspace)
    return query, key, value


def decoder_mlp(block: abi.DecoderBlock, mixed: Tensor, hidden: Tensor, epsilon: float, workspace: Workspace) -> Tensor:
    """The block's output [T, D] from the result of its attention [T, Hq d] and its input, contiguous and checked."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    tensors = (hidden, None, None, mixed, None, None, None, out)
    rows = abi.DecoderRows(*map(_address, tensors), None, hidden.shape[0], 0, epsilon, abi.DTYPE_CODES[hidden.dtype])
    _run_decoder(_library().ladder_decoder_mlp, block, rows, workspace)
    return out


def _run_decoder(
    function: Callable[..., None], block: abi.DecoderBlock, rows: abi.DecoderRows, workspace: Workspace
) -> None:
    arguments = ctypes.byref(block), ctypes.byref(rows)
    # Of the name that nf4_linear uses: both are scratch of a block's products, which run one after the other.
    size = _library().ladder_decoder_scratch(*arguments)
    rows.scratch = workspace.take("nf4_linear", (size,), torch.uint8).data_ptr()
    function(*arguments, torch.get_num_threads())


def quantize_nf4(weight: Tensor, thresholds: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`reference.quantize_nf4` for a checked, contiguous CPU tensor."""
    count = weight.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=weight.device)
    _library().ladder_quantize_nf4(
        weight.data_ptr(),
        abi.DTYPE_CODES[weight.dtype],
        thresholds.data_ptr(),
        count,
        block_size,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    return packed, absmax


def _view(nf4: NF4Tensors) -> abi.NF4View:
    packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, block_size = nf4
    return abi.NF4View(
        packed.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        _address(absmax_scale),
        _address(absmax_map),
        _address(absmax_offset),
        block_size,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _library() -> ctypes.CDLL:
    library = _load().library
    if library is None:
        raise RuntimeError("the native library is absent: ask available() first")
    return library


@functools.cache
def _load() -> _Loaded:
    override = os.environ.get("LADDER_NATIVE_LIB")
    # An editable install adds a folder to __path__ and puts the library there, not beside this file.
    candidates = [Path(override)] if override else [Path(entry) / LIBRARY_NAME for entry in _package_path()]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        places = ", ".join(str(candidate) for candidate in candidates)
        source = "LADDER_NATIVE_LIB names a file that does not exist" if override else "it was not built"
        hint = "unset the variable" if override else "reinstall with `pip install -v .` to see CMake's output"
        ignored = "; LADDER_CPU_ISA has no effect without it" if "LADDER_CPU_ISA" in os.environ else ""
        return _Loaded(None, None, f"no native library, {source} (looked for {places}): {hint}{ignored}")
    try:
        library = ctypes.CDLL(str(path))
        library.ladder_abi_version.restype = ctypes.c_int32
        version = library.ladder_abi_version()
    except (OSError, AttributeError) as error:
        return _Loaded(None, None, f"the native library {path} does not load: {error}")
    if version != abi.ABI_VERSION:
        reason = (
            f"the native library {path} has ABI version {version}, expected {abi.ABI_VERSION}: reinstall the package"
        )
        return _Loaded(None, None, reason)
    for name, (argtypes, restype) in abi.SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            return _Loaded(None, None, f"the native library {path} lacks {name}: reinstall the package")
        function.argtypes, function.restype = argtypes, restype
    isa = os.environ.get("LADDER_CPU_ISA", "")
    if library.ladder_select_isa(isa.encode()) != 0:
        offered = ", ".join(name for name in ISAS if library.ladder_isa_available(name.encode()))
        raise ValueError(f"LADDER_CPU_ISA: expected one of the sets available here ({offered}), got {isa!r}; unset it")
    return _Loaded(library, path, f"loaded {path}")


@functools.cache
def _warn_absent(reason: str) -> None:
    message = f"ladder_kernels: {reason}. CPU kernels run in plain torch, slower; see `ladder info`."
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _package_path() -> list[str]:
    return list(sys.modules["ladder_kernels"].__path__)
