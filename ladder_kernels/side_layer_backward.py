"""The backward pass of a side layer on a CPU, its formulas written out around native kernels.

Autograd through plain torch took three times as long as the matrix products and the attention in it (T = 512, S = 64,
two threads): each elementwise operation reads and writes all rows. Here every norm, rotation and SwiGLU is one pass in
either direction, and only the attention, which has several forms, is left to autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ladder_kernels import native

if TYPE_CHECKING:
    from ladder_kernels.side_layer import SideLayerCall, SideLayerWeights


def side_layer_backward(
    dout: Tensor, state: Tensor, weights: SideLayerWeights, call: SideLayerCall, needs_grad: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of state, in its dtype, and of the six weights, in theirs, None where not wanted.

    Args:
        dout: [T, S], T > 0, in state.dtype, as the rest checked by `ladder_kernels.side_layer`: no fp64.
        needs_grad: seven, of state and the weights.
    """
    shape, dtype = call.shape, state.dtype
    attention_norm, qkv, attention_out, mlp_norm, gate_up, mlp_out = (weight.to(dtype) for weight in weights)
    dout = dout.contiguous()

    normed_s = native.rms_norm(state, attention_norm, shape.epsilon)
    heads, mixed = _attention(F.linear(normed_s, qkv).unflatten(1, (-1, shape.head_dim)), call)
    rows = mixed.detach()
    u = F.linear(rows, attention_out).add_(state)
    normed_u = native.rms_norm(u, mlp_norm, shape.epsilon)
    activation, dgates = native.swiglu_backward(F.linear(normed_u, gate_up), dout @ mlp_out)
    du, dmlp_norm = native.rms_norm_backward(dgates @ gate_up, u, mlp_norm, shape.epsilon, dout)
    dheads = _heads_backward(torch.autograd.grad(mixed, heads, du @ attention_out), call)
    dstate, dattention_norm = native.rms_norm_backward(dheads @ qkv, state, attention_norm, shape.epsilon, du)

    factors = {1: (dheads, normed_s), 2: (du, rows), 4: (dgates, normed_u), 5: (dout, activation)}
    products = {i: (d.T @ x).to(weights[i].dtype) for i, (d, x) in factors.items() if needs_grad[1 + i]}
    norms = {0: dattention_norm.to(weights[0].dtype), 3: dmlp_norm.to(weights[3].dtype)}
    gradients = (dstate, *((products | norms).get(i) for i in range(len(weights))))
    return tuple(gradient if needs else None for gradient, needs in zip(gradients, needs_grad, strict=True))


def _attention(heads: Tensor, call: SideLayerCall) -> tuple[tuple[Tensor, ...], Tensor]:
    """Query, key and value, rotated from [T, Hq + 2 Hkv, d], and [T, Hq d] that autograd can take back to them."""
    count, kv_count = call.shape.heads, call.shape.kv_heads
    rotated = native.rotary(heads[:, : count + kv_count], call.cos, call.sin)
    inputs = (rotated[:, :count], rotated[:, count:], heads[:, count + kv_count :])
    query, key, value = (t.detach().requires_grad_() for t in inputs)
    with torch.enable_grad():
        return (query, key, value), call.attention(query, key, value)


def _heads_backward(gradients: tuple[Tensor, ...], call: SideLayerCall) -> Tensor:
    """[T, (Hq + 2 Hkv) d] from the gradients of the rotated query and key and of the value."""
    count, kv_count = call.shape.heads, call.shape.kv_heads
    dquery, dkey, dvalue = (t.contiguous() for t in gradients)
    dheads = torch.empty(dquery.shape[0], count + 2 * kv_count, call.shape.head_dim, dtype=dquery.dtype)
    native.rotary_backward(dquery, call.cos, call.sin, dheads[:, :count])
    native.rotary_backward(dkey, call.cos, call.sin, dheads[:, count : count + kv_count])
    dheads[:, count + kv_count :] = dvalue
    return dheads.flatten(1)
