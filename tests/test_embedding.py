"""Rows of an embedding: in one memory, gathered by the Triton kernel, and a table that stays on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from numerics import assert_same_bits

from engine.backbone import load_backbone
from ladder_kernels import embedding_rows


@pytest.fixture
def gpu_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(16, 1024), (5, 1030), (1, 1), (0, 8)])
def test_gather_kernel(gpu_device: str, tokens: int, width: int, dtype: torch.dtype) -> None:
    gpu = pytest.importorskip("ladder_kernels.gpu.embedding")
    table, ids = torch.randn(37, width).to(dtype), torch.randint(0, 37, (2 * tokens,))[::2]
    where = table.pin_memory() if gpu_device == "cuda" else table
    assert_same_bits("rows", gpu.gather_rows(ids.to(gpu_device), where).cpu(), table[ids])


@pytest.mark.gpu
def test_ids_outside_of_the_table_make_their_row_nan(gpu_device: str) -> None:
    gpu = pytest.importorskip("ladder_kernels.gpu.embedding")
    table, ids = torch.randn(9, 6), torch.tensor([0, 9, -1, 1 << 40, 8], device=gpu_device)
    rows = gpu.gather_rows(ids, table.pin_memory() if gpu_device == "cuda" else table)
    assert rows.isnan().all(dim=1).tolist() == [False, True, True, True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two memories need a GPU")
def test_a_table_in_host_memory_pinned_or_not() -> None:
    table, ids = torch.randn(37, 24).bfloat16(), torch.randint(0, 37, (11,)).cuda()
    for where in (table, table.pin_memory(), table.cuda()):
        rows = embedding_rows(ids, where)
        assert rows.is_cuda
        assert_same_bits("rows", rows.cpu(), table[ids.cpu()])


def test_wrong_arguments() -> None:
    table = torch.randn(9, 6)
    assert_same_bits("rows", embedding_rows(torch.tensor([8, 0]), table), table[[8, 0]])
    with pytest.raises(IndexError):
        embedding_rows(torch.tensor([9]), table)
    with pytest.raises(TypeError, match="expected ids in int64, got int32"):
        embedding_rows(torch.tensor([1], dtype=torch.int32), table)
    with pytest.raises(ValueError, match=r"expected ids of shape \[T\], got \[1, 1\]"):
        embedding_rows(torch.tensor([[1]]), table)


@pytest.mark.parametrize(("family", "head_dtype"), [("llama2", "dense"), ("qwen2", "dense"), ("qwen2", "int8")])
def test_the_embedding_stays_on_the_host_unless_it_is_the_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, head_dtype: str
) -> None:
    """The device "meta" stands for a GPU: it is not the host, and takes any tensor but has no values to check."""
    folder = tiny_checkpoint(tmp_path, family)
    backbone = load_backbone(folder, dtype=torch.float32, head_dtype=head_dtype)
    before, tied_dense = backbone.embedding, family == "qwen2" and head_dtype == "dense"
    assert (backbone.head_weight is before) == tied_dense
    backbone.to("meta")
    assert backbone.device.type == backbone.head_weight.device.type == "meta"
    assert (backbone.embedding.device.type == "meta") == tied_dense
    monkeypatch.setattr("engine.backbone.loader._require_finite", lambda *_: None)
    loaded = load_backbone(folder, dtype=torch.float32, quantize=False, head_dtype=head_dtype, device="meta")
    assert loaded.device.type == loaded.head_weight.device.type == "meta"
    assert loaded.embedding.device == backbone.embedding.device
    if not tied_dense:
        assert_same_bits("embedding", loaded.embedding, before)
