"""A decoder block of few rows in two native calls: the bits of the single operations, wherever its weights lie."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import tiny_checkpoint
from conftest import require_native
from numerics import assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from engine.backbone import Backbone, load_backbone
from engine.backbone.block import Block
from engine.sequence import SequenceLayout
from ladder_kernels import (
    DecoderWeights,
    PackedDecoderBlock,
    PackedLinear,
    Workspace,
    native,
    nf4_linear,
    quantize_nf4,
    rms_norm,
    rotary,
    swiglu_,
)
from ladder_kernels.launch import FEW_TOKENS

HEADS, KV_HEADS, SIZE, WIDTH, INNER = 6, 2, 64, 192, 320
EPSILON = 1e-5


@cache
def random_weights(
    dtype: torch.dtype,
    *,
    biases: bool = False,
    norms: bool = False,
    block_size: int = 64,
    double_quant: bool = True,
    inner: int = INNER,
    seed: int = 0,
) -> DecoderWeights:
    """Made once: not to be changed."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def linear(rows: int, cols: int) -> PackedLinear:
        weight = quantize_nf4((random(rows, cols) * cols**-0.5).to(dtype), block_size, double_quant)
        return PackedLinear(weight, random(rows).to(dtype) if biases else None)

    def norm(width: int) -> Tensor:
        return (random(width).sigmoid() + 0.5).to(dtype)

    query, key = linear(HEADS * SIZE, WIDTH), linear(KV_HEADS * SIZE, WIDTH)
    value, output = linear(KV_HEADS * SIZE, WIDTH), linear(WIDTH, HEADS * SIZE)
    mlp = linear(inner, WIDTH), linear(inner, WIDTH), linear(WIDTH, inner)
    head_norms = (norm(SIZE), norm(SIZE)) if norms else ()
    return DecoderWeights(query, key, value, output, *mlp, norm(WIDTH), norm(WIDTH), *head_norms)


def random_rows(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, cos, sin."""
    angles = torch.randn(tokens, SIZE // 2).repeat(1, 2)
    return torch.randn(tokens, WIDTH).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every row looks at all, and not symmetrically."""
    heads = (t.transpose(0, 1)[None] for t in (query, key, value))
    return F.scaled_dot_product_attention(*heads, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def one_by_one(weights: DecoderWeights, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formulas as single operations."""

    def times(name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = getattr(weights, name)
        return nf4_linear(x, weight, bias, residual)

    x = rms_norm(hidden, weights.attention_norm, EPSILON)
    query, key, value = (times(name, x).unflatten(-1, (-1, SIZE)) for name in ("query", "key", "value"))
    if weights.query_norm is not None and weights.key_norm is not None:
        query, key = rms_norm(query, weights.query_norm, EPSILON), rms_norm(key, weights.key_norm, EPSILON)
    mixed = attend(rotary(query, cos, sin), rotary(key, cos, sin), value)
    hidden = times("output", mixed, hidden)
    x = rms_norm(hidden, weights.mlp_norm, EPSILON)
    return times("down", swiglu_(times("gate", x), times("up", x)), hidden)


def at_once(weights: DecoderWeights, *rows: Tensor) -> Tensor | None:
    return PackedDecoderBlock(weights)(*rows, EPSILON, attend, workspace=Workspace())


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"biases": True, "double_quant": False}, {"norms": True, "block_size": 128}, {"biases": True, "norms": True}],
    ids=["plain", "biases", "norms", "both"],
)
def test_bits_of_the_operations_one_by_one(native_isa, options, dtype, tokens):
    weights, rows = random_weights(dtype, **options), random_rows(tokens, dtype)
    out = at_once(weights, *rows)
    if tokens > FEW_TOKENS[native_isa]:
        assert out is None
        return
    assert out is not None and bool(torch.isfinite(out).all())
    assert_same_bits("out", out, one_by_one(weights, *rows))


def test_threads_do_not_change_the_bits(native_isa):
    weights, rows = random_weights(torch.bfloat16, inner=4096), random_rows(2, torch.bfloat16)
    threads, outs = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outs.append(at_once(weights, *rows))
    torch.set_num_threads(threads)
    for out in outs[1:]:
        assert_same_bits("out", out, outs[0])


def test_most_rows_and_one_workspace_for_all(native_isa):
    """Scratch that held more rows, or another dtype, does not matter."""
    workspace = Workspace()
    for tokens in (FEW_TOKENS[native_isa], 1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            weights, rows = random_weights(dtype), random_rows(tokens, dtype)
            out = PackedDecoderBlock(weights)(*rows, EPSILON, attend, workspace=workspace)
            assert_same_bits(f"{tokens} rows", out, one_by_one(weights, *rows))


def test_weights_that_moved_are_read_where_they_are():
    """Other memory behind the same tensors: sharing them with a process does that, for one."""
    require_native()
    weights = random_weights.__wrapped__(torch.float32, biases=True, norms=True)
    others = random_weights(torch.float32, biases=True, norms=True, seed=1)
    rows = random_rows(1, torch.float32)
    run = partial(PackedDecoderBlock(weights), *rows, EPSILON, attend, workspace=Workspace())
    run()
    for tensor, other in zip(weights.tensors(), others.tensors(), strict=True):
        before, tensor.data = tensor.data, other.clone()
        before.fill_(0)
        out = run()
    assert_same_bits("moved", out, at_once(others, *rows))


def test_where_it_does_not_apply(native_isa, monkeypatch):
    weights, rows = random_weights(torch.float32), random_rows(1, torch.float32)
    many = random_rows(FEW_TOKENS[native_isa] + 1, torch.float32)
    assert at_once(weights, *many) is None
    assert at_once(weights, *random_rows(0, torch.float32)) is None
    assert at_once(random_weights(torch.float32, inner=96), *rows) is None, "down has columns beyond whole groups"
    assert at_once(random_weights(torch.float32, block_size=32), *rows) is None
    assert at_once(weights, rows[0].requires_grad_(), *rows[1:]) is None
    with torch.no_grad():
        assert at_once(weights, *rows) is not None
    with FakeTensorMode():
        assert at_once(weights, *random_rows(1, torch.float32)) is None
    monkeypatch.setattr(native, "available", lambda: False)
    assert at_once(weights, *random_rows(1, torch.float32)) is None


def test_wrong_arguments():
    require_native()
    weights, (hidden, cos, sin) = random_weights(torch.float32, norms=True), random_rows(2, torch.float32)
    for rows, message in (
        ((hidden[:, :-1], cos, sin), r"expected hidden of shape \[2, 192\], got \[2, 191\]"),
        ((hidden.T.contiguous().T, cos, sin), "expected contiguous hidden"),
        ((hidden, cos[:1], sin), r"expected cos of shape \[2, d\]"),
        ((hidden, cos[:, :32], sin), "expected cos .*d = 64 .* got 32"),
        ((hidden, cos, sin[:, :32]), r"expected sin of shape \[2, 64\]"),
    ):
        with pytest.raises(ValueError, match=message):
            at_once(weights, *rows)
    with pytest.raises(TypeError, match="expected hidden in float32, got bfloat16"):
        at_once(weights, hidden.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match="result of attend of shape"):
        PackedDecoderBlock(weights)(hidden, cos, sin, EPSILON, lambda q, k, v: k.flatten(1), workspace=Workspace())
    for changed, message in (
        ({"key": weights.query}, r"expected value of shape \[384, 192\], got \[128, 192\]"),
        ({"query": weights.key, "key": weights.query}, "at most as many rows of key as of query, 128, got 384"),
        ({"up": weights.down}, r"expected up of shape \[320, 192\], got \[192, 320\]"),
        ({"query": PackedLinear(weights.query.weight, torch.zeros(3))}, "bias of query of shape"),
        ({"mlp_norm": torch.ones(3)}, "expected mlp_norm of shape"),
        ({"query_norm": None}, "query_norm and key_norm, or none of them"),
        ({"query_norm": torch.ones(32)}, "expected query_norm of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedDecoderBlock(weights._replace(**changed))


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama_bias"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of whole groups of 64 columns; with biases of heads, norms of heads, biases everywhere."""
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, intermediate_size=128)


def decoded(backbone: Backbone) -> list[Tensor]:
    """Hidden states of a prompt, which is left-padded in one of two rows, and of two tokens after it."""
    cache, states = DynamicCache(), []
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    for columns, new in ((5, 5), (6, 1), (7, 1)):
        ids = torch.arange(2 * new) * 7 + columns
        states += [h for _, h in backbone.hidden_states(ids, SequenceLayout.cached(padding[:, :columns], new), cache)]
    return states


def assert_decodes_alike(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Decoding equals decoding by single operations, and every layer computes few rows at once."""
    served = []
    run = PackedDecoderBlock.__call__

    def counted(*args, **options):
        out = run(*args, **options)
        served.append(out is not None)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(PackedDecoderBlock, "__call__", counted)
        states = decoded(backbone)
        patch.setattr(PackedDecoderBlock, "__call__", lambda *args, **options: None)
        expected = decoded(backbone)
    few = FEW_TOKENS[native.isa() or ""]
    assert served == [tokens <= few for tokens in (10, 2, 2) for _ in backbone.blocks]
    for index, (state, other) in enumerate(zip(states, expected, strict=True)):
        assert_same_bits(f"state {index}", state, other)
    return states


@pytest.mark.parametrize("placement", [{}, {"residency": "host"}], ids=["device", "host"])
def test_backbones_decode_the_same_bits(folder, placement, monkeypatch):
    require_native()
    backbone = load_backbone(folder, dtype=torch.bfloat16, **placement)
    first = assert_decodes_alike(backbone, monkeypatch)
    backbone.to("cpu")
    for state, other in zip(assert_decodes_alike(backbone, monkeypatch), first, strict=True):
        assert_same_bits("after a move", state, other)


def test_a_replaced_block_is_the_one_that_decodes(folder, monkeypatch):
    require_native()
    backbone = load_backbone(folder, dtype=torch.float32)
    before = decoded(backbone)
    backbone.layers.blocks[0] = backbone.layers.blocks[0].map(torch.clone)
    for state, other in zip(decoded(backbone), before, strict=True):
        assert_same_bits("a copy", state, other)
    backbone.layers.blocks[0] = backbone.layers.blocks[1]
    after = assert_decodes_alike(backbone, monkeypatch)
    assert not torch.equal(after[-1], before[-1])


def test_dense_blocks_have_no_packed_form(folder):
    blocks: list[Block] = load_backbone(folder, dtype=torch.float32, quantize=False).layers.blocks
    assert all(block.packed is None for block in blocks)
