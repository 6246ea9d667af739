"""Kernels of Ladder training: tensors in, tensors out, no model and no trainer.

Dimension letters, the same in every file: T tokens (rows), M rows of a matrix product, N output features, K input
features, D hidden width of the backbone, S width of the side network, F inner width of its MLP, R supervised rows,
V vocabulary.
"""

from __future__ import annotations

from ladder_kernels.attention import attention
from ladder_kernels.decoder_block import DecoderWeights, PackedDecoderBlock, PackedLinear
from ladder_kernels.elementwise import rms_norm, rotary, swiglu, swiglu_
from ladder_kernels.embedding import embedding_rows
from ladder_kernels.frozen_linear import frozen_linear
from ladder_kernels.frozen_norm import frozen_rms_norm
from ladder_kernels.head import HeadWeight, decode_head, head_logits
from ladder_kernels.int8 import Int8Weight, quantize_int8
from ladder_kernels.linear_cross_entropy import linear_cross_entropy
from ladder_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from ladder_kernels.nf4_linear import nf4_linear, nf4_swiglu
from ladder_kernels.side_layer import SideLayerWeights, side_layer
from ladder_kernels.tap import tap
from ladder_kernels.workspace import Workspace

__all__ = [
    "DecoderWeights",
    "HeadWeight",
    "Int8Weight",
    "NF4Weight",
    "PackedDecoderBlock",
    "PackedLinear",
    "SideLayerWeights",
    "Workspace",
    "attention",
    "decode_head",
    "dequantize_nf4",
    "embedding_rows",
    "frozen_linear",
    "frozen_rms_norm",
    "head_logits",
    "linear_cross_entropy",
    "nf4_linear",
    "nf4_swiglu",
    "quantize_int8",
    "quantize_nf4",
    "rms_norm",
    "rotary",
    "side_layer",
    "swiglu",
    "swiglu_",
    "tap",
]
