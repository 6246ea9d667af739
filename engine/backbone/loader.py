"""From a checkpoint to a `Backbone`, one tensor at a time, so that host memory holds the packed model and one tensor.

Layers that are streamed leave the device as soon as they are quantized: for one buffer each in host memory, or for the
packed cache, from which they are mapped. The device never holds more than one of them.

Everything that can be wrong without reading weights (config, index, shard headers, names, shapes, dtypes) is checked
before the first weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.backbone.block import Block, Linear
from engine.backbone.decoder import Backbone
from engine.backbone.families import (
    IGNORED_SUFFIXES,
    BackboneConfig,
    ExpectedTensor,
    backbone_config,
    expected_tensors,
    parse_config,
)
from engine.backbone.files import CONFIG, locate, locate_weights, read_json, stored_tensors
from engine.backbone.fingerprint import digest, fingerprint, stored_digest
from engine.backbone.host_memory import check_available
from engine.backbone.layout import PackedBlock, pack, packed_nbytes
from engine.backbone.packed_cache import PackedCacheWriter, read_packed_cache
from engine.backbone.residency import Layers, Placement, place
from engine.backbone.shards import CheckpointError, StoredTensor
from engine.dtypes import compute_dtype
from ladder_kernels import HeadWeight, NF4Weight, quantize_int8, quantize_nf4

HEAD_DTYPES = ("dense", "int8", "nf4")
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_QUANT_STATE = ".quant_state.bitsandbytes__nf4"
_PACKED_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _QUANT_STATE)


@dataclass(frozen=True)
class _Item:
    """One tensor to load: its parts in the checkpoint (one if dense, up to six if packed by bitsandbytes).

    `layer` is the index of the block it belongs to, None for embedding, final norm and head.
    """

    name: str
    expected: ExpectedTensor
    parts: Mapping[str, StoredTensor]
    layer: int | None

    @property
    def packed(self) -> bool:
        return len(self.parts) > 1

    @property
    def main(self) -> StoredTensor:
        return self.parts[self.name]


@dataclass(frozen=True)
class _Target:
    """What checkpoint tensors become: `quantizer` is double_quant for dense linears, or None to leave them dense.

    `hosted` is the name of the embedding, where it stays in host memory; `pack_head` and `head` say what to make of the
    tensor of that name.
    """

    dtype: torch.dtype
    device: torch.device
    quantizer: bool | None
    layers_device: torch.device
    hosted: str | None
    head: str
    pack_head: Callable[[Tensor], HeadWeight] | None

    def quantizes(self, item: _Item) -> bool:
        return self.quantizer is not None and item.expected.linear and not item.packed

    def packs(self, item: _Item) -> bool:
        return self.pack_head is not None and item.name == self.head

    def computes_on(self, item: _Item) -> torch.device:
        """Where a tensor is converted."""
        return torch.device("cpu") if item.name == self.hosted else self.device

    def keeps(self, item: _Item) -> bool:
        """Whether the bytes read from the file are the loaded weight itself, so that they need their own memory."""
        same = self.computes_on(item).type == "cpu" and item.main.dtype == self.dtype
        return item.packed or (same and not self.quantizes(item) and not self.packs(item))


def load_backbone(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: bool = True,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    residency: str = "device",
    layer_budget: int | None = None,
    prefetch: int = 1,
    packed_cache: str | Path | None = None,
    head_dtype: str = "dense",
) -> Backbone:
    """Load a frozen backbone from a local folder or a hub id in Hugging Face layout. Only safetensors are read.

    Peak host memory is the loaded model plus its largest tensor plus small change; with another residency than "device"
    plus one layer, and without the layers where they are mapped from a packed cache.

    Args:
        dtype: of norms, embedding, head and hidden states; None picks `engine.dtypes.compute_dtype(device)`.
        quantize: pack the linears of the blocks to NF4. A checkpoint already packed by bitsandbytes is kept to the bit.
        double_quant: quantize the block scales as well; without effect on a packed checkpoint.
        device: where the backbone computes.
        revision: branch, tag or commit of a hub id.
        residency: "device" keeps all layers there; "host" keeps them in host memory, pinned for a GPU, and streams each
            to the device while the one before computes; "auto" keeps as many there as fit `layer_budget`. All
            compute the same bits.
        layer_budget: bytes on the device for the layers, staging buffers included, with "auto".
        prefetch: how many layers are fetched ahead, 1 or 2; there is one staging buffer more.
        packed_cache: a file that the packed layers are written to, once, and mapped from: the next load does not
            quantize, streamed layers need no memory of their own, and processes share what is in memory of it. Mapped
            memory is not pinned, so it is copied more slowly.
        head_dtype: "dense" keeps the head in `dtype`; "int8" (one scale a row) halves 16 bits, "nf4" quarters them.
            Both are decoded in panels where they are multiplied. On the shipped quickstart backbone (a tied head of
            128 columns) they raise the held-out loss before training from 4.9817 to 4.9822 and 5.0696: perplexity by
            0.06 % and 9 %.

    Raises:
        ValueError: anything wrong with the arguments, the checkpoint or the cache, or too little memory for what is
            asked; the message names the file and the tensor.
    """
    device = torch.device(device)
    placement = Placement(residency, layer_budget, prefetch, None if packed_cache is None else Path(packed_cache))
    dtype = compute_dtype(device) if dtype is None else dtype
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, COMPUTE_DTYPES))}, got {dtype}")
    if dtype == torch.float64 and quantize:
        raise ValueError("dtype torch.float64 needs quantize=False: NF4 decodes to 32 or 16 bits")
    if head_dtype not in HEAD_DTYPES:
        raise ValueError(f"head_dtype: expected one of {', '.join(HEAD_DTYPES)}, got {head_dtype!r}")
    if dtype == torch.float64 and head_dtype != "dense":
        raise ValueError(f'dtype torch.float64 needs head_dtype="dense", got {head_dtype!r}')
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
    packing = "as stored" if prequantized else f"nf4 double_quant={double_quant}" if quantize else "dense"
    pack_head = {"dense": None, "int8": quantize_int8, "nf4": partial(quantize_nf4, double_quant=double_quant)}[
        head_dtype
    ]
    is_head = config.tie_word_embeddings and pack_head is None
    target = _Target(
        dtype,
        device,
        quantizer,
        layers_device=device if placement.is_direct else torch.device("cpu"),
        hosted=None if is_head else config.names.embedding,
        head=config.names.head,
        pack_head=pack_head,
    )
    loaded, layers, digests = _load(config, items, target, placement, packing)
    if config.tie_word_embeddings and pack_head is not None:
        loaded[config.names.head] = pack_head(loaded[config.names.embedding]).to(device)
    if spare_head is not None and stored_digest(spare_head) != digests[config.names.embedding]:
        raise CheckpointError(
            f"{spare_head.label}: differs from the embedding although {CONFIG} ties them; "
            "set tie_word_embeddings to false"
        )
    return Backbone(
        config,
        hf_config,
        *with_layers(config, loaded, layers),
        source=str(source),
        folder=folder,
        fingerprint=fingerprint(config, packing + ("" if head_dtype == "dense" else f", head {head_dtype}"), digests),
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
    prefixes = [(config.names.layer.format(index), index) for index in range(config.num_layers)]
    missing = [name for name in expected if name not in rest]
    if missing:
        files = ", ".join(sorted({tensor.path.name for tensor in stored.values()})[:3])
        raise CheckpointError(f"{files}: {len(missing)} tensors are missing, first {', '.join(missing[:3])}")
    items = []
    for name, wanted in expected.items():
        packed = prequantized and wanted.linear and name + _QUANT_STATE in rest
        part_names = [name + part for part in (_PACKED_PARTS if packed else ("",))]
        parts = {part: rest.pop(part) for part in part_names if part in rest}
        layer = next((index for prefix, index in prefixes if name.startswith(prefix)), None)
        items.append(_Item(name, wanted, parts, layer))
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


def _load(
    config: BackboneConfig, items: list[_Item], target: _Target, placement: Placement, packing: str
) -> tuple[dict[str, HeadWeight], Layers, dict[str, str]]:
    """Everything, layers where the placement wants them; returns other weights and the digests by name, too."""
    blocks: dict[int, Block] = {}
    if placement.is_direct:
        loaded, digests = _load_all(config, items, target, blocks.__setitem__)
        return loaded, Layers([blocks[index] for index in range(config.num_layers)], target.device), digests
    if placement.packed_cache is None:
        packed: dict[int, PackedBlock] = {}

        def keep(index: int, block: Block) -> None:
            if not packed:
                check_available(packed_nbytes(block) * config.num_layers)
            packed[index] = pack(block)

        loaded, digests = _load_all(config, items, target, keep)
        in_order = [packed.pop(index) for index in range(config.num_layers)]
        return loaded, place(in_order, target.device, placement), digests
    path = placement.packed_cache
    digests = {name: stored_digest(part) for item in items for name, part in item.parts.items()}
    identity = (fingerprint(config, packing, digests), target.dtype)
    cached = read_packed_cache(path, *identity)
    if cached is not None:
        loaded, _ = _load_all(config, [item for item in items if item.layer is None], target, blocks.__setitem__)
    else:
        with PackedCacheWriter(path, config.num_layers) as writer:
            loaded, _ = _load_all(config, items, target, writer.add)
            writer.commit(*identity)
        cached = read_packed_cache(path, *identity)
        if cached is None:
            raise CheckpointError(f"packed_cache {path}: was not read back as it was written: is the disk all right?")
    return loaded, place(cached, target.device, placement), digests


def _load_all(
    config: BackboneConfig, items: list[_Item], target: _Target, keep: Callable[[int, Block], None]
) -> tuple[dict[str, HeadWeight], dict[str, str]]:
    """Load every item, and hand each block to `keep` with its index as soon as it is complete.

    Returns:
        the weights outside of blocks, and the digests of what was stored, both by name.
    """
    # One buffer for everything that is converted: allocating and freeing each tensor leaves holes in the heap between
    # the packed weights, 100 MiB and more.
    converted = [item.main.nbytes for item in items if not target.keeps(item)]
    scratch = torch.empty(max(converted, default=0), dtype=torch.uint8)
    loaded: dict[str, HeadWeight] = {}
    digests: dict[str, str] = {}
    missing = Counter(item.layer for item in items)
    total = sum(part.nbytes for item in items for part in item.parts.values())
    with tqdm(total=total, desc="loading backbone", unit="B", unit_scale=True, disable=None, leave=False) as progress:
        for item in items:
            tensors = {name: part.read(None if target.keeps(item) else scratch) for name, part in item.parts.items()}
            for name, tensor in tensors.items():
                digests[name] = digest(tensor)
                _require_finite(tensor, item.parts[name].label)
            loaded[item.name] = _convert(item, tensors, target)
            missing[item.layer] -= 1
            if item.layer is not None and not missing[item.layer]:
                keep(item.layer, assemble_block(config, item.layer, loaded))
            progress.update(sum(part.nbytes for part in item.parts.values()))
    return loaded, digests


def _convert(item: _Item, tensors: dict[str, Tensor], target: _Target) -> HeadWeight:
    """The weight of an item from its stored tensors: as bitsandbytes packed it, packed now, or in the compute dtype."""
    home = target.device if item.layer is None else target.layers_device
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
        return weight.to(home)
    tensor = tensors[item.name].to(target.computes_on(item))
    if target.quantizes(item) or target.packs(item):
        source = tensor.float() if tensor.dtype == torch.float64 else tensor
        if target.pack_head is not None and target.packs(item):
            return target.pack_head(source)
        return quantize_nf4(source, double_quant=bool(target.quantizer)).to(home)
    converted = tensor.to(target.dtype)
    _require_finite(converted, f"{item.main.label}: as {target.dtype}")
    return converted if item.name == target.hosted else converted.to(home)


def _require_finite(tensor: Tensor, label: str) -> None:
    """Raise unless all values are finite; min and max propagate NaN and need no mask as large as the tensor."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise CheckpointError(f"{label}: holds non-finite values (NaN or infinity)")


def with_layers(
    config: BackboneConfig, loaded: Mapping[str, HeadWeight], layers: Layers
) -> tuple[Tensor, Layers, Tensor, Tensor]:
    """Embedding, the layers, final norm weight and head."""
    names = config.names
    embedding = loaded[names.embedding]
    return embedding, layers, loaded[names.final_norm], loaded.get(names.head, embedding)


def assemble_block(config: BackboneConfig, index: int, loaded: dict[str, HeadWeight]) -> Block:
    """A decoder block from its tensors by their names in a checkpoint, which are taken out of `loaded`."""
    names, prefix = config.names, config.names.layer.format(index)

    def linear(name: str) -> Linear:
        return Linear(loaded.pop(f"{prefix}{name}.weight"), loaded.pop(f"{prefix}{name}.bias", None))

    return Block(
        attention_norm=loaded.pop(prefix + names.attention_norm),
        query=linear(names.query),
        key=linear(names.key),
        value=linear(names.value),
        output=linear(names.output),
        mlp_norm=loaded.pop(prefix + names.mlp_norm),
        gate=linear(names.gate),
        up=linear(names.up),
        down=linear(names.down),
        query_norm=loaded.pop(prefix + names.query_norm, None),
        key_norm=loaded.pop(prefix + names.key_norm, None),
    )
