"""Every op of ours at its toy shapes, once or twice: what the memory checker watches. `python -m benchmarks.toys`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.registry import Benchmark, Case, Context, load_benchmarks
from engine.dtypes import compute_dtype

# Decoding text goes through transformers, minutes under a memory checker, and calls no op that the others do not.
_LEFT_OUT = ("generate",)
_ROWS = (1, 3, 17, 130)  # of nf4_linear: a single token, few, more than one tile of tokens, and ragged beyond 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all toys; returns 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toys", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args(arguments).device)
    failed = False
    with tempfile.TemporaryDirectory(prefix="ladder-toys-") as folder:
        context = Context(device, Path(folder))
        for benchmark in load_benchmarks().values():
            if benchmark.name in _LEFT_OUT:
                continue
            for case in _variants(benchmark, device):
                failed |= not _run(benchmark, case, context)
    return int(failed)


def _variants(benchmark: Benchmark, device: torch.device) -> Iterator[Case]:
    """The toy in fp32 and in the dtype the engine computes in on the device, with several numbers of tokens."""
    toy = benchmark.toy
    dtypes = {torch.float32, compute_dtype(device), toy.dtype} if toy.dtype is not None else {None}
    for dtype in sorted(dtypes, key=str):
        for rows in _ROWS if "m" in toy.sizes else (None,):
            sizes = toy.sizes if rows is None else {**toy.sizes, "m": rows}
            yield dataclasses.replace(toy, dtype=dtype, sizes=sizes)


def _run(benchmark: Benchmark, case: Case, context: Context) -> bool:
    if benchmark.prepare is not None:
        benchmark.prepare(case, context)
    succeeded = True
    for implementation in benchmark.implementations:
        if implementation.kind != "ours" or context.device.type not in implementation.devices:
            continue
        what = f"{benchmark.name} {implementation.name} {case.dtype} {dict(case.sizes)}"
        print(what, flush=True)
        try:
            runnable = implementation.build(case, context)
            runnable.call()
            runnable.close()
            if context.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception:
            succeeded = False
            print(f"FAILED {what}\n{traceback.format_exc()}", flush=True)
    return succeeded


if __name__ == "__main__":
    sys.exit(main())
