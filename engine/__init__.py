"""Ladder side tuning: fine-tune a frozen NF4 backbone through a narrow side network.

`import engine` is cheap: torch and transformers are imported when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.arguments import LadderArguments
    from engine.backbone import load_backbone
    from engine.config import LadderConfig
    from engine.model import LadderForCausalLM
    from engine.trainer import LadderTrainer

__version__ = "0.1.0"
__all__ = ["LadderArguments", "LadderConfig", "LadderForCausalLM", "LadderTrainer", "__version__", "load_backbone"]

_HOMES = {
    "LadderArguments": "engine.arguments",
    "LadderConfig": "engine.config",
    "LadderForCausalLM": "engine.model",
    "LadderTrainer": "engine.trainer",
    "load_backbone": "engine.backbone",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
