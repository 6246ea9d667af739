"""Which runs, in which order, so that every prefix of the grid is of use.

    1  as many learning rates of every method, one seed, at the middle budget, and further ones while the best is the
       smallest or the largest that was tried: whoever is tuned worse would only seem worse
    2  at each method's best rate: the other seeds
    3  the other tasks, of the methods in COMPARED and COMPARED_AT: learning rates, then seeds, at the middle budget
       times EFFORTS
    4  the other budgets, and up to the middle one the other sizes, of the methods in SCALED
    5  variants of the methods, one change each
    6  as many steps for all instead of as many FLOPs

What is not said to be another one is the first size and the first task. Stages 2 to 6 depend on what was found before:
`next_runs` reads it from the rows, so a grid that was stopped goes on where it was, whatever was done by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality.backbones import SIZES
from benchmarks.quality.methods import find_method
from benchmarks.quality.rows import Row, Run
from engine.training.trainer import LadderTrainer

EFFORTS = {"prose": 3.0, "hops": 8.0, "hops_steps": 4.0}
"""Times the middle budget, for tasks that it is too short for: it is 17 steps of prose, whose documents are longer; at
hops a ladder only begins to do better than chance after three times as much, sooner where steps are written out."""
COMPARED = ("qlora_r16", "qlora_r16_checkpointing", "lora_top_half", "ladder", "xladder", "rejoin")
"""Methods that are tried on every task."""
COMPARED_AT = {"hops": ("xladder:num_taps=2", "xladder:num_taps=6")}
"""Variants that are tried as methods of their own: depth without taps is said to help with reasoning."""
SCALED = ("qlora_r16", "ladder", "rejoin")
"""Methods that are trained at other sizes and budgets."""


@dataclass(frozen=True)
class Grid:
    """What is to be compared.

    Attributes:
        sizes, tasks: the first of each is the one that is looked at in depth.
        methods: each with all its learning rates.
        rates: how many learning rates a method tries at first: of its grid, the ones in the middle.
        seeds: at least 1.
        budgets: rising, in FLOPs.
        steps: of all methods alike; None: not compared so.
        variants: methods as `find_method` reads them, each at the best rate of the method that it is one of.
    """

    sizes: tuple[str, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    rates: int
    seeds: int
    budgets: tuple[float, ...]
    steps: int | None
    variants: tuple[str, ...]

    @property
    def middle(self) -> str:
        """The budget at which learning rates are chosen, on the first task."""
        return self.middle_of(self.tasks[0])

    def middle_of(self, task: str) -> str:
        """The same on any task."""
        return budget_name(self.budgets[len(self.budgets) // 2] * EFFORTS.get(task, 1.0))


def budget_name(flops: float) -> str:
    """As `Run.budget` has it."""
    return f"flops={flops:.6g}"


def next_runs(grid: Grid, rows: Sequence[Row]) -> list[Run]:
    """The first run of the grid that has no row, and what is trained beside it; none where all have rows.

    All learning rates of a side network are tried in one training, from one pass of the backbone.
    """
    done = {row.run for row in rows}
    first = next((run for run in _runs(grid, rows) if run not in done), None)
    if first is None:
        return []
    if first.method not in _tuned(grid, first.task) or find_method(first.method).trainer is not LadderTrainer:
        return [first]
    sweep = [run for run in _sweep(grid, [first.method], first.task) if run not in done]
    return sweep if first in sweep else [first]


def best_rate(grid: Grid, rows: Sequence[Row], method: str, task: str) -> float:
    """The learning rate of the lowest loss with the first seed, at the middle budget of the first size.

    A variant `NAME:...` that was not tried itself takes its method's. Where neither was, the middle of the grid.
    """
    for name in (method, method.partition(":")[0]):
        if tried := _tried(grid, rows, name, task):
            return min(tried, key=lambda rate: tried[rate])
    rates = rates_of(method, grid.rates)
    return rates[len(rates) // 2]


def _tried(grid: Grid, rows: Sequence[Row], method: str, task: str) -> dict[float, float]:
    """Loss by learning rate with the first seed, at the middle budget of the first size."""
    return {
        row.run.learning_rate: row.loss
        for row in rows
        if (row.run.method, row.run.size, row.run.task) == (method, grid.sizes[0], task)
        and (row.run.budget, row.run.seed) == (grid.middle_of(task), 0)
    }


def rates_of(method: str, count: int) -> tuple[float, ...]:
    """The `count` learning rates in the middle of the method's grid."""
    rates = find_method(method).learning_rates
    first = (len(rates) - count) // 2
    return rates[first : first + count]


def _runs(grid: Grid, rows: Sequence[Row]) -> Iterator[Run]:
    """All runs in order; a stage is read only after the ones before it are done, so its rates are known by then."""
    size, task, seeds = grid.sizes[0], grid.tasks[0], range(grid.seeds)

    def at_best(method: str, size: str, task: str, budget: str) -> Iterator[Run]:
        rate = best_rate(grid, rows, method, task)
        return (Run(method, size, task, budget, rate, seed) for seed in seeds)

    yield from _tuning(grid, rows, task)
    for method in grid.methods:
        yield from at_best(method, size, task, grid.middle)
    for other in grid.tasks[1:]:
        yield from _tuning(grid, rows, other)
        for method in _tuned(grid, other):
            yield from at_best(method, size, other, grid.middle_of(other))
    for any_size in grid.sizes:
        # Smaller ones take more steps for their FLOPs and have then learned what they can: QLoRA's loss beside 0.8M was
        # 3.815 at 1e12 and, one seed that is in no file, 3.818 at 2e12.
        for flops in grid.budgets if any_size == size else grid.budgets[: len(grid.budgets) // 2 + 1]:
            for method in (method for method in grid.methods if method in SCALED):
                yield from at_best(method, any_size, task, budget_name(flops * EFFORTS.get(task, 1.0)))
    for seed in seeds:
        for variant in (name for name in grid.variants if _is_variant_here(grid, name)):
            yield Run(variant, size, task, grid.middle, best_rate(grid, rows, variant, task), seed)
    if grid.steps is not None:
        for method in grid.methods:
            yield from at_best(method, size, task, f"steps={grid.steps}")


def _tuned(grid: Grid, task: str) -> list[str]:
    """Methods whose learning rates are all tried on the task."""
    if task == grid.tasks[0]:
        return list(grid.methods)
    compared = (*COMPARED, *COMPARED_AT.get(task, ()))
    return [method for method in compared if _is_variant_here(grid, method)]


def _is_variant_here(grid: Grid, method: str) -> bool:
    """Whether it is one of the grid's methods, or a change of one that fits beside the first size."""
    if method.partition(":")[0] not in grid.methods:
        return False
    try:
        find_method(method).check_fits(SIZES[grid.sizes[0]].layers)
    except ValueError:
        return False
    return True


def _tuning(grid: Grid, rows: Sequence[Row], task: str) -> Iterator[Run]:
    """The learning rates of all, then for each method those on both sides of its best."""
    yield from _sweep(grid, _tuned(grid, task), task)
    for method in _tuned(grid, task):
        rates, tried = find_method(method).learning_rates, _tried(grid, rows, method, task)
        best = rates.index(best_rate(grid, rows, method, task))
        for rate in rates[max(best - 1, 0) : best + 2]:
            if rate not in tried:
                yield Run(method, grid.sizes[0], task, grid.middle_of(task), rate, 0)


def _sweep(grid: Grid, methods: Sequence[str], task: str) -> Iterator[Run]:
    """The rates in the middle first, of all methods, then those further out."""
    rates = {method: rates_of(method, grid.rates) for method in methods}
    for place in sorted(range(grid.rates), key=lambda place: abs(2 * place - grid.rates + 1)):
        for method in methods:
            yield Run(method, grid.sizes[0], task, grid.middle_of(task), rates[method][place], 0)
