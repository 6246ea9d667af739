"""Gradient accumulation layer by layer: all micro-batches of a step pass one backbone layer, then the next.

One by one, n micro-batches decode every NF4 weight n times, and stream it n times where layers lie in host memory. The
backbone takes rows without a batch dimension and documents do not see each other, so a group of micro-batches is one
pass over their rows; the side network, whose weights are small, runs per micro-batch beside it. Losses and backwards
stay one by one, in the order and with the arithmetic of the stock loop, and each frees its side network's memory.

A group keeps, until its losses, the hidden state that the output joins and what backward needs: the hidden states its
taps hold and the side states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from engine.model.causal_lm import LadderForCausalLM

Batch = Mapping[str, Any]
Passed = tuple[Tensor, Tensor]


class LayerMajor:
    """Hands out, for each micro-batch of a step, what the backbone and side network computed of it.

    Args:
        group_tokens: a group is as many consecutive micro-batches as have this many tokens together.
    """

    def __init__(self, group_tokens: int) -> None:
        self._group_tokens = group_tokens
        self._waiting: deque[Batch] = deque()
        self._passed: deque[Passed] = deque()

    def begin(self, batches: Sequence[Batch]) -> None:
        """Announce the micro-batches of the next optimizer step, in order."""
        self._waiting, self._passed = deque(batches), deque()

    def take(self, model: LadderForCausalLM, batch: Batch, prepare: Callable[[Batch], Batch]) -> Passed | None:
        """What was computed of the next announced micro-batch; None where it has to be run alone.

        Args:
            model: what runs.
            batch: the micro-batch; one that was not announced ends the announcements.
            prepare: puts a micro-batch on the model's device.
        """
        if not self._waiting or self._waiting[0] is not batch:
            self.begin(())
            return None
        if not self._passed:
            group = self._next_group()
            if len(group) > 1:
                self._passed.extend(model.run_ahead([prepare(member) for member in group]))
        self._waiting.popleft()
        return self._passed.popleft() if self._passed else None

    def _next_group(self) -> list[Batch]:
        group: list[Batch] = []
        tokens = 0
        for batch in self._waiting:
            tokens += batch["input_ids"].numel()
            if group and tokens > self._group_tokens:
                break
            group.append(batch)
        return group
