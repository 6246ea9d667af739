"""What identifies a backbone: its config, a sample of every tensor as stored, and how its linears are quantized.

The sample of a tensor is up to eight evenly spaced spans of its values. It can be taken from a loaded tensor or from
the file, of which only the spans are then read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from engine.backbone.families import BackboneConfig
from engine.backbone.shards import StoredTensor

_SPANS, _SPAN_LENGTH = 8, 512


def digest(tensor: Tensor) -> str:
    """sha256 of the sample of a tensor; floating values count as fp32, however they are stored."""
    flat = tensor.reshape(-1)
    return _digest(tensor.shape, (flat[first:last] for first, last in _spans(flat.numel())))


def stored_digest(stored: StoredTensor) -> str:
    """`digest` of a tensor in a file."""
    count = stored.nbytes // stored.dtype.itemsize
    return _digest(stored.shape, (stored.read_span(first, last) for first, last in _spans(count)))


def fingerprint(config: BackboneConfig, packing: str, digests: Mapping[str, str]) -> str:
    """See `Backbone.fingerprint`. Fields at their default are left out, so that a new field changes no old result."""
    facts = {
        entry.name: getattr(config, entry.name)
        for entry in dataclasses.fields(config)
        if getattr(config, entry.name) != entry.default
    }
    content = {"format": 1, "config": facts, "packing": packing, "tensors": dict(digests)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _spans(count: int) -> list[tuple[int, int]]:
    if count <= _SPANS * _SPAN_LENGTH:
        return [(0, count)]
    starts = ((count - _SPAN_LENGTH) * i // (_SPANS - 1) for i in range(_SPANS))
    return [(start, start + _SPAN_LENGTH) for start in starts]


def _digest(shape: Iterable[int], spans: Iterable[Tensor]) -> str:
    sha256 = hashlib.sha256(str(tuple(shape)).encode())
    for values in spans:
        sha256.update((values.to(torch.float32) if values.is_floating_point() else values).numpy().tobytes())
    return sha256.hexdigest()
