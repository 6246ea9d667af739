"""What the processes of one training do together, so that none waits for one that has left."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils import gather_object


def all_or_none(action: Callable[[], object] | None) -> None:
    """Act in some of the processes; where it fails in one, all raise that.

    Args:
        action: of this process; None: it only hears of the others.

    Raises:
        ValueError, OSError: as the first process in which there was one.
    """
    error = None
    try:
        if action is not None:
            action()
    except (ValueError, OSError) as own:
        error = own
    for found in gather_object([error]):
        if found is not None:
            raise found
