"""What keeps a night's training from ruining itself: steps with a non-finite gradient, and losses that rise.

A gradient with NaN or infinity in it would make every weight NaN in one step, and zeroed gradients would still move
AdamW by its moments. So the optimizer's step is not taken at all; parameters and moments stay as they are, to the bit.
The schedule goes on, as the stock Trainer's does.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_steps.jsonl"
SPIKE_FACTOR, SPIKE_PATIENCE, SPIKE_WINDOW = 2.0, 5, 100


class DivergedError(RuntimeError):
    """Too many steps in a row had a non-finite gradient; the weights are those of the last finite step."""


class GuardedStep:
    """Skips an optimizer's step where the gradient is not finite, counts, and gives up after some in a row.

    Costs one small transfer from the device per optimizer step: the norm and the loss.

    Args:
        optimizer: whose `step` is replaced.
        max_in_row: so many skipped steps in a row raise `DivergedError`.
        loss: of the step that is about to be taken, a tensor; looked at as well.
        describe: called for a skipped step; what it returns goes into the record, such as the step and its samples.
        record: file that gains one line of JSON per skipped step.

    Attributes:
        skipped: steps that were left out so far.
        in_row: those without a step between them, up to now.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_in_row: int,
        loss: Callable[[], Tensor],
        describe: Callable[[], dict[str, Any]],
        record: Path,
    ) -> None:
        self.skipped = 0
        self.in_row = 0
        self._optimizer = optimizer
        self._max_in_row = max_in_row
        self._loss = loss
        self._describe = describe
        self._record = record
        self._step = optimizer.step
        # A bound method: schedulers and loss scales wrap what they find here, and bind it again.
        optimizer.step = MethodType(lambda _, closure=None: self._guarded(closure), optimizer)  # type: ignore[method-assign]

    def _guarded(self, closure: Callable[[], Any] | None) -> Any:
        norm, loss = torch.stack([gradient_norm(self._optimizer).double(), self._loss().double()]).tolist()
        if math.isfinite(norm) and math.isfinite(loss):
            self.in_row = 0
            return self._step(closure)
        self.skipped += 1
        self.in_row += 1
        facts = self._describe() | {"loss": str(loss), "gradient_norm": str(norm)}
        self._write(facts)
        logger.warning(
            "step %s was skipped: its gradient is not finite (norm %s, loss %s); weights and moments are unchanged. "
            "Its samples are in %s",
            facts.get("step"),
            norm,
            loss,
            self._record,
        )
        if self.in_row >= self._max_in_row:
            raise DivergedError(
                f"{self.in_row} steps in a row had a gradient that is not finite, the last at step "
                f"{facts.get('step')} with loss {loss}: training stopped, and the weights are those before the first. "
                f"Look at the samples in {self._record}, lower the learning rate, or resume from a checkpoint before"
            )
        return None

    def _write(self, facts: dict[str, Any]) -> None:
        try:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            with open(self._record, "a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:
            logger.warning("%s: could not be written (%s)", self._record, error)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Norm over all gradients: NaN or infinity in any of them makes it so."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


class SpikeWatch:
    """Says when the loss has stayed above twice the mean of the last steps for several steps.

    Steps within a spike do not enter the mean, so that a long one is not taken for normal.
    """

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._high = 0

    def __call__(self, step: int, loss: float) -> bool:
        """Whether a spike is reported at this step."""
        mean = sum(self._window) / len(self._window) if self._window else math.inf
        if not math.isfinite(loss) or (len(self._window) >= SPIKE_PATIENCE and loss > SPIKE_FACTOR * mean):
            self._high += 1
            if self._high == SPIKE_PATIENCE:
                logger.warning(
                    "the loss has been above %g x its mean (%.4g) for %d logged steps, now %.4g at step %d: the "
                    "learning rate may be too high, or the data changed",
                    SPIKE_FACTOR,
                    mean,
                    SPIKE_PATIENCE,
                    loss,
                    step,
                )
                return True
            return False
        self._high = 0
        self._window.append(loss)
        return False
