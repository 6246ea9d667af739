"""Several side networks trained on the same batches from one backbone pass: `LadderTrainer(..., sweep=[...])`.

    LadderTrainer(model, args, train_dataset=data, sweep=[{"learning_rate": 1e-3}, {"preset": "xladder", "seed": 1}])

Every member is a whole `LadderTrainer` with its own side network, optimizer, schedule, log, checkpoints and adapter, in
a folder of its own below `output_dir`. They run in lockstep (`engine.training.lockstep`): a pass of the backbone feeds
all of their taps, then each goes on with its loss, its backward and its step. On a CPU a member ends in the bits of
training it alone, where as many micro-batches pass the backbone together (`group_tokens`): more members leave less
memory to group in. What members may have different is in `engine.training.sweep_entries`.

Each stops for itself: one that diverges, runs out of memory or is stopped early leaves the others as they are.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from engine.checkpoints import store
from engine.checkpoints.store import CheckpointError
from engine.model.adapter import load_adapter, replace_file
from engine.training.guards import DivergedError
from engine.training.lockstep import Lockstep, Outcome
from engine.training.out_of_memory import TrainingMemoryError
from engine.training.preflight import fit_memory
from engine.training.sweep_entries import SweepEntry, check_data

if TYPE_CHECKING:
    from engine.training.trainer import LadderMixin

logger = logging.getLogger(__name__)

SWEEP_FILE, MEMBER_FILE = "sweep.json", "member.json"
_FAILURES = (DivergedError, TrainingMemoryError)  # of one member; any other error is one of the program


@dataclass(frozen=True)
class MemberResult:
    """How a member ended, as `member.json` in its folder and as a line of `sweep.json`.

    Attributes:
        name: its folder below the sweep's.
        settings: what it was asked to have different.
        steps: optimizer steps.
        loss: the last one logged in training, nats per token; None if there is none that is finite.
        eval_loss: of the held-out data with the weights that were saved, of several sets the mean; None without any.
        tokens_per_second: at which it trained beside the others.
        trainable_parameters: of its side network.
        error: why it ended early; None if it did not.
    """

    name: str
    settings: dict[str, Any]
    steps: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float
    trainable_parameters: int
    error: str | None = None

    @property
    def score(self) -> float:
        """What the best has least of: the held-out loss, or the training loss where nothing is held out."""
        score = self.loss if self.eval_loss is None else self.eval_loss
        return math.inf if score is None or self.error is not None else score


class Sweep:
    """The members of a sweep and their training.

    Args:
        trainer: what the sweep was asked of; the members take over its data, its collator and, as their first side
            network, its model.
        entries: one for each member.
        callbacks: of whoever built the trainer; every member gets copies.

    Attributes:
        members: the trainers.
        results: of those that have ended, in the same order.
    """

    def __init__(self, trainer: LadderMixin, entries: Sequence[SweepEntry], callbacks: Sequence[Any] | None) -> None:
        check_data(trainer.train_dataset)
        self._trainer = trainer
        self._entries = entries
        models = [trainer.model, *(trainer.model.beside(entry.config) for entry in entries[1:])]
        self.members = [
            type(trainer)(
                model,
                entry.args,
                data_collator=trainer.data_collator,
                train_dataset=trainer.train_dataset,
                eval_dataset=trainer.eval_dataset,
                processing_class=trainer.processing_class,
                callbacks=copy.deepcopy(callbacks),
            )
            for model, entry in zip(models, entries, strict=True)
        ]
        for member, entry in zip(self.members, entries, strict=True):
            member.interruption.leader = trainer.interruption
            member.remove_callback(PrinterCallback)
            if not trainer.args.disable_tqdm:
                member.add_callback(_NamedLines(entry.name))
        self.results: list[MemberResult] = []

    def train(self, resume_from_checkpoint: bool | None = None) -> dict[str, TrainOutput]:
        """Train all members. Afterwards each has its adapter in its folder, `sweep.json` compares them, and the trainer
        that the sweep was asked of has the model of the best.

        Args:
            resume_from_checkpoint: True goes on from the newest step of which every member has a whole checkpoint;
                those that had ended stay as they are.

        Returns:
            what training returned, by name, of the members that ended as planned.

        Raises:
            MemoryPlanError: all of them together would need more memory than is free.
            CheckpointError: members have no step in common to resume from, or would not go on as they were.
            DivergedError, TrainingMemoryError: every member ended so. If only some did, `sweep.json` and a warning say
                which and why.
            SystemExit: SIGTERM (status 143) or SIGINT (130), after checkpoints of all members at the same step.
        """
        ended = self._ended() if resume_from_checkpoint else {}
        running = [member for member in self.members if member not in ended]
        checkpoints = self._checkpoints(running, resume_from_checkpoint)
        self._plan()
        with self._trainer.interruption as interruption:
            lockstep = Lockstep(self._trainer.model.model, before_pass=interruption.agree)
            jobs = [self._job(member, path) for member, path in zip(running, checkpoints, strict=True)]
            outcomes = dict(zip(running, lockstep.run(jobs), strict=True))
            status = interruption.exit_status
        if status is not None:
            raise SystemExit(status)
        ended |= {member: self._result(member, outcome.error) for member, outcome in outcomes.items()}
        self.results = [ended[member] for member in self.members]
        self._conclude(list(outcomes.values()))
        return {
            entry.name: outcomes[member].value
            for member, entry in zip(self.members, self._entries, strict=True)
            if member in outcomes and outcomes[member].error is None
        }

    @property
    def best(self) -> LadderMixin | None:
        """The member with the lowest held-out loss, or training loss where nothing is held out; None if all failed."""
        scored = [(result.score, number) for number, result in enumerate(self.results)]
        score, number = min(scored, default=(math.inf, 0))
        return self.members[number] if score < math.inf else None

    def table(self) -> str:
        """The members that have ended, one a line, the best marked."""
        rows = [["", "member", "steps", "loss", "held-out loss", "tokens/s", "trained"]]
        for member, result in zip(self.members, self.results, strict=True):
            losses = ("-" if loss is None else f"{loss:.4f}" for loss in (result.loss, result.eval_loss))
            row = ["*" if member is self.best else "", result.name, str(result.steps), *losses]
            row += [f"{result.tokens_per_second:,.0f}", f"{result.trainable_parameters:,}"]
            rows.append(row if result.error is None else [*row, result.error.partition(":")[0]])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ("  ".join([*map(str.ljust, row, widths), *row[len(widths) :]]) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _plan(self) -> None:
        """Choose what fits for all; the members take it as their own."""
        fit = fit_memory(self._trainer, [entry.config for entry in self._entries], self._trainer._taps())
        for member in self.members:
            member.fit_of_sweep, member.group_tokens = fit, self._trainer.group_tokens

    def _job(self, member: LadderMixin, checkpoint: Path | None) -> Callable[[], TrainOutput]:
        """A member's training, evaluation of its last step, and adapter."""

        def run() -> TrainOutput:
            record = Path(member.args.output_dir) / MEMBER_FILE
            record.unlink(missing_ok=True)
            try:
                output = member.train(None if checkpoint is None else str(checkpoint))
            except DivergedError as error:
                _write(record, asdict(self._result(member, error)))
                raise
            if member.eval_dataset is not None and not _heldout_losses(member):
                member.evaluate()
            member.save_model()
            _write(record, asdict(self._result(member, None)))
            return output

        return run

    def _result(self, member: LadderMixin, error: BaseException | None) -> MemberResult:
        entry = self._entries[self.members.index(member)]
        lines, clock = member.state.log_history, member.clock
        heldout = _heldout_losses(member)
        return MemberResult(
            name=entry.name,
            settings={
                key: value if isinstance(value, int | float) else str(value) for key, value in entry.settings.items()
            },
            steps=member.state.global_step,
            loss=_finite([line["loss"] for line in lines if "loss" in line][-1:]),
            eval_loss=_finite([sum(heldout) / len(heldout)] if heldout else []),
            tokens_per_second=round(clock.tokens / clock.seconds, 1) if clock.seconds else 0.0,
            trainable_parameters=sum(p.numel() for p in member.model.parameters() if p.requires_grad),
            error=None if error is None else f"{type(error).__name__}: {error}",
        )

    def _conclude(self, outcomes: Sequence[Outcome]) -> None:
        """Report, and let the trainer have the best model; raise what was no failure of a member alone."""
        best = self.best
        if best is not None:
            self._trainer.model = self._trainer.model_wrapped = best.model
        name = None if best is None else self.results[self.members.index(best)].name
        folder = Path(self._trainer.args.output_dir)
        _write(folder / SWEEP_FILE, {"best": name, "members": [asdict(result) for result in self.results]})
        print(self.table())
        for result in self.results:
            if result.error is not None:
                logger.warning("sweep, member %s ended at step %d: %s", result.name, result.steps, result.error)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        for error in errors:
            if best is None or not isinstance(error, _FAILURES):
                raise error

    def _ended(self) -> dict[LadderMixin, MemberResult]:
        """Members of an earlier run that had come to their ends, with what they learned."""
        ended = {}
        for member in self.members:
            folder = Path(member.args.output_dir)
            try:
                result = MemberResult(**json.loads((folder / MEMBER_FILE).read_text(encoding="utf-8")))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{folder / MEMBER_FILE}: cannot be read ({error}); delete it to resume"
                ) from error
            if result.error is None:
                load_adapter(folder, member.model.side_network, member.model.backbone)
            ended[member] = result
        return ended

    def _checkpoints(self, members: Sequence[LadderMixin], resume: bool | None) -> list[Path | None]:
        """Where each goes on: at the newest step of which all have a whole checkpoint."""
        if not resume:
            return [None] * len(members)
        if resume is not True:
            raise ValueError(f"resume_from_checkpoint is {resume!r}; a sweep resumes all its members: pass True")
        folders = [Path(member.args.output_dir) for member in members]
        found = []
        for folder in folders:
            store.sweep(folder)
            found.append(dict(store.checkpoints(folder)))
        faults: list[str] = []
        for step in sorted(set.intersection(*map(set, found)) if found else (), reverse=True):
            try:
                for of_member in found:
                    store.verify(of_member[step])
                return [of_member[step] for of_member in found]
            except CheckpointError as error:
                faults.append(str(error))
                logger.warning("step %d is not resumed: %s", step, error)
        if not members:
            return []
        steps = "; ".join(f"{folder.name}: {sorted(of) or 'none'}" for folder, of in zip(folders, found, strict=True))
        raise CheckpointError(
            f"{self._trainer.args.output_dir}: the members have no step in common to resume from. Steps with "
            f"checkpoints: {steps}" + "".join(f"\n  {fault}" for fault in faults)
        )


class _NamedLines(TrainerCallback):
    """Prints a member's log lines with its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        print(f"{self._name}: {logs}")


_EVAL_LOSS = re.compile(r"eval_(?:\w+_)?loss")


def _heldout_losses(member: LadderMixin) -> list[float]:
    """Of each held-out set, of the step whose weights the member has."""
    state, best = member.state, member.args.load_best_model_at_end and member.state.best_global_step
    of_step = [line for line in state.log_history if line["step"] == (best or state.global_step)]
    return list({name: line[name] for line in of_step for name in line if _EVAL_LOSS.fullmatch(name)}.values())


def _finite(values: Sequence[float]) -> float | None:
    return next((float(value) for value in values if math.isfinite(value)), None)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
