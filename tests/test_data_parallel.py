"""Two processes that share a batch train what one process trains on all of it: torchrun with gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from two_processes import CASES, GLOBAL_BATCH, HELDOUT, STEPS, Case, train

from engine.checkpoints import store
from engine.training.data_parallel import WholeRounds

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
PROCESSES = 2


@dataclass(frozen=True)
class Launched:
    """What two processes left: per rank tensors and numbers, and what they printed."""

    backbone: Path
    folder: Path
    tensors: list[dict[str, Tensor]]
    numbers: list[dict[str, dict[str, Any]]]
    output: str


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("two")
    backbone = tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2")
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    script = [str(ROOT / "tests" / "two_processes.py"), str(backbone), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *script],
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    tensors = [load_file(folder / f"{rank}.safetensors") for rank in range(PROCESSES)]
    numbers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return Launched(backbone, folder, tensors, numbers, done.stdout)


_OF_ONE: dict[Case, tuple[dict[str, Tensor], dict[str, Any]]] = {}


def of_one_process(case: Case, launched: Launched) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training of the case in this process, once for all that ask."""
    if case not in _OF_ONE:
        _OF_ONE[case] = train(case, launched.backbone, launched.folder / f"alone-{len(_OF_ONE)}", 1)
    return _OF_ONE[case]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_and_weights_are_those_of_one_process(launched: Launched, case: Case) -> None:
    """Against all micro-batches of a step in one process and one batch, for every way to cut them."""
    tensors, numbers = of_one_process(replace(case, name="alone", batch=GLOBAL_BATCH), launched)
    tolerance = 1e-9 if case.dtype == torch.float64 else 2e-5
    for name, expected in tensors.items():
        got = launched.tensors[0][f"{case.name}.{name}"]
        error = (got - expected).abs().max().item() / max(expected.abs().max().item(), 1e-3)
        assert error < tolerance, f"{name}: {error}"
    for name in ("losses", "grad_norms", "eval_loss", "test_loss"):
        assert launched.numbers[0][case.name][name] == pytest.approx(numbers[name], rel=max(tolerance, 1e-6)), name


def test_both_processes_have_the_same_bits(launched: Launched) -> None:
    assert launched.tensors[0].keys() == launched.tensors[1].keys()
    assert all(torch.equal(tensor, launched.tensors[1][name]) for name, tensor in launched.tensors[0].items())


def test_a_step_reduces_the_trained_parameters_once(launched: Launched) -> None:
    """Whatever the number of micro-batches; without a search of the graph for unused parameters, or a second copy."""
    for case in CASES:
        prefix = f"{case.name}.gradient."
        once = sum(tensor.nbytes for name, tensor in launched.tensors[0].items() if name.startswith(prefix))
        numbers = launched.numbers[0][case.name]
        assert numbers["reduced_bytes"] == STEPS * once
        assert numbers["find_unused"] is False
        assert numbers["storages"] <= numbers["buckets"], "gradients lie beside the buffers that are reduced"
        said = f"Data parallel: 2 processes, {once / 1e6:.2f} MB all-reduced per step"
        assert launched.output.count(said) >= 1


def test_the_first_process_alone_writes(launched: Launched) -> None:
    for case in CASES:
        first = {path.name for path in (launched.folder / "output-0" / case.name).iterdir()}
        assert {"ladder.safetensors", "metrics.jsonl"} <= first
    assert not [path for path in (launched.folder / "output-1").rglob("*") if path.is_file()]


@pytest.mark.parametrize("as_tensors", [True, False])
def test_whole_rounds_fill_up_with_samples_without_a_loss(as_tensors: bool) -> None:
    rows = [{"input_ids": [1] * n, "labels": [1] * n, "attention_mask": [1] * n} for n in (3, 4, 5)]
    if as_tensors:
        rows = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    data = WholeRounds(rows, 4)
    assert len(data) == 4 and len(WholeRounds(rows, 3)) == 3 and len(HELDOUT) % 4
    assert [data[i] for i in range(3)] == rows
    filler = data[3]
    assert len(filler["attention_mask"]) == len(filler["labels"]) == 3
    assert list(filler["labels"]) == [-100] * 3
    assert type(filler["labels"]) is type(rows[0]["input_ids"])


def test_one_process_that_is_told_to_stop_stops_all_and_they_resume_to_the_bit(launched: Launched) -> None:
    for rank in range(PROCESSES):
        assert launched.numbers[rank]["resume"] == {"status": 143, "stopped_at": 2, "steps": STEPS}
        resumed = {name: value for name, value in launched.tensors[rank].items() if name.startswith("resumed.")}
        assert resumed
        for name, weight in resumed.items():
            assert torch.equal(weight, launched.tensors[rank][name.replace("resumed.", "alone.")]), name
    files = store.verify(launched.folder / "resume" / "shared" / "checkpoint-2").files
    assert {f"random-{rank}.json" for rank in range(PROCESSES)} <= files.keys()
