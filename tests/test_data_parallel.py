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
from two_processes import CASES, GLOBAL_BATCH, HELDOUT, RAGGED, STEPS, Case, train

from engine.checkpoints import store
from engine.training.data_parallel import WholeRounds
from engine.training.finetune import finetune
from engine.training.options import TrainOptions

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


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    options = ["torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run(
        [sys.executable, "-m", *options, *command],
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("two")
    backbone = tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2")
    done = torchrun(str(ROOT / "tests" / "two_processes.py"), str(backbone), str(folder))
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
    for name in ("losses", "grad_norms", "eval_loss", "test_loss", "packed_loss"):
        assert launched.numbers[0][case.name][name] == pytest.approx(numbers[name], rel=max(tolerance, 1e-6)), name
    # Packed rows are fewer than processes x batch, and what fills them up counts for nothing.
    assert numbers["packed_loss"] == pytest.approx(numbers["eval_loss"], rel=max(tolerance, 1e-6))


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


def test_a_signal_while_they_agree_is_heard_of_at_the_next_chance(launched: Launched) -> None:
    """In the first step: after the second. In the last: at the end. After that nobody waits, and its handler has it."""
    last = STEPS + 1
    for rank in range(PROCESSES):
        heard = launched.numbers[rank]["agreed"]
        assert heard["1"] == {"status": 143, "stopped_at": 2, "late": 0, "saved": [2]}
        assert heard[str(STEPS)] == {"status": 143, "stopped_at": STEPS, "late": 0, "saved": [STEPS]}
        assert heard[str(last)] == {"status": None, "stopped_at": STEPS, "late": rank, "saved": []}


def test_what_fails_in_one_process_is_raised_in_all(launched: Launched) -> None:
    for rank in range(PROCESSES):
        assert launched.numbers[rank]["told"] == {"message": "only the first one knows"}


def test_the_command_trains_in_all_processes_and_the_first_one_speaks(tmp_path: Path) -> None:
    """The same as one process with the batches of both, printed and written once."""
    data, backbone = tmp_path / "data.jsonl", tiny_checkpoint(tmp_path, "llama2")
    data.write_text("".join(json.dumps(row) + "\n" for row in RAGGED))
    options = {"model": str(backbone), "data": str(data), "steps": 2, "gradient_accumulation_steps": 1}
    alone = finetune(TrainOptions(**options, batch_size=8, output=str(tmp_path / "alone")), lambda message: None)

    code = "import torch; torch.set_num_threads(1); from engine.cli import main; main()"
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    output = tmp_path / "both"
    done = torchrun(
        "--no-python", sys.executable, "-c", code, "train", *given, "--batch-size", "4", "--output", str(output)
    )
    for line in ("Held-out loss before", "Held-out loss  ", "Data parallel: 2", "First sample", "Saved          "):
        assert done.stdout.count(line) == 1, done.stdout
    summary = json.loads((output / "summary.json").read_text())
    assert summary["heldout_loss_before"] == pytest.approx(alone.heldout_loss_before, rel=1e-6)
    # AdamW's first steps go by the signs of gradients, of which some are noise.
    learned = alone.heldout_loss_before - alone.heldout_loss_after
    assert learned != 0
    assert summary["heldout_loss_before"] - summary["heldout_loss_after"] == pytest.approx(learned, rel=0.05)
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]
