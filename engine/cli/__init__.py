"""The `ladder` command. Imports of torch and transformers wait until a command needs them."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.errors import RUN_ERROR, errors
from engine.cli.use import chat, evaluate, generate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune large language models on small GPUs with Ladder side networks.",
)


@app.command()
def train(
    preset: Annotated[str | None, typer.Option(help="Side network: ladder, xladder, rejoin, lst or qst.")] = None,
    model: Annotated[str | None, typer.Option(help="Backbone: folder or hub id. Default: a tiny one, shipped.")] = None,
    data: Annotated[str | None, typer.Option(help="Training jsonl: text, prompt + completion, or messages.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out jsonl. Default: a seeded share of --data.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for adapter and summary.json.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sample, in tokens.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: three passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights, order and held-out share.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples, or packed rows, in one pass.")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing", help="Fill rows of --max-length tokens with whole samples.")
    ] = None,
    longest_first: Annotated[
        bool | None,
        typer.Option("--longest-first", help="Try the longest samples first, for memory to run out at once."),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option("--gradient-accumulation-steps", "--gradient-accumulation", help="Passes per step.")
    ] = None,
    reduction_factor: Annotated[int | None, typer.Option(help="Backbone width over side width.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file with these names; options win.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace a run in --output.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the newest whole checkpoint in --output.")
    ] = None,
    save_steps: Annotated[int | None, typer.Option(help="Optimizer steps between checkpoints.")] = None,
    budget: Annotated[str | None, typer.Option(help="Memory to train in, as a card is sold: 12GB.")] = None,
    taps: Annotated[
        str | None, typer.Option(help="Where hidden states wait for backward: auto, device, int8, host or none.")
    ] = None,
    head_dtype: Annotated[str | None, typer.Option(help="Frozen head: dense, int8 or nf4.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, or adamw_8bit (torchao).")] = None,
    ignore_memory_plan: Annotated[
        bool | None, typer.Option("--ignore-memory-plan", help="Start even where the plan exceeds free memory.")
    ] = None,
) -> None:
    """Train a side network. Without arguments: the quickstart, offline, on a shipped backbone and task."""
    given = {name: value for name, value in locals().items() if name != "config"}
    with errors():
        options = _train_options(given, config)
        from engine.training.finetune import finetune

        finetune(options, typer.echo)


def sweep(
    vary: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE,VALUE: of several, every combination is a member.")
    ] = None,
    members: Annotated[
        Path | None, typer.Option(help="YAML or JSON file instead: a list of what each member has different.")
    ] = None,
    **options: Any,
) -> None:
    """Train several side networks on the same batches from one backbone pass, and compare them.

    Takes the options of `train`, and what differs between members, such as --vary learning_rate=1e-3,3e-3 --vary
    preset=ladder,xladder.
    """
    config = options.pop("config")
    with errors():
        from engine.training.finetune_sweep import finetune_sweep, sweep_of

        different = sweep_of(vary or [], members)
        finetune_sweep(_train_options(options, config), different, typer.echo)


def _with_options_of(command: Callable[..., None], other: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of `other` in the place of its **options."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters = [*own, *inspect.signature(other, eval_str=True).parameters.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


app.command()(_with_options_of(sweep, train))


def _train_options(given: dict[str, Any], config: Path | None) -> Any:
    """Defaults (the quickstart's beside the shipped backbone), then the file, then the command line."""
    from engine.quickstart.defaults import QUICKSTART
    from engine.training.options import TrainOptions, read_options_file, with_values

    values = {} if config is None else read_options_file(config)
    values |= {name: value for name, value in given.items() if value is not None}
    return with_values(QUICKSTART if values.get("model") is None else TrainOptions(), values)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Backbone: folder, config.json or hub id. No weights are needed.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document.")] = 2048,
    budget: Annotated[
        str, typer.Option(help="Memory of the card as it is sold; of 12GB, 11.0 are planned with.")
    ] = "12GB",
    batch_size: Annotated[int, typer.Option(min=1, help="Documents in one pass.")] = 1,
    gradient_accumulation_steps: Annotated[
        int, typer.Option("--gradient-accumulation-steps", "--gradient-accumulation", min=1, help="Passes per step.")
    ] = 1,
    preset: Annotated[str, typer.Option(help="Side network: ladder, xladder, rejoin, lst or qst.")] = "ladder",
    reduction_factor: Annotated[int, typer.Option(help="Backbone width over side width.")] = 16,
) -> None:
    """Plan the memory of training on a GPU: every part, the policies to choose, time bounds, and what fits."""
    with errors():
        from engine.config import LadderConfig
        from engine.memory.planner import Planner, budget_report, parse_bytes
        from engine.memory.workload import Workload
        from engine.training.preflight import read_shape

        card_bytes = parse_bytes(budget)
        planner = Planner(read_shape(model), LadderConfig.preset(preset, reduction_factor=reduction_factor))
        work = Workload(tokens, batch_size, gradient_accumulation_steps)
        typer.echo("\n".join(budget_report(planner, work, card_bytes)))


app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)


@app.command()
def info(
    model: Annotated[str | None, typer.Option(help="Backbone to describe: folder or hub id.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder to describe.")] = None,
) -> None:
    """Show versions, the native library's state, and a backbone's or adapter's configuration and size."""
    with errors():
        if model is not None and adapter is not None:
            raise ValueError("--model and --adapter: give one of them")
        from engine.cli.diagnosis import system_lines
        from engine.cli.listing import adapter_lines, backbone_lines

        lines = backbone_lines(model) if model is not None else adapter_lines(adapter) if adapter is not None else []
        typer.echo("\n".join([*lines, *system_lines()]))


@app.command()
def doctor() -> None:
    """Show what this machine has and what is missing; exit code 1 where training cannot run."""
    from engine.cli.diagnosis import diagnose

    report = diagnose()
    typer.echo(report.text())
    if not report.can_train:
        raise typer.Exit(RUN_ERROR)


@app.callback(invoke_without_command=True)
def _version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        from engine.cli.diagnosis import version

        typer.echo(f"ladder-engine {version('ladder-engine') or 'not installed'}, Python {platform.python_version()}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    app()
