"""What `ladder info` shows of backbones and adapters."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.backbone import BackboneConfig
from engine.backbone.families import backbone_config, expected_tensors, parse_config
from engine.backbone.files import CONFIG, locate, read_json
from engine.model.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter


def backbone_lines(source: str) -> list[str]:
    """Family, sizes and bytes of a backbone, from its config alone."""
    config = backbone_config(parse_config(read_json(locate(source), CONFIG)))
    return [f"backbone        {source}", *_size_lines(config)]


def _size_lines(config: BackboneConfig) -> list[str]:
    tensors = expected_tensors(config).values()
    total = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    packed = sum(torch.Size(tensor.shape).numel() for tensor in tensors if tensor.linear)
    # Half a byte per weight, one byte of scale per 64, and a second scale per 256 of those.
    nf4_bytes = packed * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * (total - packed)
    return [
        f"family          {config.family}",
        f"shape           {config.num_layers} blocks, width {config.hidden_size}, {config.num_heads} heads, "
        f"{config.num_kv_heads} key/value heads, {config.vocab_size} tokens",
        f"parameters      {total:,}, of which {packed:,} are stored as NF4",
        f"weights         {nf4_bytes / 2**20:,.1f} MiB as NF4 with 16-bit embeddings, {total / 2**19:,.1f} MiB as bf16",
    ]


def adapter_lines(folder: Path) -> list[str]:
    """Configuration, backbone and bytes of an adapter folder."""
    record, weights = read_adapter(folder), folder / WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file; expected the side network's weights beside {CONFIG_NAME}")
    size = weights.stat().st_size
    settings = ", ".join(f"{name}={value}" for name, value in record.config.to_dict().items())
    return [
        f"adapter         {folder}",
        f"configuration   {settings}",
        f"backbone        {record.backbone.describe()}",
        f"parameters      about {size // 4:,}, fp32",
        f"weights         {size / 2**20:,.1f} MiB",
    ]
