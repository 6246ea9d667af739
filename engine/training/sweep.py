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
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from engine.checkpoints import store
from engine.checkpoints.lock import only_training
from engine.checkpoints.store import CheckpointError
from engine.model.adapter import load_adapter, replace_file
from engine.training.guards import DivergedError
from engine.training.lockstep import Lockstep, Outcome
from engine.training.out_of_memory import TrainingMemoryError
from engine.training.preflight import fit_memory
from engine.training.sweep_entries import SweepEntry, check_data

if TYPE_CHECKING:
    from engine.config import LadderConfig
    from engine.model.causal_lm import LadderForCausalLM
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


class Sweep:
    """The members of a sweep and their training.

    Args:
        trainer: what the sweep was asked of; the members take over its data, its collator and, as their first side
            network, its model.
        entries: one for each member.
        callbacks: of whoever built the trainer; every member gets copies, in its `callback_handler`.
        given: the model that the sweep starts from, None where it starts from a backbone alone.

    Attributes:
        members: the trainers.
        results: of those that have ended, in the same order.
    """

    def __init__(
        self,
        trainer: LadderMixin,
        entries: Sequence[SweepEntry],
        callbacks: Sequence[Any] | None,
        given: LadderForCausalLM | None,
    ) -> None:
        check_data(trainer.train_dataset)
        self._trainer = trainer
        self._entries = entries
        models = [trainer.model, *(started_from(given or trainer.model, entry.config) for entry in entries[1:])]
        self.members = [
            type(trainer)(
                model,
                entry.args,
                data_collator=trainer.data_collator,
                train_dataset=trainer.train_dataset,
                eval_dataset=trainer.eval_dataset,
                processing_class=trainer.processing_class,
                callbacks=[_copy(callback) for callback in callbacks or ()],
            )
            for model, entry in zip(models, entries, strict=True)
        ]
        for member, entry in zip(self.members, entries, strict=True):
            member.interruption.leader = trainer.interruption
            member.remove_callback(PrinterCallback)
            if not trainer.args.disable_tqdm:
                member.add_callback(_NamedLines(entry.name))
        self.results: list[MemberResult] = []
        self._run = uuid.uuid4().hex

    def add_callback(self, callback: Any) -> None:
        """Give every member a copy."""
        for member in self.members:
            member.add_callback(_copy(callback))

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
        with only_training(self._trainer.args.output_dir):
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: bool | None) -> dict[str, TrainOutput]:
        ended = self._ended() if resume_from_checkpoint else {}
        running = [member for member in self.members if member not in ended]
        checkpoints = self._checkpoints(running, resume_from_checkpoint)
        self._plan()
        for member in running:
            member.run_of_sweep = self._run
        with self._trainer.interruption as interruption:
            lockstep = Lockstep(
                self._trainer.model.model,
                before_pass=interruption.agree,
                ends_all=lambda error: (
                    isinstance(error, KeyboardInterrupt | SystemExit) and interruption.exit_status is None
                ),
            )
            jobs = [self._job(member, path) for member, path in zip(running, checkpoints, strict=True)]
            outcomes = dict(zip(running, lockstep.run(jobs), strict=True))
            status = interruption.exit_status
        if status is not None:
            for member, outcome in outcomes.items():
                if isinstance(outcome.error, Exception):
                    name = self._entries[self.members.index(member)].name
                    logger.error("sweep, member %s ended with an error", name, exc_info=outcome.error)
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
        """The member with the lowest held-out loss, or training loss where nothing is held out; None without any."""
        is_held_out = self._trainer.eval_dataset is not None
        scores = [result.eval_loss if is_held_out else result.loss for result in self.results]
        scored = [
            (score, number)
            for number, score in enumerate(scores)
            if score is not None and self.results[number].error is None
        ]
        return self.members[min(scored)[1]] if scored else None

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
            with only_training(member.args.output_dir):
                record = Path(member.args.output_dir) / MEMBER_FILE
                record.unlink(missing_ok=True)
                try:
                    output = member.train(None if checkpoint is None else str(checkpoint))
                except DivergedError as error:
                    self._record(member, error)
                    raise
                if member.eval_dataset is not None and not _heldout_losses(member):
                    member.evaluate()
                member.save_model()
                self._record(member, None)
                return output

        return run

    def _record(self, member: LadderMixin, error: BaseException | None) -> None:
        """Leave what a later resume needs to know of a member that has ended."""
        content = {"result": asdict(self._result(member, error)), "settings": member.settings_of_training()}
        _write(Path(member.args.output_dir) / MEMBER_FILE, content)

    def _result(self, member: LadderMixin, error: BaseException | None) -> MemberResult:
        entry = self._entries[self.members.index(member)]
        lines, clock = member.state.log_history, member.clock
        heldout, guard = _heldout_losses(member), getattr(member, "guarded_step", None)
        skips = guard is not None and guard.in_row > 0
        return MemberResult(
            name=entry.name,
            settings={
                key: value if isinstance(value, int | float) else str(value) for key, value in entry.settings.items()
            },
            steps=member.state.global_step,
            # Of steps that are skipped the stock Trainer logs a loss of zero.
            loss=None if skips else _finite([line["loss"] for line in lines if "loss" in line][-1:]),
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
                record = json.loads((folder / MEMBER_FILE).read_text(encoding="utf-8"))
                result, settings = MemberResult(**record["result"]), dict(record["settings"])
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"{folder / MEMBER_FILE}: cannot be read ({error}); delete it to resume"
                ) from error
            member.compare_settings(folder, settings)
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
            found.append(store.of_newest_run(folder))
        faults: list[str] = []
        if len({run for run, _ in found}) > 1:
            faults.append("the members' newest checkpoints are of different sweeps")
            found = [("", {})] * len(found)
        elif found:
            self._run = found[0][0]
        found = [steps for _, steps in found]
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


def started_from(given: LadderForCausalLM, config: LadderConfig) -> LadderForCausalLM:
    """A member's model on the given one's backbone.

    Of the given one's own configuration it starts from the given weights, with what is frozen there; another
    configuration is another network, which starts new.
    """
    model = given.beside(config)
    if config == given.ladder_config:
        model.side_network.load_state_dict(given.side_network.state_dict())
        model.side_network.tap_policy = given.side_network.tap_policy
        for own, theirs in zip(model.parameters(), given.parameters(), strict=True):
            own.requires_grad_(theirs.requires_grad)
    return model


def _copy(callback: Any) -> Any:
    try:
        return copy.deepcopy(callback)
    except Exception as error:
        raise ValueError(
            f"a sweep gives every member a copy of each callback, and {type(callback).__name__} cannot be copied "
            f"({error}): pass its class, or a callback without open files and locks"
        ) from error


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
