"""The adapter folder: what a trained side network is saved as, and strict loading of it.

    ladder_config.json     format version, `LadderConfig`, and which backbone it was trained beside
    ladder.safetensors     the side network's weights, fp32, and in its metadata a sha256 over them
    README.md              model card
    tokenizer files, chat template     where a tokenizer is given

The JSON may come from a stranger: it is size-capped, every key and type is checked, and shapes are taken from the
configuration, never from the weight file. Files are written under a temporary name and renamed, so that a name never
holds half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.backbone import Backbone
from engine.backbone.loader import HEAD_DTYPES
from engine.config import LadderConfig
from engine.model.model_card import model_card
from engine.model.side_network import SideNetwork
from ladder_kernels import NF4Weight

CONFIG_NAME = "ladder_config.json"
WEIGHTS_NAME = "ladder.safetensors"
FORMAT_VERSION = 1

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class BackboneRecord:
    """Which backbone an adapter belongs to, as written into its folder.

    Attributes:
        source: folder or hub id it was loaded from.
        fingerprint: `Backbone.fingerprint()`.
        dtype: compute dtype, as in "bfloat16".
        quantized: whether its linears are NF4.
        double_quant: whether their scales are quantized too.
        head_dtype: what its head is kept as, one of `HEAD_DTYPES`.
    """

    source: str
    fingerprint: str
    dtype: str
    quantized: bool
    double_quant: bool
    head_dtype: str = "dense"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            expected = bool if field.type == "bool" else str
            if type(value) is not expected:
                raise ValueError(f"backbone record: {field.name} must be a {expected.__name__}, got {value!r}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"backbone record: dtype must name a torch dtype, got {self.dtype!r}")
        if self.head_dtype not in HEAD_DTYPES:
            raise ValueError(
                f"backbone record: head_dtype must be one of {', '.join(HEAD_DTYPES)}, got {self.head_dtype[:40]!r}"
            )

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneRecord:
        """The record of a loaded backbone; a local source becomes an absolute path."""
        weight = backbone.blocks[0].query.weight
        quantized = isinstance(weight, NF4Weight)
        source = str(Path(backbone.source).resolve()) if Path(backbone.source).is_dir() else backbone.source
        return cls(
            source=source,
            fingerprint=backbone.fingerprint(),
            dtype=str(backbone.dtype).removeprefix("torch."),
            quantized=quantized,
            double_quant=isinstance(weight, NF4Weight) and weight.double_quant,
            head_dtype=backbone.head_dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; a dense head is left out, so that the format is the one of before there was a choice."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("head_dtype", "dense")}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def scheme(self) -> str:
        """What its weights are kept as."""
        if not self.quantized:
            scheme = "not quantized"
        else:
            scheme = "NF4 with double quantization" if self.double_quant else "NF4"
        if self.head_dtype != "dense":
            scheme += f", head {self.head_dtype}"
        return scheme

    def describe(self) -> str:
        """Source, quantization and the start of the fingerprint, for messages."""
        return f"{self.source} ({self.scheme}, fingerprint {self.fingerprint[:12]})"


@dataclass(frozen=True)
class AdapterRecord:
    """The content of ladder_config.json."""

    config: LadderConfig
    backbone: BackboneRecord


def save_adapter(
    folder: str | Path,
    config: LadderConfig,
    backbone: Backbone,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write an adapter folder, replacing an adapter that is there.

    Args:
        folder: created if it is missing.
        config: of the side network.
        backbone: the one it was trained beside.
        weights: the side network's state dict.
        tokenizer: saved along, chat template included.

    Raises:
        ValueError: the folder holds another model.
    """
    folder = Path(folder)
    check_no_foreign_model(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = BackboneRecord.of(backbone)
    tensors = {name: weight.detach().to("cpu", torch.float32).contiguous() for name, weight in weights.items()}
    content = {"format_version": FORMAT_VERSION, "ladder": config.to_dict(), "backbone": record.to_dict()}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    replace_file(folder / "README.md", model_card(config, record, sum(t.numel() for t in tensors.values())).encode())
    # In the same file as what it is of: no crash comes between the two. safetensors itself loads flipped bits. It also
    # writes entries in a random order, so there is one: the same weights are the same bytes.
    metadata = {"sha256": _digest(tensors)}
    replace_file(folder / WEIGHTS_NAME, serialize_tensors(tensors, metadata=metadata))
    replace_file(folder / CONFIG_NAME, (json.dumps(content, indent=2) + "\n").encode())


def check_no_foreign_model(folder: Path) -> None:
    """Refuse a folder that holds a model which is no adapter: its config.json, tokenizer and README would be lost.

    Raises:
        ValueError: there is a config.json without a ladder_config.json.
    """
    if (folder / "config.json").exists() and not (folder / CONFIG_NAME).exists():
        raise ValueError(
            f"{folder}: holds another model, perhaps the backbone itself, which an adapter would overwrite; choose an "
            "empty folder"
        )


def read_adapter(folder: str | Path) -> AdapterRecord:
    """Read and check ladder_config.json.

    Raises:
        ValueError: no adapter there, another format version, unknown or missing keys, values out of range.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected an adapter folder written by save_pretrained")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {_MAX_CONFIG_BYTES}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}; use a matching ladder-engine"
        )
    try:
        _check_keys(content, ("format_version", "ladder", "backbone"))
        names = {field.name for field in fields(BackboneRecord)}
        if isinstance(content["backbone"], dict):
            names -= {"head_dtype"} - content["backbone"].keys()
        _check_keys(content["backbone"], names)
        return AdapterRecord(LadderConfig.from_dict(content["ladder"]), BackboneRecord(**content["backbone"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_adapter(folder: str | Path, side_network: SideNetwork, backbone: Backbone) -> None:
    """Load an adapter's weights into a side network of the same configuration beside the same backbone.

    Nothing is changed unless all of it is right.

    Raises:
        ValueError: another backbone, another configuration, or weights that are missing, unexpected, of another shape
            or dtype, not finite, or not those that were saved (files from before that was recorded are taken as found).
    """
    folder = Path(folder)
    record = read_adapter(folder)
    check_backbone(record, backbone, folder)
    wanted, found = side_network.config.to_dict(), record.config.to_dict()
    different = [f"{name} is {found[name]!r}, not {wanted[name]!r}" for name in wanted if wanted[name] != found[name]]
    if different:
        raise ValueError(f"{folder / CONFIG_NAME}: not the configuration of this side network: {'; '.join(different)}")
    side_network.load_state_dict(_read_weights(folder / WEIGHTS_NAME, side_network.state_dict()))


def check_backbone(record: AdapterRecord, backbone: Backbone, folder: str | Path) -> None:
    """Refuse a backbone other than the one an adapter was trained beside.

    Raises:
        ValueError: the fingerprints differ.
    """
    here = BackboneRecord.of(backbone)
    if here.fingerprint != record.backbone.fingerprint:
        raise ValueError(
            f"{folder}: this adapter was trained beside the backbone {record.backbone.describe()}, but got "
            f"{here.describe()}; its outputs would be meaningless there. Load the recorded backbone or train anew"
        )


def _read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the side network's weights beside {CONFIG_NAME}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            if missing := sorted(expected.keys() - names):
                raise ValueError(
                    f"{path}: {len(missing)} missing tensors, first {missing[0]}; expected {len(expected)}"
                )
            if unexpected := sorted(names - expected.keys()):
                raise ValueError(f"{path}: {len(unexpected)} unexpected tensors, first {unexpected[0]}")
            weights = {}
            for name, parameter in expected.items():
                entry = file.get_slice(name)
                if tuple(entry.get_shape()) != tuple(parameter.shape) or entry.get_dtype() != "F32":
                    raise ValueError(
                        f"{path}: tensor {name} must be F32 of shape {tuple(parameter.shape)}, got {entry.get_dtype()} "
                        f"of shape {tuple(entry.get_shape())}"
                    )
                weights[name] = file.get_tensor(name)
                if not torch.isfinite(weights[name]).all():
                    raise ValueError(
                        f"{path}: tensor {name} holds NaN or infinity; the file is damaged or training diverged"
                    )
            saved, found = (file.metadata() or {}).get("sha256"), _digest(weights)
            if saved not in (None, found):
                raise ValueError(
                    f"{path}: its weights have the sha256 {found[:12]}..., those saved had {saved[:12]}...: the file "
                    "is damaged; copy it again, or take it from a checkpoint"
                )
            return weights
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from error


def _digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes of contiguous tensors on the CPU."""
    hashed = hashlib.sha256()
    for name in sorted(weights):
        hashed.update(name.encode() + b"\0")
        hashed.update(weights[name].numpy().data)
    return hashed.hexdigest()


def _check_keys(values: Any, expected: Collection[str]) -> None:
    if not isinstance(values, dict) or set(values) != set(expected):
        got = sorted(str(key)[:40] for key in values)[:10] if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"expected an object with the keys {sorted(expected)}, got {got}")


def replace_file(path: Path, content: bytes) -> None:
    """Write through a temporary name: a reader sees the old file or the new one.

    The mode is the umask's, or that of the file it replaces.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
