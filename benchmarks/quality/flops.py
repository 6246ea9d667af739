"""Floating-point operations of a training step, counted by torch's FlopCounterMode.

Our ops are ops of torch.library, which the counter does not look into: their formulas are registered here, as are those
of attention on a CPU, which torch leaves out. Attention is counted with all scores, as torch counts it, though a causal
one needs half; the same function computes it on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from ladder_kernels import linear_cross_entropy, nf4_linear, tap

_OURS = torch.ops.ladder
_ATEN = torch.ops.aten
_DEFINES_THE_OPS = (linear_cross_entropy, nf4_linear, tap)

Shape = Sequence[int]


def count_flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """FLOPs of forward and backward of one batch on the CPU; gradients are dropped.

    The optimizer's work is left out, as everywhere: it is some 10 operations for each trained parameter and step.
    """
    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    model.zero_grad()
    return counter.get_total_flops()


def _linear(x: Shape, bias: Shape | None, rows: int, *_: Any, **__: Any) -> int:
    """2 T K N."""
    return 2 * math.prod(x) * rows


def _tap(h: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """2 T D S; the backward of a tap is made of torch's own products."""
    return 2 * math.prod(h) * weight[0]


def _cross_entropy(
    hidden: Shape, head: Any, block_size: int, targets: Shape, logits: Shape, *rest: Any, **__: Any
) -> int:
    """2 R D V for the loss, and as much for its gradient where it is asked for."""
    needs_gradient = rest[-1]
    return (4 if needs_gradient else 2) * math.prod(hidden) * logits[-1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two products of queries [B, H, Tq, d] with keys [B, Hkv, Tk, d]: 4 B H Tq Tk d."""
    return 4 * math.prod(query) * key[-2]


def _attention_backward(dout: Shape, query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Five such products, the scores again among them."""
    return 10 * math.prod(query) * key[-2]


for _op, _formula in (
    (_OURS.nf4_linear, _linear),
    (_OURS.tap, _tap),
    (_OURS.linear_cross_entropy, _cross_entropy),
    (_ATEN._scaled_dot_product_flash_attention_for_cpu, _attention),
    (_ATEN._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward),
):
    if _op not in flop_registry:  # a later torch may bring its own
        register_flop_formula(_op)(_formula)
