"""NF4 quantization and decoding against bitsandbytes, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_same_bits
from torch import Tensor

from ladder_kernels import NF4Weight, dequantize_nf4, native, quantize_nf4, reference
from ladder_kernels.nf4 import NF4_CODES, dynamic_map
from ladder_kernels.reference import BLOCK_SIZES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The implementation fixture stays the same over all examples of a test.
PROPERTY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([1, 2, 48, 127, 128, 129]))


def oracle(weight: Tensor, double_quant: bool, block_size: int = 64) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")


def assert_equals_oracle(weight: Tensor, double_quant: bool, block_size: int = 64) -> NF4Weight:
    packed, state = oracle(weight, double_quant, block_size)
    ours = quantize_nf4(weight, block_size, double_quant)
    assert_same_bits("packed", ours.packed, packed.view(-1))
    assert_same_bits("absmax", ours.absmax, state.absmax)
    assert_same_bits("codebook", ours.codebook, state.code)
    if double_quant:
        assert_same_bits("absmax_scale", ours.absmax_scale, state.state2.absmax)
        assert_same_bits("absmax_map", ours.absmax_map, state.state2.code)
        assert_same_bits("absmax_offset", ours.absmax_offset, state.offset)
    for dtype in DTYPES:
        decoded = dequantize_nf4(ours, dtype)
        assert_same_bits(f"decoded to {dtype}", decoded, oracle_decode(packed, state, dtype))
    return ours


def oracle_decode(packed: Tensor, state: bnb.QuantState, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes decodes, without three faults of its CPU kernels (0.50.2)."""
    state.dtype = torch.float32
    if state.shape[1] % 16 == 0 and state.shape[1] % state.blocksize != 0:
        # Its AVX-512 kernel takes the scale of a wrong block here; its portable implementation does not.
        absmax = state.absmax
        if state.nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        arguments = (packed.view(-1), absmax, state.code, state.blocksize, state.shape)
        exact = _dequantize_4bit_compute(*arguments, torch.float32)
        rounded = exact.to(dtype)
    else:
        # It takes a single packed byte for a transposed matrix.
        exact = bnb.dequantize_4bit(packed, state).reshape(state.shape)
        state.dtype = dtype
        rounded = bnb.dequantize_4bit(packed, state).reshape(state.shape)
    # It rounds NaN to a bf16 zero.
    return torch.where(exact.isnan(), torch.tensor(float("nan"), dtype=dtype), rounded)


def random_weight(rows: int, cols: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) * 3 + 0.1
    return (torch.randn(rows, cols, generator=generator) * spread * scale).to(dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(rows=SIZES, cols=SIZES, seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 1e-3, 300.0]))
@PROPERTY
def test_equals_bitsandbytes(implementation, dtype, double_quant, rows, cols, seed, scale):
    assert_equals_oracle(random_weight(rows, cols, seed, dtype, scale), double_quant)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(implementation, block_size):
    weight = random_weight(33, 4096 // 8 + 2, 1, torch.bfloat16)
    assert_equals_oracle(weight, True, block_size)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("shape", [(512, 640), (37, 8195)], ids=str)
def test_several_threads_and_chunks(implementation, shape, double_quant):
    assert_equals_oracle(random_weight(*shape, 2, torch.float32), double_quant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_thresholds(implementation, dtype):
    codes = torch.tensor(NF4_CODES)
    middle = (codes[1:] + codes[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    values = torch.cat([codes, middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)])
    weight = torch.cat([values, torch.ones(64 - values.numel() % 64)])[None].to(dtype)
    assert_equals_oracle(weight, False)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 3e38])
@pytest.mark.parametrize("block", ["full", "partial"])
def test_special_blocks(implementation, special, block, double_quant):
    weight = random_weight(3, 70, 3, torch.float32)
    flat = weight.view(-1)
    if block == "full":
        flat[64:128] = special if special != special or abs(special) != float("inf") else flat[64:128]
        flat[70] = special
    else:
        flat[192:] = special
    assert_equals_oracle(weight, double_quant)


def test_all_zero_matrix(implementation):
    ours = assert_equals_oracle(torch.zeros(2, 67), True)
    assert bool((dequantize_nf4(ours, torch.float32) == 0).all())


def test_fp16_scales_beyond_its_range_become_infinite_and_subnormal(implementation):
    weight = random_weight(4, 64, 5, torch.float32)
    weight[0] *= 1e6
    weight[1] *= 1e-6
    weight[2] *= 3e-8
    assert_equals_oracle(weight, False)


def test_dynamic_map_equals_bitsandbytes():
    assert_same_bits("map", dynamic_map(), bnb.create_dynamic_map())


def test_many_scales_have_the_codes_of_few():
    absmax = torch.randn(70000).abs()
    absmax[7], absmax[300] = torch.nan, torch.inf
    offset = torch.tensor(0.5)
    codes, scale = reference.quantize_absmax(absmax, dynamic_map(), offset)
    parts = [reference.quantize_absmax(part, dynamic_map(), offset) for part in absmax.split(256 * 100)]
    assert_same_bits("codes", codes, torch.cat([part[0] for part in parts]))
    assert_same_bits("scale", scale, torch.cat([part[1] for part in parts]))


def test_quantized_scales_follow_the_oracle_on_dense_values(implementation):
    # 128 x 256 blocks of one value each: the scales themselves sweep the range.
    scales = torch.cat([torch.linspace(0.001, 4, 32000), torch.logspace(-6, 0, 768)])
    assert_equals_oracle(scales[:, None].expand(-1, 64).contiguous(), True)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(rows=st.integers(1, 9), cols=SIZES, seed=st.integers(0, 100))
@PROPERTY
def test_out_is_written_and_nothing_beside_it(implementation, dtype, double_quant, rows, cols, seed):
    weight = quantize_nf4(random_weight(rows, cols, seed, dtype), double_quant=double_quant)
    guard, size = 64, rows * cols
    buffer = torch.full((guard + size + guard,), 123.0, dtype=dtype)
    out = buffer[guard : guard + size].view(rows, cols)
    assert dequantize_nf4(weight, dtype, out=out) is out
    assert_same_bits("out", out, dequantize_nf4(weight, dtype))
    assert bool((buffer[:guard] == 123.0).all()) and bool((buffer[guard + size :] == 123.0).all())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_weights_kept_in_fp32(native_isa, dtype, double_quant):
    weight = quantize_nf4(torch.randn(37, 71) * 3e4, 64, double_quant)  # fp16 overflows
    weight.absmax[7] = 3 if double_quant else float("nan")
    expected, out = dequantize_nf4(weight, dtype), torch.empty(21, 71)
    native.dequantize_nf4(weight.tensors, 13, out, rounded_to=dtype)
    assert_same_bits("out", out, expected[13:34].float())


def test_out_is_refused_where_it_does_not_fit():
    weight = quantize_nf4(torch.randn(6, 8))
    with pytest.raises(ValueError, match=r"expected out of shape \[6, 8\], got \[8, 6\]"):
        dequantize_nf4(weight, torch.float32, out=torch.zeros(8, 6))
    with pytest.raises(TypeError, match="expected out in float32, got bfloat16"):
        dequantize_nf4(weight, torch.float32, out=torch.zeros(6, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="expected contiguous out"):
        dequantize_nf4(weight, torch.float32, out=torch.zeros(8, 6).T)
    with pytest.raises(ValueError, match="expected out on cpu, got meta"):
        dequantize_nf4(weight, torch.float32, out=torch.zeros(6, 8, device="meta"))
    with pytest.raises(TypeError, match="expected dtype in float32, bfloat16 or float16, got int32"):
        dequantize_nf4(weight, torch.int32)


def test_autograd_sees_that_out_is_written(implementation):
    weight = quantize_nf4(torch.randn(6, 8))
    factor, out = torch.randn(6, 8, requires_grad=True), torch.zeros(6, 8)
    product = factor * out
    dequantize_nf4(weight, torch.float32, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with pytest.raises(ValueError, match="dequantize_nf4: out requires a gradient"):
        dequantize_nf4(weight, torch.float32, out=factor)
    with torch.inference_mode():
        dequantize_nf4(weight, torch.float32, out=torch.zeros(6, 8))


def test_quantize_refuses_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"expected weight of shape \[N, K\], got \[8\]"):
        quantize_nf4(torch.randn(8))
    with pytest.raises(TypeError, match="expected weight in float32, bfloat16 or float16, got int64"):
        quantize_nf4(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected a block_size in \[32, 64.*got 48"):
        quantize_nf4(torch.randn(2, 2), block_size=48)
    with pytest.raises(ValueError, match="expected a matrix with weights"):
        quantize_nf4(torch.zeros(0, 4))


def test_non_contiguous_weight(implementation):
    weight = torch.randn(70, 30).T
    assert_same_bits("packed", quantize_nf4(weight).packed, quantize_nf4(weight.contiguous()).packed)


def test_bytes_per_weight():
    assert quantize_nf4(torch.randn(512, 512)).nbytes * 8 / 512**2 == pytest.approx(4.127, abs=0.04)
    assert quantize_nf4(torch.randn(512, 512), double_quant=False).nbytes * 8 / 512**2 == pytest.approx(4.5, abs=0.01)


def test_weight_moves_and_keeps_its_optional_tensors():
    for double_quant in (False, True):
        moved = quantize_nf4(torch.randn(6, 8), double_quant=double_quant).to("meta")
        assert moved.device.type == "meta" and moved.double_quant is double_quant


def test_inconsistent_weight_is_refused():
    weight = quantize_nf4(torch.randn(6, 64), double_quant=False)
    with pytest.raises(ValueError, match=r"expected packed of shape \[256\], got \[192\]"):
        NF4Weight(weight.packed, weight.absmax, weight.codebook, (8, 64), torch.float32)
    with pytest.raises(ValueError, match="expected codebook on cpu, got meta"):
        NF4Weight(weight.packed, weight.absmax, weight.codebook.to("meta"), (6, 64), torch.float32)
    with pytest.raises(TypeError, match="expected absmax in float32, got uint8"):
        NF4Weight(weight.packed, weight.absmax.byte(), weight.codebook, (6, 64), torch.float32)


# --- checkpoints saved by bitsandbytes ---


def bitsandbytes_tensors(weight: Tensor, double_quant: bool, name: str) -> dict[str, Tensor]:
    packed, state = oracle(weight, double_quant)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 64), (7, 13)], ids=str)
def test_bitsandbytes_round_trip(shape, dtype, double_quant):
    name = "model.layers.0.mlp.up_proj.weight"
    weight = random_weight(*shape, 7, dtype)
    tensors = bitsandbytes_tensors(weight, double_quant, name)
    read = NF4Weight.from_bitsandbytes(tensors, name)
    assert (read.shape, read.dtype, read.double_quant) == (shape, dtype, double_quant)
    assert_same_bits(
        "decoded", dequantize_nf4(read, dtype), dequantize_nf4(quantize_nf4(weight, 64, double_quant), dtype)
    )
    written = read.to_bitsandbytes(name)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert_same_bits(key, written[key], tensor)


def test_bitsandbytes_reads_what_we_write():
    weight = torch.randn(8, 64, dtype=torch.bfloat16)
    ours = quantize_nf4(weight)
    tensors = ours.to_bitsandbytes("w")
    state = {key.removeprefix("w."): value for key, value in tensors.items() if key != "w"}
    theirs = bnb.dequantize_4bit(tensors["w"], bnb.QuantState.from_dict(state, torch.device("cpu")))
    assert_same_bits("decoded", dequantize_nf4(ours, torch.bfloat16), theirs)


def test_codes_stored_as_another_dtype():
    tensors = bitsandbytes_tensors(torch.randn(8, 64), True, "w")
    expected = NF4Weight.from_bitsandbytes(tensors, "w").packed
    tensors["w"] = tensors["w"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert_same_bits("packed", NF4Weight.from_bitsandbytes(tensors, "w").packed, expected)


def _fp4(tensors: dict[str, Tensor]) -> None:
    tensors["w.quant_state.bitsandbytes__fp4"] = tensors.pop("w.quant_state.bitsandbytes__nf4")


def _edit_state(old: str, new: str):
    def edit(tensors: dict[str, Tensor]) -> None:
        text = bytes(tensors["w.quant_state.bitsandbytes__nf4"].tolist()).decode()
        assert old in text
        state = torch.tensor(list(text.replace(old, new).encode()), dtype=torch.uint8)
        tensors["w.quant_state.bitsandbytes__nf4"] = state

    return edit


def _fill(key: str, value: float):
    return lambda tensors: tensors.__setitem__(key, tensors[key].clone().fill_(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_fp4, r"w\.quant_state\.bitsandbytes__fp4: expected quant_type 'nf4', got 'fp4'"),
        (_edit_state('"nf4"', '"int4"'), "expected quant_type 'nf4', got 'int4'"),
        (_edit_state("{", "["), r"w\.quant_state.*expected the bytes of a JSON object"),
        (_edit_state("[8, 64]", "[8, 60]"), r"w: expected 240 bytes of packed codes for shape \[8, 60\], got 256"),
        (_edit_state("[8, 64]", "[512]"), r"w: expected a shape \[N, K\]"),
        (_edit_state('"float32", "shape"', '"int8", "shape"'), "w: expected a floating-point dtype.*'int8'"),
        (_edit_state('"blocksize": 64', '"blocksize": 63'), "w: .*expected a block_size"),
        (_edit_state('"blocksize": 64', '"blocksize": 64.0'), "w: .*expected a block_size"),
        (_edit_state("{", "[" * 100_000), r"w\.quant_state.*expected the bytes of a JSON object"),
        (_edit_state('"nested_blocksize": 256', '"nested_blocksize": 128'), "w: expected nested_blocksize 256"),
        (_edit_state('"nested_offset": ', '"nested_offset": null, "was": '), "w: expected a number as nested_offset"),
        (_edit_state('"nested_offset": ', '"nested_offset": NaN, "was": '), "w: .*infinity or NaN in absmax_offset"),
        (_fill("w.nested_absmax", float("inf")), "w: expected finite NF4 scales.*absmax_scale"),
        (lambda tensors: tensors.pop("w.absmax"), r"w\.absmax: expected this tensor"),
        (lambda tensors: tensors.pop("w.nested_quant_map"), r"w\.nested_quant_map: expected this tensor"),
        (lambda tensors: tensors.pop("w.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4: expected this tensor"),
        (
            lambda tensors: tensors.update({"w.absmax": tensors["w.absmax"][:-1]}),
            r"w: .*absmax of shape \[8\], got \[7\]",
        ),
    ],
)
def test_damaged_checkpoint_is_refused_by_name(damage, message):
    tensors = bitsandbytes_tensors(torch.randn(8, 64), True, "w")
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        NF4Weight.from_bitsandbytes(tensors, "w")


def test_non_finite_plain_scales_are_refused():
    tensors = bitsandbytes_tensors(torch.randn(8, 64), False, "w")
    tensors["w.absmax"] = tensors["w.absmax"].clone().fill_(float("nan"))
    with pytest.raises(ValueError, match="w: expected finite NF4 scales, got infinity or NaN in absmax"):
        NF4Weight.from_bitsandbytes(tensors, "w")
