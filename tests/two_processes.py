"""What each of several processes does in test_data_parallel.py: torchrun ... two_processes.py BACKBONE FOLDER."""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from engine import LadderArguments, LadderConfig, LadderForCausalLM, LadderTrainer, load_backbone
from engine.checkpoints.processes import all_or_none
from engine.checkpoints.store import checkpoints
from engine.data.dataset import prepare_dataset
from engine.data.packing import PackedDataset

RAGGED = [{"prompt": "q" * (1 + i % 5), "completion": "ab" * (1 + (7 * i) % 11)} for i in range(24)]
HELDOUT = RAGGED[:7]  # not a multiple of processes x batch, and the first ones are not like the others
GLOBAL_BATCH, STEPS = 8, 3


@dataclass(frozen=True)
class Case:
    """A training of `STEPS` steps; `batch` is per process."""

    name: str
    batch: int
    dtype: torch.dtype = torch.float64
    optimizer: str = "adamw_torch"
    preset: str = "xladder"

    def accumulation(self, processes: int) -> int:
        return GLOBAL_BATCH // (self.batch * processes)


CASES = (
    Case("4x1", 4),
    Case("2x2", 2),
    Case("1x4", 1),
    Case("sgd", 2, optimizer="sgd"),
    Case("fp32", 2, torch.float32, optimizer="sgd"),
    Case("qst", 2, preset="qst"),
)


class Probe(TrainerCallback):
    """Keeps the first step's gradients and, of DDP, the bytes of every bucket that is all-reduced."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.reduced_bytes = self.buckets = self.storages = 0
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wrapped = self.trainer.model_wrapped
        if state.global_step == 0 and isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, self._count)

    def _count(self, group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        self.reduced_bytes += bucket.buffer().nbytes
        self.buckets += 1
        return allreduce_hook(group, bucket)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {f"gradient.{name}": p.grad.clone() for name, p in model.named_parameters()}
            self.storages = len({p.grad.untyped_storage().data_ptr() for p in model.parameters()})


def made(
    case: Case, backbone: Path, folder: Path, processes: int, callbacks: list[TrainerCallback], **more: Any
) -> LadderTrainer:
    """The trainer of a case."""
    model = LadderForCausalLM.from_backbone(
        load_backbone(backbone, dtype=case.dtype, quantize=False),
        LadderConfig.preset(case.preset, reduction_factor=2),
    )
    model.side_network.to(case.dtype)
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "optim": case.optimizer,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": case.batch,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": case.accumulation(processes),
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return LadderTrainer(
        model,
        LadderArguments(**(arguments | more)),
        train_dataset=RAGGED,
        eval_dataset=HELDOUT,
        callbacks=callbacks,
    )


class Kill(TrainerCallback):
    """Sends SIGTERM to this process in its second step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def resume(backbone: Path, folder: Path, rank: int, processes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a training of which one process was told to stop, and that went on; and those of one left alone."""
    case = Case("resume", 2, torch.float32)
    saves = {"save_strategy": "steps", "save_steps": 2}
    alone = made(case, backbone, folder / "alone", processes, [], **saves)
    alone.train()
    cut, status = made(case, backbone, folder / "shared", processes, [Kill()] if rank == 1 else [], **saves), None
    try:
        cut.train()
    except SystemExit as left:
        status = left.code
    again = made(case, backbone, folder / "shared", processes, [], **saves)
    again.train(resume_from_checkpoint=True)
    parameters = zip(again.model.side_network.named_parameters(), alone.model.side_network.parameters(), strict=True)
    weights = {}
    for (name, resumed), expected in parameters:
        weights |= {f"resumed.{name}": resumed.detach(), f"alone.{name}": expected.detach().clone()}
    return weights, {"status": status, "stopped_at": cut.state.global_step, "steps": again.state.global_step}


def signal_while_agreeing(
    backbone: Path, folder: Path, rank: int, processes: int, at: int, **more: Any
) -> dict[str, Any]:
    """What becomes of a SIGTERM that one process receives when it has just told the others that it has none."""
    case, calls, late = Case("agree", 2, torch.float32), 0, []
    trainer = made(case, backbone, folder / f"agree-{at}", processes, [], **more)

    def gather(flag: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return trainer.accelerator.gather(flag)

    before = signal.signal(signal.SIGTERM, lambda number, frame: late.append(number))
    trainer.interruption._trainer = SimpleNamespace(args=trainer.args, accelerator=SimpleNamespace(gather=gather))
    status = None
    try:
        trainer.train()
    except SystemExit as left:
        status = left.code
    signal.signal(signal.SIGTERM, before)
    saved = [step for step, _ in checkpoints(Path(trainer.args.output_dir))]
    return {"status": status, "stopped_at": trainer.state.global_step, "late": len(late), "saved": saved}


def told_together(rank: int) -> str:
    """What a process hears of another one's failure."""

    def fail() -> None:
        raise ValueError("only the first one knows")

    try:
        all_or_none(fail if rank == 0 else None)
    except ValueError as error:
        return str(error)
    return ""


def packed_heldout(trainer: LadderTrainer) -> PackedDataset:
    backbone = trainer.model.backbone
    limits = {"max_length": 32, "vocab_size": backbone.config.vocab_size}
    return PackedDataset(prepare_dataset(HELDOUT, backbone.tokenizer(), **limits), 32)


def train(case: Case, backbone: Path, folder: Path, processes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients of the first step and weights after the last, and the numbers that the run gave."""
    probe = Probe()
    trainer = probe.trainer = made(case, backbone, folder / case.name, processes, [probe])
    model = trainer.model
    trainer.train()
    weights = {f"weight.{name}": weight for name, weight in model.side_network.named_parameters()}
    logged = [line for line in trainer.state.log_history if "loss" in line]
    numbers = {
        "losses": [line["loss"] for line in logged],
        "grad_norms": [line["grad_norm"] for line in logged],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "test_loss": trainer.predict(HELDOUT).metrics["test_loss"],
        "packed_loss": trainer.evaluate(packed_heldout(trainer))["eval_loss"],
        "reduced_bytes": probe.reduced_bytes,
        "buckets": probe.buckets,
        "storages": probe.storages,
        "find_unused": trainer.args.ddp_find_unused_parameters,
    }
    trainer.save_model()
    return probe.gradients | {name: weight.detach().clone() for name, weight in weights.items()}, numbers


def main(backbone: Path, folder: Path) -> None:
    """Train every case; leave `rank.safetensors`, `rank.json` and whatever the Trainer writes in a folder per rank."""
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # as if it were not installed: pictures take seconds
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tensors, numbers = {}, {}
    for case in CASES:
        found, numbers[case.name] = train(case, backbone, folder / f"output-{rank}", processes)
        tensors |= {f"{case.name}.{name}": value for name, value in found.items()}
    found, numbers["resume"] = resume(backbone, folder / "resume", rank, processes)
    numbers["agreed"] = {
        str(at): signal_while_agreeing(backbone, folder, rank, processes, at, save_strategy="no")
        for at in (1, STEPS, STEPS + 1)
    }
    numbers["told"] = {"message": told_together(rank)}
    save_file(tensors | found, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(numbers))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
