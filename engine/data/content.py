"""What a data set holds, as far as a few of its samples tell."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

SAMPLED = 16


def sampled_digest(data: Any) -> str:
    """Length of a data set with places to index, and sha256 over `SAMPLED` samples from the first to the last.

    Another length, order, tokenizer or template is seen, and so is another cut or mask; a change of samples in between
    is not. Samples that are not the same each time they are asked for (drawn masks, say) leave the length alone.
    """
    around = random.getstate(), np.random.get_state(), torch.get_rng_state()
    places = sorted(set(np.linspace(0, len(data) - 1, min(SAMPLED, len(data))).astype(int).tolist()))
    try:
        first, again = ("\n".join(_text(data[place]) for place in places) for _ in range(2))
    finally:  # samples may be drawn, and training draws the same whether or not it was looked at first
        random.setstate(around[0])
        np.random.set_state(around[1])
        torch.set_rng_state(around[2])
    return f"{len(data)}:{hashlib.sha256(first.encode()).hexdigest() if first == again else 'drawn'}"


def _text(value: Any) -> str:
    """As JSON; of what cannot be written so its type."""
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError, RuntimeError, RecursionError):
        return type(value).__name__


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__
