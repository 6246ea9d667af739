"""Timing without the host: a call captured in a CUDA graph."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.registry import Runnable

_WARM_UP_CALLS = 3  # on the side stream, as capture asks: libraries allocate their workspaces there


def captured(runnable: Runnable) -> Runnable:
    """The same work as one replay of a CUDA graph.

    Raises:
        RuntimeError: the call waits for the device or allocates in a way that cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            runnable.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = runnable.call()

    def replay() -> object:
        graph.replay()
        return output

    # The runnable owns the tensors whose addresses are in the graph.
    owner = runnable

    def cleanup() -> None:
        graph.reset()
        owner.close()

    details = ", ".join(filter(None, (runnable.details, "CUDA graph")))
    return dataclasses.replace(runnable, call=replay, cleanup=cleanup, details=details)
