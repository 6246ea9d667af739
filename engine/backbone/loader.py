"""From a checkpoint to a `Backbone`, one tensor at a time, so that host memory holds the packed model and one tensor.

Everything that can be wrong without reading weights (config, index, shard headers, names, shapes, dtypes) is checked
before the first weight is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.backbone.decoder import Backbone, Block, Linear
from engine.backbone.families import (
    IGNORED_SUFFIXES,
    BackboneConfig,
    ExpectedTensor,
    backbone_config,
    expected_tensors,
    parse_config,
)
from engine.backbone.files import CONFIG, locate, locate_weights, read_json, stored_tensors
from engine.backbone.shards import CheckpointError, StoredTensor
from engine.dtypes import compute_dtype
from ladder_kernels import NF4Weight, quantize_nf4

COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_QUANT_STATE = ".quant_state.bitsandbytes__nf4"
_PACKED_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _QUANT_STATE)
_SPANS, _SPAN_LENGTH = 8, 512


@dataclass(frozen=True)
class _Item:
    """One tensor to load: its parts in the checkpoint (one if dense, up to six if packed by bitsandbytes)."""

    name: str
    expected: ExpectedTensor
    parts: Mapping[str, StoredTensor]

    @property
    def packed(self) -> bool:
        return len(self.parts) > 1

    @property
    def main(self) -> StoredTensor:
        return self.parts[self.name]


def load_backbone(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: bool = True,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Backbone:
    """Load a frozen backbone from a local folder or a hub id in Hugging Face layout. Only safetensors are read.

    Peak host memory is the loaded model plus its largest tensor plus small change.

    Args:
        dtype: of norms, embedding, head and hidden states; None picks `engine.dtypes.compute_dtype(device)`.
        quantize: pack the linears of the blocks to NF4. A checkpoint already packed by bitsandbytes is kept to the bit.
        double_quant: quantize the block scales as well; without effect on a packed checkpoint.
        device: where the weights live.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: anything wrong with the arguments or the checkpoint; the message names the file and the tensor.
    """
    device = torch.device(device)
    dtype = compute_dtype(device) if dtype is None else dtype
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, COMPUTE_DTYPES))}, got {dtype}")
    if dtype == torch.float64 and quantize:
        raise ValueError("dtype torch.float64 needs quantize=False: NF4 decodes to 32 or 16 bits")
    folder = locate(source, revision)
    raw_config = read_json(folder, CONFIG)
    try:
        prequantized = _is_prequantized(raw_config, quantize)
        hf_config = parse_config(raw_config)
        config = backbone_config(hf_config)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    locate_weights(source, folder, revision)
    items, spare_head = _plan(config, stored_tensors(folder), prequantized)

    quantizer = double_quant if quantize and not prequantized else None
    loaded, digests = _load_all(items, dtype, device, quantizer)
    if spare_head is not None and _digest(spare_head.read()) != digests[config.names.embedding]:
        raise CheckpointError(
            f"{spare_head.label}: differs from the embedding although {CONFIG} ties them; "
            "set tie_word_embeddings to false"
        )
    packing = "as stored" if prequantized else f"nf4 double_quant={double_quant}" if quantize else "dense"
    return Backbone(
        config,
        hf_config,
        *assemble(config, loaded),
        source=str(source),
        folder=folder,
        fingerprint=_fingerprint(config, packing, digests),
    )


def _is_prequantized(raw_config: Mapping[str, Any], quantize: bool) -> bool:
    """Whether the config declares bitsandbytes NF4; every other quantization is refused."""
    settings = raw_config.get("quantization_config")
    if settings is None:
        return False
    fields = settings if isinstance(settings, dict) else {}
    if fields.get("quant_method") != "bitsandbytes" or not fields.get("load_in_4bit"):
        raise ValueError(
            f"unsupported quantization_config {str(settings)[:200]}: expected none, or bitsandbytes 4-bit NF4"
        )
    for name, expected in (("bnb_4bit_quant_type", "nf4"), ("bnb_4bit_quant_storage", "uint8")):
        if fields.get(name, expected) != expected:
            raise ValueError(f"unsupported quantization_config: expected {name} {expected!r}, got {fields[name]!r}")
    if not quantize:
        raise ValueError(
            "quantize=False, but the checkpoint is already quantized: pass quantize=True or an unquantized one"
        )
    return True


def _plan(
    config: BackboneConfig, stored: Mapping[str, StoredTensor], prequantized: bool
) -> tuple[list[_Item], StoredTensor | None]:
    """What to load, in file order, after names, shapes and dtypes were compared with the config.

    Returns:
        the items, and the superfluous head of a tied checkpoint where there is one.
    """
    rest = {name: tensor for name, tensor in stored.items() if not name.endswith(IGNORED_SUFFIXES)}
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in rest]
    if missing:
        files = ", ".join(sorted({tensor.path.name for tensor in stored.values()})[:3])
        raise CheckpointError(f"{files}: {len(missing)} tensors are missing, first {', '.join(missing[:3])}")
    items = []
    for name, wanted in expected.items():
        packed = prequantized and wanted.linear and name + _QUANT_STATE in rest
        part_names = [name + part for part in (_PACKED_PARTS if packed else ("",))]
        parts = {part: rest.pop(part) for part in part_names if part in rest}
        items.append(_Item(name, wanted, parts))
        _check_item(items[-1])
    spare_head = rest.pop(config.names.head, None) if config.tie_word_embeddings else None
    if rest:
        first = next(iter(rest.values()))
        raise CheckpointError(
            f"{first.label}: unexpected (one of {len(rest)}): a {config.family} model with this {CONFIG} has none of it"
        )
    return sorted(items, key=lambda item: (item.main.path.name, item.main.begin)), spare_head


def _check_item(item: _Item) -> None:
    """Compare stored shapes and dtypes with what the config says."""
    main, shape = item.main, item.expected.shape
    if not item.packed:
        if main.shape != shape:
            raise CheckpointError(f"{main.label}: expected shape {list(shape)} from {CONFIG}, got {list(main.shape)}")
        if not main.dtype.is_floating_point:
            raise CheckpointError(f"{main.label}: expected a floating dtype, got {main.dtype}")
        return
    count = shape[0] * shape[1]
    if main.dtype != torch.uint8 or main.nbytes != (count + 1) // 2:
        raise CheckpointError(
            f"{main.label}: expected {(count + 1) // 2} packed bytes for shape {list(shape)} from {CONFIG}, "
            f"got {list(main.shape)} of {main.dtype}"
        )
    state = item.parts[item.name + _QUANT_STATE]
    if state.nbytes > 4096:
        raise CheckpointError(f"{state.label}: larger than 4096 bytes, refused")


def _load_all(
    items: list[_Item], dtype: torch.dtype, device: torch.device, quantizer: bool | None
) -> tuple[dict[str, Tensor | NF4Weight], dict[str, str]]:
    """Load every item; returns the weights and the digests of what was stored, both by name.

    Args:
        quantizer: double_quant for dense linears, or None to leave them dense.
    """
    # One buffer for everything that is converted: allocating and freeing each tensor leaves holes in the heap between
    # the packed weights, 100 MiB and more.
    converted = [item.main.nbytes for item in items if not _is_kept(item, dtype, device, quantizer)]
    scratch = torch.empty(max(converted, default=0), dtype=torch.uint8)
    loaded: dict[str, Tensor | NF4Weight] = {}
    digests: dict[str, str] = {}
    total = sum(part.nbytes for item in items for part in item.parts.values())
    with tqdm(total=total, desc="loading backbone", unit="B", unit_scale=True, disable=None, leave=False) as progress:
        for item in items:
            buffer = None if _is_kept(item, dtype, device, quantizer) else scratch
            tensors = {name: part.read(buffer) for name, part in item.parts.items()}
            for name, tensor in tensors.items():
                digests[name] = _digest(tensor)
                _require_finite(tensor, item.parts[name].label)
            loaded[item.name] = _convert(item, tensors, dtype, device, quantizer)
            progress.update(sum(part.nbytes for part in item.parts.values()))
    return loaded, digests


def _is_kept(item: _Item, dtype: torch.dtype, device: torch.device, quantizer: bool | None) -> bool:
    """Whether the bytes read from the file are the loaded weight itself, so that they need memory of their own."""
    quantized = quantizer is not None and item.expected.linear
    return item.packed or (device.type == "cpu" and item.main.dtype == dtype and not quantized)


def _convert(
    item: _Item, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device, quantizer: bool | None
) -> Tensor | NF4Weight:
    """The weight of an item from its stored tensors: as bitsandbytes packed it, packed now, or in the compute dtype."""
    if item.packed:
        try:
            weight = NF4Weight.from_bitsandbytes(tensors, name=item.name)
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(f"{item.main.label}: {error}") from error
        if tuple(weight.shape) != item.expected.shape:
            raise CheckpointError(
                f"{item.main.label}: expected shape {list(item.expected.shape)} from {CONFIG}, "
                f"its quant_state says {list(weight.shape)}"
            )
        return weight.to(device)
    tensor = tensors[item.name].to(device)
    if quantizer is not None and item.expected.linear:
        source = tensor.float() if tensor.dtype == torch.float64 else tensor
        return quantize_nf4(source, double_quant=quantizer)
    converted = tensor.to(dtype)
    _require_finite(converted, f"{item.main.label}: as {dtype}")
    return converted


def _require_finite(tensor: Tensor, label: str) -> None:
    """Raise unless all values are finite; min and max propagate NaN and need no mask as large as the tensor."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise CheckpointError(f"{label}: holds non-finite values (NaN or infinity)")


def _digest(tensor: Tensor) -> str:
    """sha256 of up to eight evenly spaced spans of the values; floating ones count as fp32, however they are stored."""
    flat = tensor.reshape(-1)
    if flat.numel() > _SPANS * _SPAN_LENGTH:
        last = flat.numel() - _SPAN_LENGTH
        starts = [last * i // (_SPANS - 1) for i in range(_SPANS)]
        flat = torch.cat([flat[start : start + _SPAN_LENGTH] for start in starts])
    values = flat.to(torch.float32) if flat.is_floating_point() else flat
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + values.numpy().tobytes()).hexdigest()


def _fingerprint(config: BackboneConfig, packing: str, digests: Mapping[str, str]) -> str:
    """See `Backbone.fingerprint`. Fields at their default are left out, so that a new field changes no old result."""
    facts = {
        entry.name: getattr(config, entry.name)
        for entry in dataclasses.fields(config)
        if getattr(config, entry.name) != entry.default
    }
    content = {"format": 1, "config": facts, "packing": packing, "tensors": dict(digests)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def assemble(
    config: BackboneConfig, loaded: Mapping[str, Tensor | NF4Weight]
) -> tuple[Tensor, list[Block], Tensor, Tensor]:
    """Embedding, blocks, final norm weight and head from tensors by their names in a checkpoint."""
    names = config.names

    def linear(prefix: str) -> Linear:
        return Linear(loaded[f"{prefix}.weight"], loaded.get(f"{prefix}.bias"))

    blocks = []
    for index in range(config.num_layers):
        prefix = names.layer.format(index)
        blocks.append(
            Block(
                attention_norm=loaded[prefix + names.attention_norm],
                query=linear(prefix + names.query),
                key=linear(prefix + names.key),
                value=linear(prefix + names.value),
                output=linear(prefix + names.output),
                mlp_norm=loaded[prefix + names.mlp_norm],
                gate=linear(prefix + names.gate),
                up=linear(prefix + names.up),
                down=linear(prefix + names.down),
                query_norm=loaded.get(prefix + names.query_norm),
                key_norm=loaded.get(prefix + names.key_norm),
            )
        )
    embedding = loaded[names.embedding]
    head = embedding if config.tie_word_embeddings else loaded[names.head]
    return embedding, blocks, loaded[names.final_norm], head
