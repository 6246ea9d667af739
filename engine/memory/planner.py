"""From a memory budget to policies, to what fits, and to advice: what `ladder plan` prints and training checks."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.backbone.families import BackboneConfig
from engine.config import LadderConfig
from engine.memory.cards import CARDS, Card, break_even_tokens, step_work
from engine.memory.plan import MemoryPlan, plan_memory
from engine.memory.workload import GB, MemoryPolicies, Workload

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_CARD_SHARE = 11 / 12  # 11.0e9 bytes of a card sold as "12 GB"
_LARGEST = 1 << 24  # rows; nobody trains on more in one pass

# What a policy costs in exactness, which the bound on time does not see.
_INEXACTNESS = {
    ("taps", "int8"): 1,
    ("head_dtype", "int8"): 2,
    ("head_dtype", "nf4"): 3,
    ("optimizer", "adamw_8bit"): 2,
}


def parse_bytes(text: str) -> int:
    """Bytes of "12GB", "11.5 GiB" or a plain number; GB is 1e9.

    Raises:
        ValueError: something else, or nothing at all.
    """
    match = _SIZE.fullmatch(str(text))
    unit = _UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or unit is None or not 1 <= float(match[1]) * unit < math.inf:
        raise ValueError(f"expected an amount of memory such as 12GB or 11.5GiB, got {text!r}")
    return int(float(match[1]) * unit)


def usable_bytes(card_bytes: int) -> int:
    """What may be allocated on a card sold with so much memory: context, display and fragmentation take the rest."""
    return int(card_bytes * _CARD_SHARE)


Choices = Mapping[str, Sequence[Any]]
EVERY_CHOICE: Choices = {
    "taps": ("device", "int8", "host"),
    "head_dtype": ("dense", "int8", "nf4"),
    "optimizer": ("adamw", "adamw_8bit"),
}


@dataclass(frozen=True)
class Planner:
    """Plans for one backbone and side network.

    Attributes:
        backbone: shapes of the backbone.
        config: of the side network.
        card: whose times decide between policies that fit.
        beside: configurations of further side networks that train on the same passes, in a sweep.
    """

    backbone: BackboneConfig
    config: LadderConfig
    card: Card = CARDS[0]
    beside: tuple[LadderConfig, ...] = ()

    def plan(self, work: Workload, policies: MemoryPolicies) -> MemoryPlan:
        """The memory of that work under those policies."""
        return plan_memory(self.backbone, self.config, work, policies, self.beside)

    def seconds(self, work: Workload, plan: MemoryPlan) -> float:
        """The bound on a step's time on the card, to two digits: a smaller gain is no reason for a worse policy."""
        return float(f"{step_work(self.backbone, self.config, work, plan).seconds(self.card):.2g}")

    def choose(self, work: Workload, budget: int, choices: Choices = EVERY_CHOICE) -> MemoryPlan | None:
        """The plan of `auto`: of those that fit the fastest, then the most exact, then the one with the least on the
        bus; None where nothing fits.

        Args:
            work: what is trained.
            budget: bytes.
            choices: the words to choose from.
        """
        fitting = [plan for plan in self._candidates(work, budget, choices) if plan.peak_bytes <= budget]
        return min(fitting, key=lambda plan: self._cost(work, plan), default=None)

    def leanest(self, work: Workload, choices: Choices = EVERY_CHOICE) -> MemoryPlan:
        """The plan that needs least, whatever it costs."""
        return min(self._candidates(work, 0, choices), key=lambda plan: plan.peak_bytes)

    def _cost(self, work: Workload, plan: MemoryPlan) -> tuple[float, int, int, int]:
        inexactness = sum(cost for (field, word), cost in _INEXACTNESS.items() if getattr(plan.policies, field) == word)
        streamed = plan.host["streamed layers"] + plan.host["taps"]
        return self.seconds(work, plan), inexactness, streamed, plan.peak_bytes

    def _candidates(self, work: Workload, budget: int, choices: Choices) -> Iterator[MemoryPlan]:
        """Every combination; of those that stream, the one that keeps as many layers as the budget allows."""
        for words in itertools.product(*choices.values()):
            base = MemoryPolicies(**dict(zip(choices, words, strict=True)))
            yield self.plan(work, base)
            streaming = replace(base, residency="host")
            layers = largest(
                lambda count, policies=streaming: self._fits(work, policies, count, budget), self.backbone.num_layers
            )
            yield self.plan(work, replace(streaming, resident_layers=min(layers, self.backbone.num_layers - 1)))

    def _fits(self, work: Workload, policies: MemoryPolicies, layers: int, budget: int) -> bool:
        return self.plan(work, replace(policies, resident_layers=layers)).peak_bytes <= budget

    def largest_batch(self, work: Workload, policies: MemoryPolicies, budget: int) -> int:
        """Documents of work.tokens in one pass that fit; 0 if not even one."""
        return largest(lambda n: self.plan(replace(work, batch=n), policies).peak_bytes <= budget, _LARGEST)

    def largest_context(self, work: Workload, policies: MemoryPolicies, budget: int) -> int:
        """Tokens of a single document that fit; 0 if not even one."""
        one = replace(work, batch=1)
        return largest(lambda n: self.plan(replace(one, tokens=n), policies).peak_bytes <= budget, _LARGEST)

    def largest_group(self, work: Workload, policies: MemoryPolicies, budget: int) -> int:
        """Micro-batches of a step that may pass the backbone together; at least 1."""

        def fits(count: int) -> bool:
            return self.plan(replace(work, group=count), policies).peak_bytes <= budget

        return max(1, largest(fits, work.accumulation))

    def remedies(self, work: Workload, policies: MemoryPolicies, budget: int) -> list[str]:
        """Up to three changes, the least costly first, each with the peak that it leads to; all of them fit if any
        single one does."""
        choices: list[tuple[str, Workload, MemoryPolicies]] = []
        if work.eval_batch > 1:
            fewer = replace(work, eval_batch=work.eval_batch // 2)
            choices.append(("half the evaluation batch", fewer, policies))
        if work.group > 1:
            fewer = replace(work, group=work.group // 2)
            choices.append(("half the group_tokens, which pass the backbone together", fewer, policies))
        if work.batch > 1:
            half = replace(work, batch=work.batch // 2, accumulation=2 * work.accumulation)
            choices.append(("halve the batch and double the gradient accumulation", half, policies))
        is_card = work.device_type == "cuda"
        if policies.taps == "device":
            choices.append(("taps as int8", work, replace(policies, taps="int8")))
        if is_card and policies.residency == "device":
            choices.append(("stream the layers from the host", work, replace(policies, residency="host")))
        if policies.head_dtype == "dense":
            choices.append(("head as int8", work, replace(policies, head_dtype="int8")))
        if work.tokens > 1:
            choices.append(("half the tokens", replace(work, tokens=work.tokens // 2), policies))
        planned = [(text, self.plan(changed, kept).peak_bytes) for text, changed, kept in choices]
        if self.beside:
            fewer = replace(self, beside=self.beside[: len(self.beside) // 2])
            networks = f"{1 + len(fewer.beside)} of the sweep's {1 + len(self.beside)} networks"
            planned.insert(0, (networks, fewer.plan(work, policies).peak_bytes))
        fitting = [choice for choice in planned if choice[1] <= budget]
        chosen = fitting or sorted(planned, key=lambda choice: choice[1])
        return [f"{text}: {peak / GB:.2f} GB" for text, peak in chosen[:3]]


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in 1..limit that fits, 0 if none does, by bisection: what fits has to fit for less as well.

    Of memory that holds but for scratch, which shrinks by up to half a chunk of logits where one more is cut.
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plan_table(plan: MemoryPlan) -> list[str]:
    """Parts as rows, phases as columns, in GB, of small models in MB."""
    unit, name = (GB, "GB") if plan.peak_bytes >= GB else (10**6, "MB")
    parts = list(dict.fromkeys(itertools.chain(*plan.phases.values())))
    rows = [[name, *plan.phases]]
    for part in parts:
        sizes = [phase.get(part, 0) for phase in plan.phases.values()]
        if any(sizes):
            rows.append([part, *(f"{size / unit:.3f}" if size else "" for size in sizes)])
    rows.append(["total", *(f"{plan.phase_bytes(phase) / unit:.3f}" for phase in plan.phases)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def plan_summary(plan: MemoryPlan) -> list[str]:
    """Policies, the table, peak and host memory."""
    host = ", ".join(f"{part} {size / GB:.2f}" for part, size in plan.host.items() if size)
    return [
        f"Policies      {plan.policies.describe()}",
        *plan_table(plan),
        f"Peak          {plan.peak_bytes / GB:.2f} GB on the device ({plan.peak_phase})",
        f"Host memory   {plan.host_bytes / GB:.2f} GB ({host})",
    ]


def budget_report(planner: Planner, work: Workload, card_bytes: int) -> list[str]:
    """What `ladder plan` says: the policy that fits a card of so much memory, its plan, its time, and what fits."""
    budget = usable_bytes(card_bytes)
    head = f"Budget        {budget / GB:.2f} GB of {card_bytes / GB:.2f}: the rest is the driver's and fragmentation's"
    plan = planner.choose(work, budget)
    if plan is None:
        least = planner.leanest(work)
        return [
            head,
            f"Does not fit: the leanest policy needs {least.peak_bytes / GB:.2f} GB.",
            *plan_summary(least),
            *(f"Remedy        {text}" for text in planner.remedies(work, least.policies, budget)),
        ]
    return [
        head,
        *plan_summary(plan),
        f"Largest       {_largest_text(planner, work, plan.policies, budget)}",
        f"Leanest       {_largest_text(planner, work, planner.leanest(work).policies, budget)}",
        *time_lines(planner, work, plan),
    ]


def _largest_text(planner: Planner, work: Workload, policies: MemoryPolicies, budget: int) -> str:
    batch, context = planner.largest_batch(work, policies, budget), planner.largest_context(work, policies, budget)
    return f"batch {batch:,} of {work.tokens:,} tokens, context {context:,} tokens at batch 1: {policies.describe()}"


def time_lines(planner: Planner, work: Workload, plan: MemoryPlan) -> list[str]:
    """The bound on a step's time on every card, and from how many rows streaming hides behind compute."""
    step = step_work(planner.backbone, planner.config, work, plan)
    rows = work.rows * work.accumulation
    lines = ["Step time     at least, on the data sheet's figures:"]
    for card in CARDS:
        seconds, hidden_above = step.seconds(card), break_even_tokens(planner.backbone, card)
        lines.append(
            f"  {card.name:<17} {seconds * 1e3:>7,.0f} ms  {rows / seconds:>9,.0f} tokens/s  "
            f"bound by {step.limit(card)}; streaming hides above {hidden_above:,.0f} tokens a pass"
        )
    return lines
