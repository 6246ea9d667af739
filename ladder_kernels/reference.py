"""Plain-torch twin of every op: the truth for tests, the baseline for benchmarks, the fallback without a native kernel.

Signatures are those of the `torch.library` ops without their scratch, the tensors of an NF4 matrix as one value. Of
`linear_cross_entropy` the softmax is here; the products around it are the same for all. Arguments are taken as checked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ladder_kernels.nf4_tensors import NF4Tensors

IGNORE_INDEX = -100
ABSMAX_BLOCK = 256  # scales per block of double quantization
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

INT8_GROUP = 64  # columns of a hidden state that share a scale when it is kept as int8

_CHUNK = 1 << 20  # weights processed at a time, so that temporaries stay in the cache; a multiple of every block size
_SMALLEST_ABSMAX = 1e-38  # bitsandbytes' floor: an all-zero block divides by this
_GRADIENT_CHUNK_BYTES = 8 << 20
_SMALLEST_GROUP_ABSMAX = 1e-36  # below it 127 / absmax is no fp32 number: such a group is kept as zeros


def quantize_nf4(weight: Tensor, thresholds: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Encode a matrix: per block, absmax = max |w| and code = number of thresholds below w / absmax.

    As bitsandbytes 0.50.2 does on a CPU: full blocks multiply by the reciprocal of absmax, a partial last block divides
    by absmax; NaN counts every threshold; an odd count is padded with a zero.

    Args:
        weight: [N, K] fp32, bf16 or fp16, contiguous.
        thresholds: fp32 [15], ascending.

    Returns:
        packed uint8 [ceil(N*K/2)] and absmax fp32 [ceil(N*K/block_size)].
    """
    flat = weight.view(-1)
    count = flat.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=weight.device)
    full = count - count % block_size
    for begin in range(0, full, _CHUNK):
        end = min(begin + _CHUNK, full)
        blocks = flat[begin:end].float().view(-1, block_size)
        scale = blocks.abs().amax(dim=1)
        absmax[begin // block_size : end // block_size] = scale
        scaled = blocks * (1.0 / scale.clamp(min=_SMALLEST_ABSMAX))[:, None]
        _pack(torch.bucketize(scaled.view(-1), thresholds, out_int32=True), packed[begin // 2 : end // 2])
    if full < count:
        block = flat[full:].float()
        absmax[-1] = block.abs().amax().clamp(min=_SMALLEST_ABSMAX)
        scaled = F.pad(block / absmax[-1], (0, block.numel() % 2))
        _pack(torch.bucketize(scaled, thresholds, out_int32=True), packed[full // 2 :])
    return packed, absmax


def quantize_absmax(absmax: Tensor, absmax_map: Tensor, absmax_offset: Tensor) -> tuple[Tensor, Tensor]:
    """Encode fp32 scales to 8 bits: the second level of double quantization.

    As bitsandbytes 0.50.2 does on a CPU: v = (absmax - offset) / max |absmax - offset| in a block is rounded to one of
    65536 steps, and the step's value to the nearest entry of the map. NaN and a block of zeros become code 0.

    Args:
        absmax: fp32 [blocks].
        absmax_map: fp32 [256], ascending.
        absmax_offset: fp32 0-dim.

    Returns:
        codes uint8 [blocks] and their scale fp32 [ceil(blocks/256)].
    """
    count = absmax.numel()
    blocks = F.pad(absmax - absmax_offset, (0, -count % ABSMAX_BLOCK)).view(-1, ABSMAX_BLOCK)
    magnitude = blocks.abs()
    scale = torch.where(magnitude.isnan(), 0.0, magnitude).amax(dim=1)
    scaled = (blocks * (1.0 / scale)[:, None]).view(-1)[:count]
    invalid = scaled.isnan()
    steps = ((scaled.clamp(-1.0, 1.0) + 1.0) * 0.5 * 65535 + 0.5).masked_fill(invalid, 0.0).floor()
    midpoints = (absmax_map[:-1] + absmax_map[1:]) / 2
    if count > 65536:  # more scales than steps: search once per step and look up
        every_step = torch.arange(65536, dtype=torch.float32, device=absmax.device)
        codes = torch.bucketize(every_step / 65535 * 2 - 1, midpoints, out_int32=True)[steps.int()]
    else:
        codes = torch.bucketize(steps / 65535 * 2 - 1, midpoints, out_int32=True)
    return codes.masked_fill(invalid, 0).to(torch.uint8), scale


def dequantize_nf4(nf4: NF4Tensors, first_row: int, out: Tensor) -> None:
    """Decode rows [first_row, first_row + P) of a matrix into out [P, K]: codebook value * absmax, rounded once.

    With double quantization absmax = absmax_map[code] * absmax_scale[block // 256] + absmax_offset, the product rounded
    before the sum.
    """
    packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, block_size = nf4
    flat = out.view(-1)
    start = first_row * out.shape[1]
    for begin in range(0, flat.numel(), _CHUNK):
        target = flat[begin : begin + _CHUNK]
        first, end = start + begin, start + begin + target.numel()
        octets = packed[first // 2 : (end + 1) // 2]
        codes = torch.stack((octets >> 4, octets & 15), dim=1).view(-1)[first % 2 :][: target.numel()]
        first_block, end_block = first // block_size, -(-end // block_size)
        scale = absmax[first_block:end_block]
        if absmax_scale is not None and absmax_map is not None and absmax_offset is not None:
            index = torch.arange(first_block, end_block, device=absmax.device) // ABSMAX_BLOCK
            scale = absmax_map[scale.int()] * absmax_scale[index] + absmax_offset
        scale = scale.repeat_interleave(block_size)[first % block_size :][: target.numel()]
        target.copy_(codebook[codes.int()] * scale)


def nf4_linear(x: Tensor, bias: Tensor | None, rows: int, nf4: NF4Tensors) -> Tensor:
    """x @ W^T + bias with the whole W [N, K] decoded to x.dtype: the simplest thing that is right."""
    weight = x.new_empty(rows, x.shape[-1])
    dequantize_nf4(nf4, 0, weight)
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + epsilon)), the quotient rounded to x.dtype before the product."""
    if x.dtype.itemsize > 2:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin: x [T, H, d] of halves x1 and x2, tables [T, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None, :] + torch.cat((-second, first), dim=-1) * sin[:, None, :]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def tap(h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None) -> Tensor:
    """z = h @ weight^T; without state z, without gate state + z, else gate * state + (1 - gate) * z. In h.dtype."""
    z = h @ weight.to(h.dtype).T
    if state is None:
        return z
    if gate is None:
        return z.add_(state)
    return z.mul_(gate.neg().add_(1)).add_(gate * state)  # 1 - gate takes a CPU longer than all the rest


def tap_weight_gradient(dout: Tensor, kept: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dout^T @ h: [T, S], [T, D] -> [S, D] in `dtype`, multiplied and accumulated in the wider of the two dtypes.

    kept is h in the dtype of dout, or with scales its int8 codes.
    """
    wide = torch.promote_types(dtype, dout.dtype)
    if wide == dout.dtype and scales is None:
        return (dout.T @ kept).to(dtype)
    dweight = dout.new_empty(dout.shape[1], kept.shape[1], dtype=dtype)
    wide_dout = dout.to(wide)
    columns = max(1, _GRADIENT_CHUNK_BYTES // (max(1, kept.shape[0]) * wide.itemsize))
    if scales is not None:
        columns = max(INT8_GROUP, columns - columns % INT8_GROUP)
    for begin in range(0, kept.shape[1], columns):
        # A wider copy of all of h would be larger than the activation itself.
        h = kept[:, begin : begin + columns]
        if scales is not None:
            h = decode_hidden(h, scales[:, begin // INT8_GROUP :], dout.dtype)
        dweight[:, begin : begin + columns] = wide_dout.T @ h.to(wide)
    return dweight


def encode_hidden(h: Tensor) -> tuple[Tensor, Tensor]:
    """h in 8 bits: code = round(127 * h / absmax), scale = absmax / 127, absmax over 64 neighbouring columns of a row.

    What `decode_hidden` returns is off by at most absmax / 254 and the rounding to its dtype, so the few very large
    columns that hidden states have spoil only their own group. A group with an infinity decodes to NaN.

    Args:
        h: [T, D].

    Returns:
        codes int8 [T, D] and scales fp32 [T, ceil(D / 64)].
    """
    tokens, width = h.shape
    groups = F.pad(h.float(), (0, -width % INT8_GROUP)).view(tokens, -(-width // INT8_GROUP), INT8_GROUP)
    absmax = groups.abs().amax(dim=2)
    # A number over a tensor would be the number times a rounded reciprocal.
    inverse = torch.where(absmax > _SMALLEST_GROUP_ABSMAX, torch.full_like(absmax, 127.0) / absmax, 0.0)
    codes = (groups * inverse[..., None]).round().nan_to_num(0.0).to(torch.int8)
    return codes.flatten(1)[:, :width].contiguous(), absmax * (1 / 127)


def decode_hidden(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """code * scale, [T, D] in `dtype`; scales [T, at least ceil(D / 64)]."""
    return (codes * scales.repeat_interleave(INT8_GROUP, dim=1)[:, : codes.shape[1]]).to(dtype)


def cross_entropy(logits: Tensor, targets: Tensor, wide_logits: Tensor | None, need_grad: bool) -> Tensor:
    """-log softmax(logits)[target] of each row, and in the memory of the logits their gradient.

    Args:
        logits: [R, V]; with need_grad they become softmax(logits) - onehot(targets), else anything.
        targets: int64 [R]; a row of -100 has loss and gradient 0.
        wide_logits: fp32 scratch [R, V] where logits have 16 bits, else None: softmax is computed in at least fp32.
        need_grad: whether to compute the gradient.

    Returns:
        [R] in the dtype of the wider one.
    """
    counted = targets != IGNORE_INDEX
    columns = torch.where(counted, targets, 0)[:, None]
    p = logits if wide_logits is None else wide_logits.copy_(logits)
    p.sub_(p.amax(dim=1, keepdim=True))
    target_logit = p.gather(1, columns)
    total = p.exp_().sum(dim=1, keepdim=True)
    if need_grad:
        p.div_(total).scatter_add_(1, columns, p.new_full(columns.shape, -1.0))
        logits.copy_(p.masked_fill_(~counted[:, None], 0.0))
    return torch.where(counted, (total.log() - target_logit).view(-1), 0.0)


def _pack(codes: Tensor, packed: Tensor) -> None:
    pairs = codes.view(-1, 2)
    packed.copy_((pairs[:, 0] << 4) | pairs[:, 1])
