"""What a user can mend is said in one message with an exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

USAGE_ERROR, RUN_ERROR = 2, 1


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """One message instead of a traceback for what a user can mend."""
    try:
        yield
    except ValueError as error:
        _fail(error, USAGE_ERROR)
    except OSError as error:
        _fail(error, RUN_ERROR)
    except (RuntimeError, MemoryError) as error:
        from engine.training.guards import DivergedError
        from engine.training.out_of_memory import TrainingMemoryError, is_out_of_memory

        if isinstance(error, DivergedError):
            _fail(error, RUN_ERROR)
        if not is_out_of_memory(error):
            raise
        if isinstance(error, TrainingMemoryError):
            _fail(error, RUN_ERROR)
        _fail(
            "out of memory; lower --batch-size or --max-length, and stream the backbone: --budget in training, "
            f"--residency host elsewhere: {error}",
            RUN_ERROR,
        )


def _fail(message: object, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
