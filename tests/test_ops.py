"""Every `torch.library` op: schema, fake kernel and autograd registration, checked by torch itself."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ladder_kernels import Workspace, dequantize_nf4, linear_cross_entropy, nf4_linear, quantize_int8, quantize_nf4, tap
from ladder_kernels.head import head_tensors

# (T, K, N): aligned, ragged, tiny
SHAPES = [(8, 64, 32), (5, 13, 7), (1, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16]


def opcheck(op, arguments) -> None:
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_nf4(shape, dtype, double_quant):
    _, cols, rows = shape
    weight = quantize_nf4(torch.randn(rows, cols), double_quant=double_quant)
    opcheck(torch.ops.ladder.dequantize_nf4.default, (0, torch.zeros(rows, cols, dtype=dtype), *weight.tensors))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_linear(shape, dtype, with_bias):
    tokens, cols, rows = shape
    weight = quantize_nf4(torch.randn(rows, cols))
    bias = torch.randn(rows, dtype=dtype) if with_bias else None
    x, scratch = torch.randn(tokens, cols, dtype=dtype), torch.zeros(8192, dtype=torch.uint8)
    opcheck(torch.ops.ladder.nf4_linear.default, (x, bias, rows, scratch, *weight.tensors))


@pytest.mark.parametrize("keep_int8", [False, True])
@pytest.mark.parametrize("merge", ["first", "sum", "gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tap(shape, dtype, merge, keep_int8):
    tokens, width, side = shape
    weight = torch.randn(side, width, requires_grad=True)
    state = None if merge == "first" else torch.randn(tokens, side, dtype=dtype, requires_grad=True)
    gate = torch.tensor(0.3, requires_grad=True) if merge == "gate" else None
    opcheck(torch.ops.ladder.tap.default, (torch.randn(tokens, width, dtype=dtype), weight, state, gate, keep_int8))


@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_cross_entropy(shape, dtype, need_grad):
    rows, width, vocabulary = shape
    targets = torch.randint(0, vocabulary, (rows,))
    logits = torch.zeros(2, vocabulary, dtype=dtype)
    wide_logits = None if dtype == torch.float32 else torch.zeros(2, vocabulary)
    hidden, head_weight = torch.randn(rows, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
    for head in (head_weight, quantize_int8(head_weight), quantize_nf4(head_weight)):
        panels = sums = None
        if head is not head_weight:
            panels, sums = torch.zeros(1, 3, width, dtype=dtype), torch.zeros(2, width)
        scratch = (logits, wide_logits, panels, sums)
        opcheck(
            torch.ops.ladder.linear_cross_entropy.default, (hidden, *head_tensors(head), targets, *scratch, need_grad)
        )


class Recorder(TorchDispatchMode):
    """Names of the `ladder` ops that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ladder":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def run_all(x: torch.Tensor, weight, side: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, workspace) -> list:
    decoded = dequantize_nf4(weight, torch.float32)
    with torch.no_grad():
        projected = nf4_linear(x, weight, workspace=workspace)
    state = tap(projected, side)
    loss = linear_cross_entropy(state, head, targets, workspace=workspace)
    loss.backward()
    return [decoded, projected, state.detach(), loss.detach(), side.grad]


def arguments():
    return (
        torch.randn(6, 13),
        quantize_nf4(torch.randn(9, 13)),
        torch.randn(4, 9, requires_grad=True),
        torch.randn(11, 4),
        torch.randint(0, 11, (6,)),
        Workspace(),
    )


def test_dispatch_modes_see_the_ops_and_change_nothing():
    x, weight, side, head, targets, workspace = arguments()
    expected = run_all(x, weight, side, head, targets, workspace)
    side.grad = None
    with Recorder() as recorder:
        actual = run_all(x, weight, side, head, targets, workspace)
    assert recorder.names == ["dequantize_nf4", "nf4_linear", "tap", "linear_cross_entropy"]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_fake_tensors_have_the_shapes_of_real_ones():
    x, weight, side, head, targets, workspace = arguments()
    expected = run_all(x, weight, side, head, targets, workspace)
    side_values = side.detach()
    with FakeTensorMode() as mode:
        fake_side = mode.from_tensor(side_values).requires_grad_()
        fake = run_all(
            mode.from_tensor(x), weight.map(mode.from_tensor), fake_side, mode.from_tensor(head),
            mode.from_tensor(targets), Workspace(),
        )  # fmt: skip
    for one, other in zip(fake, expected, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def test_workspace_reuses_and_grows():
    workspace = Workspace()
    first = workspace.take("a", (4, 8), torch.float32)
    assert first.shape == (4, 8) and first.is_contiguous()
    assert workspace.take("a", (2, 4), torch.bfloat16).data_ptr() == first.data_ptr()
    assert workspace.take("b", (4, 8), torch.float32).data_ptr() != first.data_ptr()
    assert workspace.nbytes == 2 * 4 * 8 * 4
    workspace.take("a", (100,), torch.float64)
    assert workspace.nbytes == 800 + 4 * 8 * 4
    workspace.clear()
    assert workspace.nbytes == 0


def test_what_is_done_to_a_taken_tensor_is_not_handed_out_again():
    workspace = Workspace()
    workspace.take("a", (4, 4), torch.float32).requires_grad_()
    taken = workspace.take("a", (4, 4), torch.float32)
    assert not taken.requires_grad
    taken.resize_(2, 8)
    assert workspace.take("a", (4, 4), torch.float32).shape == (4, 4)


def test_workspace_filled_in_inference_mode_serves_training():
    x, weight, side, head, targets, workspace = arguments()
    with torch.inference_mode():
        nf4_linear(x, weight, workspace=workspace)
        linear_cross_entropy(torch.randn(6, 4), head, targets, workspace=workspace)
    run_all(x, weight, side, head, targets, workspace)


def test_workspace_serves_fake_and_real_tensors_in_turn():
    x, weight, side, head, targets, workspace = arguments()
    expected = run_all(x, weight, side, head, targets, Workspace())
    values = side.detach()
    expected[-1] = expected[-1].clone()
    for _ in range(2):
        with FakeTensorMode() as mode:
            run_all(
                mode.from_tensor(x), weight.map(mode.from_tensor), mode.from_tensor(values).requires_grad_(),
                mode.from_tensor(head), mode.from_tensor(targets), workspace,
            )  # fmt: skip
        side.grad = None
        for one, other in zip(run_all(x, weight, side, head, targets, workspace), expected, strict=True):
            assert torch.equal(one, other)


def nf4_tensors(**spoiled: object) -> list[object]:
    weight = quantize_nf4(torch.randn(9, 64))
    names = ("packed", "absmax", "codebook", "absmax_scale", "absmax_map", "absmax_offset", "block_size")
    return [spoiled.get(name, getattr(weight, name)) for name in names]


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"block_size": 0}, "expected a block_size in .*got 0"),
        ({"packed": torch.zeros(9, 32, dtype=torch.uint8)}, r"packed of shape \[bytes\]"),
        ({"packed": torch.zeros(576, dtype=torch.uint8)[::2]}, "contiguous packed"),
        ({"absmax": torch.zeros(8, dtype=torch.uint8)}, r"absmax of shape \[9\], got \[8\]"),
        ({"absmax": torch.zeros(9, dtype=torch.float16)}, "absmax in uint8, got float16"),
        ({"absmax_scale": torch.zeros(0)}, r"absmax_scale of shape \[1\], got \[0\]"),
        ({"absmax_scale": None}, "or none of them, got no absmax_scale"),
        ({"absmax_map": None, "absmax_offset": None}, "got no absmax_map and no absmax_offset"),
        ({"absmax_map": torch.zeros(255)}, r"absmax_map of shape \[256\], got \[255\]"),
        ({"absmax_offset": torch.zeros(1)}, r"absmax_offset of shape \[\], got \[1\]"),
        ({"codebook": torch.zeros(16, dtype=torch.float64)}, "codebook in float32, got float64"),
        ({"codebook": torch.zeros(32)[::2]}, "contiguous codebook"),
        ({"codebook": torch.zeros(16, device="meta")}, "codebook on cpu, got meta"),
    ],
)
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_malformed_nf4_tensors_are_refused(spoiled, message, fake):
    *tensors, block_size = nf4_tensors(**spoiled)
    x, scratch, out = torch.zeros(2, 64), torch.zeros(4096, dtype=torch.uint8), torch.zeros(9, 64)
    if fake:
        mode = FakeTensorMode()
        x, scratch, out, *tensors = [None if t is None else mode.from_tensor(t) for t in (x, scratch, out, *tensors)]
    with pytest.raises((ValueError, TypeError), match=f"dequantize_nf4: .*{message}"):
        torch.ops.ladder.dequantize_nf4(0, out, *tensors, block_size)
    with pytest.raises((ValueError, TypeError), match=f"nf4_linear: .*{message}"):
        torch.ops.ladder.nf4_linear(x, None, 9, scratch, *tensors, block_size)


@pytest.mark.parametrize(
    ("scratch", "message"),
    [
        (torch.zeros(8192, dtype=torch.uint8)[::2], "contiguous scratch"),
        (torch.zeros(64, 64, dtype=torch.uint8), r"scratch of shape \[bytes\]"),
        (torch.zeros(4096), "scratch in uint8, got float32"),
        (torch.zeros(8193, dtype=torch.uint8)[1:], "scratch at a multiple of 64 bytes, got offset 1"),
        (torch.zeros(100, dtype=torch.uint8), r"at least \d+ bytes of scratch, got 100"),
        (torch.zeros(4096, dtype=torch.uint8, device="meta"), "scratch on cpu, got meta"),
    ],
)
def test_unusable_scratch_is_refused(scratch, message):
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.ladder.nf4_linear(torch.zeros(2, 64), None, 9, scratch, *nf4_tensors())
