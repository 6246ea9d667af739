"""Real trainings in processes of their own, killed at any moment or out of disk, then resumed to the bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from safetensors.torch import load_file

from engine.checkpoints import store

STEPS = 12
DATA = [{"prompt": f"{i} plus {j} is ", "completion": str(i + j) * (1 + i)} for i in range(4) for j in range(4)]
# Children are forked from a process that has imported these: a second instead of twelve.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["engine.training.trainer", "engine.data.dataset", "transformers.models.llama"])


def train(backbone: Path, folder: Path, resume: bool, save_model: bool = True) -> None:
    """A training that saves after every step, and at its end."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # pictures take longer than all the rest
    import torch

    from engine import LadderArguments, LadderConfig, LadderTrainer

    torch.set_num_threads(1)
    arguments = LadderArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    config = LadderConfig(reduction_factor=2)
    trainer = LadderTrainer(str(backbone), arguments, train_dataset=DATA, ladder_config=config)
    trainer.train(resume_from_checkpoint=resume)
    if save_model:
        trainer.save_model()


def started(backbone: Path, folder: Path) -> ForkServerProcess:
    process = FORKS.Process(target=train, args=(backbone, folder, bool(store.checkpoints(folder))))
    process.start()
    return process


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2")


@pytest.fixture(scope="module")
def undisturbed(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a training that nothing happened to, and the seconds that it took."""
    for _ in range(2):  # the first one waits for the imports
        folder, begin = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
        process = started(backbone, folder)
        process.join()
        assert process.exitcode == 0
    return folder, time.monotonic() - begin


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    expected, found = (load_file(path / "ladder.safetensors") for path in (undisturbed, folder))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(weight) for name, weight in expected.items())


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_times(backbone: Path, undisturbed: tuple[Path, float], tmp_path: Path, rounds: int) -> None:
    """SIGKILL after a random time, again and again in the same folder; then the training is left alone."""
    whole, seconds = undisturbed
    delay, killed = random.Random(rounds), 0
    for _ in range(rounds):
        process = started(backbone, tmp_path)
        process.join(delay.uniform(0, seconds))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0
        if store.checkpoints(tmp_path):
            store.newest_valid(tmp_path)
        if process.exitcode == 0:
            assert_same_end(tmp_path, whole)
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert killed, "every training was done before its time was up"
    last = started(backbone, tmp_path)
    last.join()
    assert last.exitcode == 0
    assert_same_end(tmp_path, whole)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_a_full_disk(backbone: Path, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    """On a file system that has room for one checkpoint and a half."""
    whole, _ = undisturbed
    size = sum(path.stat().st_size for path in store.newest_valid(whole).iterdir()) * 3 // 2
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, f"mount -t tmpfs none {small}"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process mount a file system of its own")
    training = (
        "import sys, pathlib, test_sudden_end as test\n"
        "test.train(*map(pathlib.Path, sys.argv[1:]), resume=False, save_model=False)\n"
    )
    steps = f'mount -t tmpfs -o size={size} none {small} && "$@" && cp -r {small} {kept}'
    done = subprocess.run(
        [*namespace, steps, "sh", sys.executable, "-c", training, str(backbone), str(small)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "No space left on device" in done.stderr and "training goes on" in done.stderr
    assert [step for step, _ in store.checkpoints(kept)] == [1]
    assert not list(kept.glob(".*"))
    last = started(backbone, kept)
    last.join()
    assert last.exitcode == 0
    assert_same_end(kept, whole)
