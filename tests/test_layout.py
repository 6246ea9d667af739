"""A block as one buffer: alignment, round trips, and what is no description of one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from ladders import tiny_backbone

from engine.backbone.layout import ALIGNMENT, PAGE, describe, from_description, pack, packed_nbytes


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "llama2"])
def test_a_packed_block_is_one_aligned_copy(family: str, quantize: bool) -> None:
    block = tiny_backbone(family, quantize=quantize).blocks[0]
    buffer, packed = pack(block)
    begins = [tensor.data_ptr() - buffer.data_ptr() for tensor in packed.tensors()]
    ends = [begin + tensor.nbytes for begin, tensor in zip(begins, packed.tensors(), strict=True)]
    assert all(begin % ALIGNMENT == 0 for begin in begins)
    assert buffer.data_ptr() % PAGE == buffer.nbytes % PAGE == 0 and buffer.nbytes == packed_nbytes(block)
    assert all(end <= begin for end, begin in zip(ends, [*begins[1:], buffer.nbytes], strict=True))
    assert all(torch.equal(*pair) for pair in zip(packed.tensors(), block.tensors(), strict=True))
    used = sum(tensor.nbytes for tensor in block.tensors())
    assert buffer.nbytes < used + ALIGNMENT * len(begins) + PAGE


@pytest.mark.parametrize("quantize", [True, False])
def test_a_description_describes(quantize: bool) -> None:
    block = tiny_backbone("qwen3", quantize=quantize).blocks[1]
    again = from_description(json.loads(describe(block)))
    assert describe(again) == describe(block) and packed_nbytes(again) == packed_nbytes(block)
    other = tiny_backbone("qwen3", torch.bfloat16, quantize).blocks[1]
    assert describe(other) != describe(block)


@pytest.mark.parametrize("content", [None, [], {}, {"query": 1}, "x"])
def test_what_is_no_description_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="not the description of a block"):
        from_description(content)
