"""The tap: projection and merge in one read of h, and its gradients; formulas in `ladder_kernels.tap`.

Forward, one launch, and one that rounds a wider weight where many tokens read it. Thread blocks that share rows of h
run next to each other, so the others find in the cache what the first one read; an int8 copy is made from the tiles
that are multiplied anyway, each group of 64 columns by one of these blocks.

Backward, at most four launches: dweight (with a second one to add up its parts where tokens are split for more thread
blocks), dstate, and the sum of the gate's parts. Every sum has a fixed order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.gpu.launcher import launch
from ladder_kernels.gpu.spec import POINTERS, KernelSpec
from ladder_kernels.gpu.tap_tiles import (
    ELEMENTS,
    FEW_TOKENS,
    MANY_TOKENS,
    ForwardTile,
    GradientTile,
    Parts,
    forward_tile,
    gradient_parts,
    gradient_tile,
)
from ladder_kernels.reference import INT8_GROUP

_GROUP = tl.constexpr(INT8_GROUP)
# Adding 1.5 * 2^23 rounds an fp32 number to an integer, half to even, and leaves it in the low byte.
_ROUNDING = tl.constexpr(12582912.0)
_SMALLEST_ABSMAX = tl.constexpr(1e-36)
_PER_CODE = tl.constexpr(1 / 127)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["T"])
def _tap_fwd_kernel(
    h_ptr, weight_ptr, state_ptr, gate_ptr, out_ptr, codes_ptr, scales_ptr, T, S, D, h_stride, state_stride,
    HAS_STATE: tl.constexpr, HAS_GATE: tl.constexpr, KEEP_INT8: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    side = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    tokens = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    in_tokens, in_side = (tokens < T)[:, None], side < S
    columns = tl.arange(0, BLOCK_D)
    h_rows = h_ptr + tokens[:, None] * h_stride
    weight_rows = weight_ptr + side.to(tl.int64)[:, None] * D
    z = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for begin in range(0, D, BLOCK_D):
        in_width = (begin + columns < D)[None, :]
        h = tl.load(h_rows + (begin + columns)[None, :], mask=in_tokens & in_width, other=0.0)
        weight = tl.load(weight_rows + (begin + columns)[None, :], mask=in_side[:, None] & in_width, other=0.0)
        z = tl.dot(h, weight.to(h.dtype).T, z, input_precision="ieee")
        if KEEP_INT8:
            tl.static_assert(BLOCK_D == _GROUP)
            group = begin // BLOCK_D
            if group % tl.num_programs(0) == tl.program_id(0):
                wide = h.to(tl.float32)
                absmax = tl.max(tl.abs(wide), axis=1)
                inverse = tl.where(absmax > _SMALLEST_ABSMAX, tl.div_rn(127.0, absmax), 0.0)
                rounded = wide * inverse[:, None] + _ROUNDING
                codes = rounded.to(tl.int32, bitcast=True).to(tl.int8)
                codes_rows = codes_ptr + tokens[:, None] * D
                tl.store(codes_rows + (begin + columns)[None, :], codes, mask=in_tokens & in_width)
                scales = scales_ptr + tokens * tl.cdiv(D, BLOCK_D) + group
                tl.store(scales, absmax * _PER_CODE, mask=tokens < T)
    mask = in_tokens & in_side[None, :]
    if HAS_STATE:
        state = tl.load(state_ptr + tokens[:, None] * state_stride + side[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(gate_ptr).to(tl.float32)
            z = gate * state + (1.0 - gate) * z
        else:
            z = state + z
    tl.store(out_ptr + tokens[:, None] * S + side[None, :], z.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["dgate_ptr"])
def _tap_bwd_dw_kernel(
    dout_ptr, kept_ptr, scales_ptr, weight_ptr, gate_ptr, dweight_ptr, dgate_ptr, T, S, D, kept_stride, part_tokens,
    HAS_GATE: tl.constexpr, NEEDS_GATE: tl.constexpr, IS_INT8: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dout^T @ h of one tile; of parts of the tokens, which `_tap_bwd_dw_sum_kernel` adds up and finishes, as fp32."""
    columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    side = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_width, in_side = columns < D, (side < S)[:, None]
    first = tl.program_id(2) * part_tokens
    count = tl.minimum(T - first, part_tokens)
    # Inside a tile 32 bits are enough; what moves along with the tokens are the bases.
    tokens = tl.arange(0, BLOCK_T)
    dout_ptr += first.to(tl.int64) * S
    kept_ptr += first.to(tl.int64) * kept_stride
    groups = tl.cdiv(D, _GROUP)
    if IS_INT8:
        tl.static_assert(_GROUP % BLOCK_D == 0)
        scales_ptr += first.to(tl.int64) * groups + tl.program_id(0) * BLOCK_D // _GROUP
    dweight = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for begin in range(0, count, BLOCK_T):
        in_tokens = begin + tokens < count
        dout = tl.load(dout_ptr + tokens[None, :] * S + side[:, None], mask=in_tokens[None, :] & in_side, other=0.0)
        h = tl.load(kept_ptr + tokens[:, None] * kept_stride + columns, mask=in_tokens[:, None] & in_width, other=0)
        if IS_INT8:
            scales = tl.load(scales_ptr + tokens * groups, mask=in_tokens, other=0.0)
            h = (h.to(tl.float32) * scales[:, None]).to(dout.dtype)
            scales_ptr += BLOCK_T * groups
        dweight = tl.dot(dout, h, dweight, input_precision="ieee")
        dout_ptr += BLOCK_T * S
        kept_ptr += BLOCK_T * kept_stride
    first_row = (tl.program_id(1) * BLOCK_S).to(tl.int64)
    offsets = tl.arange(0, BLOCK_S)[:, None] * D + columns
    mask = in_side & in_width
    out = dweight
    if HAS_GATE:
        out = dweight * (1.0 - tl.load(gate_ptr).to(tl.float32))
    part_row = first_row + tl.program_id(2).to(tl.int64) * S
    tl.store(dweight_ptr + part_row * D + offsets, out.to(dweight_ptr.dtype.element_ty), mask=mask)
    if NEEDS_GATE:
        weight = tl.load(weight_ptr + first_row * D + offsets, mask=mask, other=0.0).to(dout_ptr.dtype.element_ty)
        product = tl.sum(dweight * weight.to(tl.float32))
        tl.store(dgate_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), -product)


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["dgate_ptr"])
def _tap_bwd_dw_sum_kernel(
    parts_ptr, weight_ptr, gate_ptr, dweight_ptr, dgate_ptr, count, parts,
    HAS_GATE: tl.constexpr, NEEDS_GATE: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The end of `_tap_bwd_dw_kernel` for tokens in parts; ROUNDED is the type in which the weight was multiplied."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    dweight = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        dweight += tl.load(parts_ptr + offsets, mask=mask, other=0.0)
        parts_ptr += count
    if NEEDS_GATE:
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(ROUNDED).to(tl.float32)
        tl.store(dgate_ptr + tl.program_id(0), -tl.sum(dweight * weight, axis=0))
    if HAS_GATE:
        dweight = dweight * (1.0 - tl.load(gate_ptr).to(tl.float32))
    tl.store(dweight_ptr + offsets, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tap_bwd_dstate_kernel(
    dout_ptr, state_ptr, gate_ptr, dstate_ptr, dgate_ptr, count,
    NEEDS_STATE: tl.constexpr, NEEDS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gate * dout, and the part of sum(dout * state) of each thread block."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    dout = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if NEEDS_STATE:
        gate = tl.load(gate_ptr).to(tl.float32)
        tl.store(dstate_ptr + offsets, (gate * dout).to(dstate_ptr.dtype.element_ty), mask=mask)
    if NEEDS_GATE:
        state = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + tl.program_id(0), tl.sum(dout * state, axis=0))


class Gradients(NamedTuple):
    """What was asked for, else None: dweight as the weight, dstate as the state, dgate as the gate."""

    dweight: Tensor | None
    dstate: Tensor | None
    dgate: Tensor | None


def tap(
    h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None, keep_int8: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`reference.tap`, rounded once, and with keep_int8 the codes and scales of `reference.encode_hidden`.

    Args:
        h: [T, D], weight: [S, D], neither of them empty.

    Returns:
        out [T, S] in h.dtype, codes int8 [T, D], scales fp32 [T, ceil(D / INT8_GROUP)].
    """
    (tokens, width), side = h.shape, weight.shape[0]
    if tokens > FEW_TOKENS:
        # Many tokens read the weight so often that this pass is earned back; for few the kernel rounds it.
        weight = weight.to(h.dtype)
    h, weight = _with_rows(h), weight.contiguous()
    state = None if state is None else _with_rows(state)
    out = torch.empty(tokens, side, dtype=h.dtype, device=h.device)
    codes = scales = None
    if keep_int8:
        codes = torch.empty(tokens, width, dtype=torch.int8, device=h.device)
        scales = torch.empty(tokens, triton.cdiv(width, INT8_GROUP), dtype=torch.float32, device=h.device)
    tile = forward_tile(tokens, h.itemsize, keep_int8)
    launch(
        _tap_fwd_kernel, (triton.cdiv(side, tile.side), triton.cdiv(tokens, tile.tokens)),
        h, weight, state, gate, out, codes, scales, tokens, side, width, h.stride(0),
        0 if state is None else state.stride(0),
        HAS_STATE=state is not None, HAS_GATE=gate is not None, KEEP_INT8=keep_int8,
        BLOCK_T=tile.tokens, BLOCK_S=tile.side, BLOCK_D=tile.width,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out, codes, scales


def tap_gradients(
    dout: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    weight: Tensor,
    state: Tensor | None,
    gate: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of `tap` from what was kept: h, or its codes and scales.

    Args:
        dout: [T, S] in h.dtype.
        kept: h [T, D], or its codes int8 [T, D] with their scales.
        weight: [S, D]; none of the three is empty.
        state: where the gate needs a gradient.
        needs: whether weight, state and gate need theirs.
    """
    needs_weight, needs_state, needs_gate = needs
    dout, weight = dout.contiguous(), weight.contiguous()
    tile = gradient_tile(dout.itemsize, scales is not None)
    parts = gradient_parts(*dout.shape, weight.shape[1], tile)
    products = of_state = of_weight = None
    if needs_gate:
        tiles = triton.cdiv(weight.shape[0], tile.side) * triton.cdiv(weight.shape[1], tile.width)
        counts = _blocks(dout), tiles if parts.count == 1 else _blocks(weight)
        products = torch.empty(sum(counts), dtype=torch.float32, device=dout.device)
        of_state, of_weight = products.split(counts)
    dweight, dstate = None, dout if needs_state else None
    if gate is not None and (needs_state or needs_gate):
        dstate = _state_gradient(dout, state, gate, needs_state, of_state)
    if needs_weight or needs_gate:
        dweight = _weight_gradient(tile, parts, dout, _with_rows(kept), scales, weight, gate, of_weight)
    return Gradients(
        dweight if needs_weight else None,
        dstate,
        None if products is None or gate is None else products.sum().to(gate.dtype),
    )


def _state_gradient(
    dout: Tensor, state: Tensor | None, gate: Tensor, needs_state: bool, products: Tensor | None
) -> Tensor | None:
    dstate = torch.empty_like(dout) if needs_state else None
    launch(
        _tap_bwd_dstate_kernel, (_blocks(dout),),
        dout, None if state is None else state.contiguous(), gate, dstate, products, dout.numel(),
        NEEDS_STATE=needs_state, NEEDS_GATE=products is not None,
        BLOCK=ELEMENTS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return dstate


def _weight_gradient(
    tile: GradientTile,
    parts: Parts,
    dout: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    weight: Tensor,
    gate: Tensor | None,
    products: Tensor | None,
) -> Tensor:
    (tokens, side), width = dout.shape, weight.shape[1]
    dweight = target = torch.empty_like(weight)
    is_part = parts.count > 1
    if is_part:
        target = torch.empty(parts.count, side, width, dtype=torch.float32, device=dout.device)
    flags = {"HAS_GATE": gate is not None, "NEEDS_GATE": products is not None}
    launch(
        _tap_bwd_dw_kernel, (triton.cdiv(width, tile.width), triton.cdiv(side, tile.side), parts.count),
        dout, kept, scales, None if is_part else weight, None if is_part else gate, target,
        None if is_part else products, tokens, side, width, kept.stride(0), parts.tokens,
        HAS_GATE=flags["HAS_GATE"] and not is_part, NEEDS_GATE=flags["NEEDS_GATE"] and not is_part,
        IS_INT8=scales is not None, BLOCK_T=tile.tokens, BLOCK_S=tile.side, BLOCK_D=tile.width,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if is_part:
        launch(
            _tap_bwd_dw_sum_kernel, (_blocks(weight),),
            target, weight, gate, dweight, products, weight.numel(), parts.count, **flags,
            ROUNDED=_TYPES[dout.dtype], BLOCK=ELEMENTS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dweight


def _blocks(tensor: Tensor) -> int:
    return triton.cdiv(tensor.numel(), ELEMENTS)


def _with_rows(matrix: Tensor) -> Tensor:
    """The matrix, copied unless its rows are contiguous."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def specs() -> Iterator[KernelSpec]:
    """Every tile with the most that it can have to do: state and gate. Less of an epilogue is the same loop."""
    for dtype, pointer in POINTERS.items():
        for tokens, keep_int8 in ((1, False), (64, False), (64, True), (MANY_TOKENS, False), (MANY_TOKENS, True)):
            tile = forward_tile(tokens, dtype.itemsize, keep_int8)
            for weight in {pointer: None, "*fp32": None} if tokens <= FEW_TOKENS else (pointer,):
                if dtype != torch.float32 or tokens == 64:
                    yield _forward_spec(tile, pointer, weight, keep_int8)
        for weight, is_int8 in itertools.product({pointer: None, "*fp32": None}, (False, True)):
            yield _gradient_spec(gradient_tile(dtype.itemsize, is_int8), pointer, weight, is_int8, is_part=False)
        for is_int8 in (False, True):
            yield _gradient_spec(gradient_tile(dtype.itemsize, is_int8), pointer, pointer, is_int8, is_part=True)
        for weight in {pointer: None, "*fp32": None}:
            constants = {"HAS_GATE": True, "NEEDS_GATE": True, "ROUNDED": _TYPES[dtype], "BLOCK": ELEMENTS}
            types = {"parts_ptr": "*fp32", "weight_ptr": weight, "dweight_ptr": weight}
            yield _spec(_tap_bwd_dw_sum_kernel, f"{pointer[1:]}.weight_{weight[1:]}", pointer, types, constants)
        constants = {"NEEDS_STATE": True, "NEEDS_GATE": True, "BLOCK": ELEMENTS}
        yield _spec(_tap_bwd_dstate_kernel, pointer[1:], pointer, {}, constants)


def _forward_spec(tile: ForwardTile, pointer: str, weight: str, keep_int8: bool) -> KernelSpec:
    constants: dict[str, Any] = {"HAS_STATE": True, "HAS_GATE": True, "KEEP_INT8": keep_int8}
    constants |= {"BLOCK_T": tile.tokens, "BLOCK_S": tile.side, "BLOCK_D": tile.width}
    if not keep_int8:
        constants |= {"codes_ptr": None, "scales_ptr": None}
    sizes = f"{tile.tokens}x{tile.side}x{tile.width}"
    configuration = f"{pointer[1:]}.weight_{weight[1:]}.{sizes}" + (".int8" if keep_int8 else "")
    types = {"weight_ptr": weight, "codes_ptr": "*i8"}
    return _spec(_tap_fwd_kernel, configuration, pointer, types, constants, tile.num_warps, tile.num_stages)


def _gradient_spec(tile: GradientTile, pointer: str, weight: str, is_int8: bool, is_part: bool) -> KernelSpec:
    constants: dict[str, Any] = {"HAS_GATE": not is_part, "NEEDS_GATE": not is_part, "IS_INT8": is_int8}
    constants |= {"BLOCK_T": tile.tokens, "BLOCK_S": tile.side, "BLOCK_D": tile.width}
    if is_part:
        constants |= {"weight_ptr": None, "gate_ptr": None, "dgate_ptr": None}
    if not is_int8:
        constants["scales_ptr"] = None
    configuration = f"{pointer[1:]}.{'part' if is_part else 'weight_' + weight[1:]}" + (".int8" if is_int8 else "")
    types = {"kept_ptr": "*i8" if is_int8 else pointer, "weight_ptr": weight}
    types["dweight_ptr"] = "*fp32" if is_part else weight
    return _spec(_tap_bwd_dw_kernel, configuration, pointer, types, constants, tile.num_warps, tile.num_stages)


def _spec(
    kernel: Any,
    configuration: str,
    pointer: str,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
) -> KernelSpec:
    """types: of the arguments that are neither `pointer`, nor fp32 scales, gate and its gradient, nor an i32."""
    known = {"gate_ptr": "*fp32", "dgate_ptr": "*fp32", "scales_ptr": "*fp32"} | types
    arguments = [name for name in kernel.arg_names if name not in constants]
    divisible = ("S", "D", "h_stride", "state_stride", "kept_stride", "part_tokens", "count")
    return KernelSpec(
        name=f"tap.{kernel.__name__}.{configuration}",
        kernel=kernel,
        types={name: known.get(name, pointer if name.endswith("_ptr") else "i32") for name in arguments},
        constants=constants,
        divisible=tuple(name for name in divisible if name in arguments),
        num_warps=num_warps,
        num_stages=num_stages,
        uses_tensor_cores=kernel in (_tap_fwd_kernel, _tap_bwd_dw_kernel) and pointer != "*fp32",
    )
