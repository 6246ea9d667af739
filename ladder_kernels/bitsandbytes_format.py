"""NF4 matrices as bitsandbytes writes them into safetensors files. No import of bitsandbytes.

For a parameter `name`: `name` (packed codes, uint8 [n, 1] or the same bytes in another dtype), `name.absmax`,
`name.quant_map`, `name.quant_state.bitsandbytes__nf4` (a JSON object as bytes) and, with double quantization,
`name.nested_absmax` and `name.nested_quant_map`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.reference import ABSMAX_BLOCK

_STATE = "quant_state.bitsandbytes__"


def read_bitsandbytes(tensors: Mapping[str, Tensor], name: str) -> NF4Weight:
    """See `NF4Weight.from_bitsandbytes`."""
    state = _read_state(tensors, name)
    nested = f"{name}.nested_absmax" in tensors
    packed = _get(tensors, name).contiguous().view(torch.uint8).view(-1)
    shape = _read_shape(state, name)
    expected = (shape[0] * shape[1] + 1) // 2
    if packed.numel() != expected:
        got = packed.numel()
        raise ValueError(f"{name}: expected {expected} bytes of packed codes for shape {list(shape)}, got {got}")
    optional: dict[str, Tensor] = {}
    if nested:
        if state.get("nested_blocksize") != ABSMAX_BLOCK:
            got = state.get("nested_blocksize")
            raise ValueError(f"{name}: expected nested_blocksize {ABSMAX_BLOCK} in its quant_state, got {got!r}")
        offset = state.get("nested_offset")
        if not isinstance(offset, (int, float)):
            raise ValueError(f"{name}: expected a number as nested_offset in its quant_state, got {offset!r}")
        optional = {
            "absmax_scale": _get(tensors, f"{name}.nested_absmax"),
            "absmax_map": _get(tensors, f"{name}.nested_quant_map"),
            "absmax_offset": torch.tensor(offset, dtype=torch.float32, device=packed.device),
        }
    try:
        weight = NF4Weight(
            packed=packed,
            absmax=_get(tensors, f"{name}.absmax"),
            codebook=_get(tensors, f"{name}.quant_map"),
            shape=shape,
            dtype=_read_dtype(state, name),
            block_size=state.get("blocksize", 0),
            **optional,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    weight.check_finite(name)
    return weight


def write_bitsandbytes(weight: NF4Weight, name: str) -> dict[str, Tensor]:
    """See `NF4Weight.to_bitsandbytes`."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {name: weight.packed.view(-1, 1), f"{name}.absmax": weight.absmax, f"{name}.quant_map": weight.codebook}
    if weight.absmax_scale is not None and weight.absmax_map is not None and weight.absmax_offset is not None:
        tensors[f"{name}.nested_absmax"] = weight.absmax_scale
        tensors[f"{name}.nested_quant_map"] = weight.absmax_map
        state |= {
            "nested_blocksize": ABSMAX_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": weight.absmax_offset.item(),
        }
    tensors[f"{name}.{_STATE}nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def _get(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{key}: expected this tensor of a bitsandbytes NF4 weight, got none; the file is incomplete")
    return tensors[key]


def _read_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    other = f"{name}.{_STATE}fp4"
    if other in tensors:
        raise ValueError(f"{other}: expected quant_type 'nf4', got 'fp4'; quantize the checkpoint to NF4 instead")
    key = f"{name}.{_STATE}nf4"
    try:
        state = json.loads(bytes(_get(tensors, key).tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{key}: expected the bytes of a JSON object, got something else ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{key}: expected a JSON object, got {type(state).__name__}")
    if state.get("quant_type") != "nf4":
        raise ValueError(f"{key}: expected quant_type 'nf4', got {state.get('quant_type')!r}")
    return state


def _read_shape(state: Mapping[str, Any], name: str) -> tuple[int, int]:
    shape = state.get("shape")
    is_matrix = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    if not is_matrix:
        raise ValueError(f"{name}: expected a shape [N, K] in its quant_state, got {shape!r}")
    return shape[0], shape[1]


def _read_dtype(state: Mapping[str, Any], name: str) -> torch.dtype:
    dtype = getattr(torch, str(state.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point dtype in its quant_state, got {state.get('dtype')!r}")
    return dtype
