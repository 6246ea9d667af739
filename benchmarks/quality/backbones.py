"""Llama-type backbones of several sizes, pretrained on this machine once and kept in a cache folder.

All share the quickstart's tokenizer, its pretraining code and its split, and see about 10 tokens a parameter, as the
shipped one did (30.1 M tokens for 3.0 M parameters). Up to that size the text is the standard library; larger ones also
read installed packages (`sources.PACKAGES`), and 150M, for which even that is short, sees 4 tokens a parameter. None
sees what is held out.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks.quality.sources import PACKAGES, package_files
from engine.quickstart.corpus import SourceFile, standard_library
from engine.quickstart.defaults import backbone_path
from engine.quickstart.pretrain import CONTEXT, Pretraining, backbone_config, pretrain

SHIPPED = "3.0M"


@dataclass(frozen=True)
class Size:
    """Shape of a backbone, and how many tokens it is pretrained on."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    tokens: int

    def pretraining(self) -> Pretraining:
        """Its run: wider models take larger batches and smaller steps, as is usual."""
        batch = 16 if self.hidden_size <= 128 else self.hidden_size // 4
        return Pretraining(
            backbone_config(
                self.hidden_size, self.layers, self.heads, self.kv_heads, self.head_dim, self.intermediate_size
            ),
            steps=self.tokens // (batch * CONTEXT),
            batch=batch,
            peak_lr=3e-3 * min(1.0, 128 / self.hidden_size),
        )


_SIZES = (
    Size("0.8M", 64, 4, 1, 1, 64, 256, tokens=8_000_000),
    Size("1.3M", 96, 4, 3, 1, 32, 384, tokens=13_000_000),
    Size(SHIPPED, 128, 8, 2, 1, 64, 512, tokens=30_105_600),
    Size("12M", 256, 10, 4, 2, 64, 1024, tokens=120_000_000),
    Size("40M", 512, 9, 8, 4, 64, 2048, tokens=400_000_000),
    Size("150M", 768, 16, 12, 6, 64, 3072, tokens=600_000_000),
)
SIZES = {size.name: size for size in _SIZES}


def backbone_folder(size: str, cache: Path, device: torch.device | str = "cpu") -> Path:
    """The transformers checkpoint of a size, tokenizer included; pretrains it below `cache` where it is absent.

    It appears in one step once it is complete: a run that was cut off leaves nothing that is taken for it.

    Raises:
        ValueError: no such size, or the cache holds another backbone under this name.
    """
    if size not in SIZES:
        raise ValueError(f"no backbone of size {size!r}; expected one of {', '.join(SIZES)}")
    return Path(backbone_path()) if size == SHIPPED else _pretrained(SIZES[size], cache, device)


def _pretrained(size: Size, cache: Path, device: torch.device | str) -> Path:
    folder, run = cache / size.name, size.pretraining()
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{size.name}-", dir=cache) as scratch:
            made = Path(scratch) / size.name
            pretrain(made, run, _files(size), AutoTokenizer.from_pretrained(backbone_path()), device)
            made.rename(folder)
    _check(folder, run)
    return folder


def _files(size: Size) -> list[SourceFile]:
    """The text that a size reads, its held-out part included."""
    packages = PACKAGES if size.tokens > SIZES[SHIPPED].tokens else ()
    return standard_library() + [file for package in packages for file in package_files(package)]


def _check(folder: Path, run: Pretraining) -> None:
    """Refuse a cached backbone that another shape or another number of steps made."""
    config = AutoConfig.from_pretrained(folder)
    record = json.loads((folder / "training.json").read_text())
    wanted, found = _facts(run.config), _facts(config)
    if (wanted, run.steps) != (found, record["steps"]):
        raise ValueError(
            f"{folder} holds a backbone of {found} after {record['steps']} steps; expected {wanted} after {run.steps}: "
            "delete the folder, or give another cache"
        )


def _facts(config: AutoConfig) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name) for name in (*names, "intermediate_size")}
