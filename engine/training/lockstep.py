"""Several trainings in lockstep: each runs as it would alone, and wherever all ask for a pass of the backbone, one
answers all.

Every training has a thread of its own and exactly one of all runs at a time, so they are coroutines: one runs until it
asks for a pass, then the next. Whatever a training finds around itself and changes (random numbers, accelerate's view
of the gradient accumulation) is put back when its turn comes, so that it computes the bits that it would compute alone.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState

from engine.model.ladder_model import BackbonePass, LadderModel, Passed, run_pass

logger = logging.getLogger(__name__)


class _Surroundings:
    """State of the process that a training relies on between two of its steps."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self._accelerate = dict(vars(GradientState()))

    def restore(self) -> None:
        """Put it back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        shared = vars(GradientState())
        shared.clear()
        shared.update(self._accelerate)


@dataclass
class Outcome:
    """How a training ended: with what it returned, or with an error."""

    value: Any = None
    error: BaseException | None = None


class _Lane:
    """A function that stands still while it waits for an answer: a coroutine made of a thread."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.asked: BackbonePass | None = None  # what it waits for
        self.passes = 0  # that were answered, of those with a backward
        self.outcome: Outcome | None = None
        self._run = run
        self._answer: list[Passed] | BaseException | None = None
        self._go: SimpleQueue[None] = SimpleQueue()
        self._halt: SimpleQueue[None] = SimpleQueue()
        self._is_running = False
        self._surroundings = _Surroundings()
        self._threads = torch.get_num_threads()
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread: threading.Thread | None = None

    def answer(self, answer: list[Passed] | BaseException) -> None:
        """What `ask` returns, or raises, in its next turn; only the training holds it then, and frees its graph."""
        self.asked, self._answer = None, answer

    def resume(self) -> None:
        """Let it run until it asks for a pass (`asked`) or ends (`outcome`)."""
        outside = _Surroundings()
        self._surroundings.restore()
        self._is_running = True
        try:
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, daemon=True)
                self._thread.start()
            else:
                self._go.put(None)
            self._wait()
        finally:
            self._surroundings = _Surroundings()
            outside.restore()

    def ask(self, asked: BackbonePass) -> list[Passed]:
        """Called by the training: wait for the answer while others run."""
        self.asked = asked
        self._halt.put(None)
        self._go.get()
        answer, self._answer = self._answer, None
        if not isinstance(answer, list):
            raise answer or RuntimeError("a training of a sweep was resumed without an answer")
        return answer

    def close(self, error: BaseException) -> None:
        """End a training that has begun by raising `error` where it stands, or where it will ask next."""
        while self._thread is not None and self.outcome is None:
            if self._is_running:  # an interrupt has called away who waited
                self._wait()
            else:
                self.answer(error)
                self.resume()

    def _wait(self) -> None:
        self._halt.get()
        self._is_running = False

    def _main(self) -> None:
        # Both are a thread's own, and bits depend on the number of threads.
        torch.set_num_threads(self._threads)
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        try:
            self.outcome = Outcome(self._run())
        except BaseException as error:  # handed to whoever asks for the outcome
            self.outcome = Outcome(error=error)
        self._halt.put(None)


class Lockstep:
    """Runs trainings of models that share one backbone and its passes (`LadderForCausalLM.beside`).

    A pass serves all trainings that ask for the same rows. Those that ask for another one than the others wait:
    evaluations go first, and then who is behind.

    Args:
        model: one of theirs.
        before_pass: called before every pass, when all trainings stand still.
        ends_all: whether an error that ends one training is meant for all of them.
    """

    def __init__(
        self,
        model: LadderModel,
        before_pass: Callable[[], None] = lambda: None,
        ends_all: Callable[[BaseException], bool] = lambda error: isinstance(error, KeyboardInterrupt),
    ) -> None:
        self._model = model
        self._before_pass = before_pass
        self._ends_all = ends_all
        self._running: _Lane | None = None
        self._has_warned = False

    def run(self, trainings: Sequence[Callable[[], Any]]) -> list[Outcome]:
        """Run all of them to their ends; an error is the end of one, but before its first pass of all.

        Whatever interrupts this call itself, such as the exit of a second Ctrl-C, ends every training where it stands.
        """
        lanes = [_Lane(training) for training in trainings]
        self._model.meet_at(self._meet)
        try:
            for lane in lanes:
                self._resume(lane)
                if lane.outcome is not None and lane.outcome.error is not None:
                    raise lane.outcome.error
            while waiting := [lane for lane in lanes if lane.outcome is None]:
                self._before_pass()
                self._serve(self._next_group(waiting))
        except BaseException as error:
            for lane in lanes:
                self._running = lane
                lane.close(error)
            raise
        finally:
            self._model.meet_at(None)
        return [lane.outcome for lane in lanes if lane.outcome is not None]

    def _meet(self, asked: BackbonePass) -> list[Passed]:
        assert self._running is not None
        return self._running.ask(asked)

    def _resume(self, lane: _Lane) -> None:
        self._running = lane
        lane.resume()
        error = None if lane.outcome is None else lane.outcome.error
        if error is not None and self._ends_all(error):
            raise error

    def _next_group(self, waiting: Sequence[_Lane]) -> list[_Lane]:
        """Who gets the next pass."""
        asking = {lane: lane.asked for lane in waiting if lane.asked is not None}
        evaluating = [lane for lane, asked in asking.items() if not asked.grad]
        eligible = evaluating or list(asking)
        first = min(eligible, key=lambda lane: lane.passes)
        group = [lane for lane in eligible if lane is first or asking[first].same_rows(asking[lane])]
        if len(group) < len(eligible) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d of %d trainings of the sweep ask for other batches than the others, so passes of the backbone are "
                "not shared: the data set or the collator gives each training other samples",
                len(eligible) - len(group),
                len(eligible),
            )
        return group

    def _serve(self, group: Sequence[_Lane]) -> None:
        """One pass of the backbone, then everyone's turn with what came of it; an error is everyone's."""
        try:
            passed = run_pass(self._model.backbone, [lane.asked for lane in group if lane.asked is not None])
        except Exception as error:
            for lane in group:
                lane.answer(error)
        else:
            for lane in group:
                lane.passes += lane.asked is not None and lane.asked.grad
                lane.answer(passed.pop(0))
        for lane in group:
            self._resume(lane)
