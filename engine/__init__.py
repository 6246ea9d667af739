"""Ladder side tuning: fine-tune a frozen NF4 backbone through a narrow side network.

`import engine` is cheap: torch and transformers are imported when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.backbone import load_backbone
    from engine.config import LadderConfig
    from engine.model.causal_lm import LadderForCausalLM
    from engine.training.arguments import LadderArguments
    from engine.training.trainer import LadderTrainer

__version__ = "0.1.0"
__all__ = ["LadderArguments", "LadderConfig", "LadderForCausalLM", "LadderTrainer", "__version__", "load_backbone"]

_HOMES = {
    "LadderArguments": "engine.training.arguments",
    "LadderConfig": "engine.config",
    "LadderForCausalLM": "engine.model.causal_lm",
    "LadderTrainer": "engine.training.trainer",
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
