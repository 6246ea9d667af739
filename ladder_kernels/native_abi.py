"""What `csrc/` exports, as ctypes sees it: version, signatures and the structures of csrc/kernels.h.

A change of any of it raises ABI_VERSION here and in csrc, so that a library of another version is refused.
"""

from __future__ import annotations

import ctypes

import torch

ABI_VERSION = 6
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NORM_BLOCK = 16  # kNormBlock of csrc/kernels.h
IN_FLOAT32_CODES = {torch.bfloat16: 3, torch.float16: 4}

_pointer, _int64, _int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "ladder_isa": ([], ctypes.c_char_p),
    "ladder_isa_available": ([ctypes.c_char_p], _int32),
    "ladder_select_isa": ([ctypes.c_char_p], _int32),
    "ladder_dequantize_nf4": ([_pointer, _int64, _int64, _int32, _pointer, _int32], None),
    "ladder_quantize_nf4": ([_pointer, _int32, _pointer, _int64, _int64, _pointer, _pointer, _int32], None),
    "ladder_nf4_linear": ([_pointer, _pointer, _int32], None),
    "ladder_cross_entropy": ([_pointer, _int32], None),
    "ladder_rms_norm": ([_pointer, _int32], None),
    "ladder_rotary": ([_pointer, _int32], None),
    "ladder_swiglu": ([_pointer, _int32], None),
    "ladder_rms_norm_backward": ([_pointer, _int32], None),
    "ladder_swiglu_backward": ([_pointer, _int32], None),
    "ladder_side_layer": ([_pointer, _int32], None),
    "ladder_decoder_scratch": ([_pointer, _pointer], _int64),
    "ladder_decoder_heads": ([_pointer, _pointer, _int32], None),
    "ladder_decoder_mlp": ([_pointer, _pointer, _int32], None),
}


class NF4View(ctypes.Structure):
    """`ladder::NF4View` of csrc/kernels.h."""

    _fields_ = [
        ("packed", _pointer),
        ("absmax", _pointer),
        ("codebook", _pointer),
        ("absmax_scale", _pointer),
        ("absmax_map", _pointer),
        ("absmax_offset", _pointer),
        ("block_size", _int64),
    ]


class Product(ctypes.Structure):
    """`ladder::Product` of csrc/kernels.h."""

    _fields_ = [
        ("x", _pointer),
        ("bias", _pointer),
        ("residual", _pointer),
        ("out", _pointer),
        ("arranged", _pointer),
        ("tokens", _int64),
        ("rows", _int64),
        ("cols", _int64),
        ("dtype", _int32),
    ]


class CrossEntropy(ctypes.Structure):
    """`ladder::CrossEntropy` of csrc/kernels.h."""

    _fields_ = [
        ("logits", _pointer),
        ("targets", _pointer),
        ("losses", _pointer),
        ("rows", _int64),
        ("vocabulary", _int64),
        ("ignored_target", _int64),
        ("dtype", _int32),
        ("writes_gradient", _int32),
    ]


class RmsNorm(ctypes.Structure):
    """`ladder::RmsNorm` of csrc/kernels.h."""

    _fields_ = [
        ("x", _pointer),
        ("weight", _pointer),
        ("out", _pointer),
        ("rows", _int64),
        ("width", _int64),
        ("x_stride", _int64),
        ("epsilon", ctypes.c_float),
        ("dtype", _int32),
    ]


class RmsNormBackward(ctypes.Structure):
    """`ladder::RmsNormBackward` of csrc/kernels.h."""

    _fields_ = [
        ("dout", _pointer),
        ("x", _pointer),
        ("weight", _pointer),
        ("residual", _pointer),
        ("dx", _pointer),
        ("dweight", _pointer),
        ("rows", _int64),
        ("width", _int64),
        ("epsilon", ctypes.c_float),
        ("dtype", _int32),
    ]


class Rotary(ctypes.Structure):
    """`ladder::Rotary` of csrc/kernels.h."""

    _fields_ = [
        ("x", _pointer),
        ("cos", _pointer),
        ("sin", _pointer),
        ("out", _pointer),
        ("tokens", _int64),
        ("heads", _int64),
        ("head_dim", _int64),
        ("x_stride", _int64),
        ("out_stride", _int64),
        ("dtype", _int32),
        ("is_backward", _int32),
    ]


class SwiGlu(ctypes.Structure):
    """`ladder::SwiGlu` of csrc/kernels.h."""

    _fields_ = [
        ("gate", _pointer),
        ("up", _pointer),
        ("out", _pointer),
        ("rows", _int64),
        ("width", _int64),
        ("gate_stride", _int64),
        ("up_stride", _int64),
        ("dtype", _int32),
    ]


class SwiGluBackward(ctypes.Structure):
    """`ladder::SwiGluBackward` of csrc/kernels.h."""

    _fields_ = [
        ("gate_up", _pointer),
        ("dout", _pointer),
        ("activation", _pointer),
        ("dgate_up", _pointer),
        ("rows", _int64),
        ("width", _int64),
        ("dtype", _int32),
    ]


class SideLayer(ctypes.Structure):
    """`ladder::SideLayer` of csrc/kernels.h."""

    _fields_ = [
        ("state", _pointer),
        ("mixed", _pointer),
        ("cos", _pointer),
        ("sin", _pointer),
        ("weights", 6 * _pointer),
        ("out", _pointer),
        ("rows", _int64),
        ("width", _int64),
        ("inner", _int64),
        ("heads", _int64),
        ("kv_heads", _int64),
        ("head_dim", _int64),
        ("epsilon", ctypes.c_float),
        ("dtype", _int32),
        ("wide_weights", _int32),
    ]


class DecoderLinear(ctypes.Structure):
    """`ladder::DecoderLinear` of csrc/kernels.h."""

    _fields_ = [("weight", NF4View), ("bias", _pointer), ("rows", _int64), ("cols", _int64)]


class DecoderBlock(ctypes.Structure):
    """`ladder::DecoderBlock` of csrc/kernels.h."""

    _fields_ = [
        *((name, DecoderLinear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _pointer) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
    ]


class DecoderRows(ctypes.Structure):
    """`ladder::DecoderRows` of csrc/kernels.h."""

    _fields_ = [
        ("hidden", _pointer),
        ("cos", _pointer),
        ("sin", _pointer),
        ("mixed", _pointer),
        ("query", _pointer),
        ("key", _pointer),
        ("value", _pointer),
        ("out", _pointer),
        ("scratch", _pointer),
        ("tokens", _int64),
        ("head_dim", _int64),
        ("epsilon", ctypes.c_float),
        ("dtype", _int32),
    ]
