"""Training arguments with defaults that suit a side network."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from transformers import TrainingArguments

from engine.memory.planner import parse_bytes
from engine.memory.workload import Workload
from engine.model.tap_store import check_tap_policy

DEFAULT_MAX_LENGTH = 1024
# Between the best rates of the tasks of `python -m benchmarks quality`: 1e-2 on text, where the loss is 0.2 to 3.4 %
# higher at 3e-3 (in classification more), and 1e-3 on hops, of which ladders learn nothing at 1e-2.
DEFAULT_LEARNING_RATE = 3e-3
DEFAULT_MAX_SKIPPED_STEPS = 5


@dataclass
class LadderArguments(TrainingArguments):
    """`transformers.TrainingArguments` with other defaults, `max_length`, `packing`, `cuda_graph`, and how to use
    memory: `taps`, `memory_budget`, `ignore_memory_plan` and `longest_first`.

    The learning rate is about ten times what low-rank adapters take (LST trains side networks with 3e-3), reached after
    a warm-up of 3 % of the steps and followed by a cosine. Evaluation never builds logits.

    `cuda_graph` saves the time of launching kernels one by one, for which small models and fast cards wait, where all
    batches have one of a few shapes: see `engine.training.step_graph` and `Collator(pad_to=...)`. It turns
    `logging_nan_inf_filter` off, for which the host would wait for every loss.
    """

    per_device_train_batch_size: int = field(default=4, metadata={"help": "Samples per device in one pass."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Passes per optimizer step."})
    learning_rate: float = field(default=DEFAULT_LEARNING_RATE, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or their share if below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    save_total_limit: int | None = field(default=3, metadata={"help": "Checkpoints to keep."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation returns the loss and nothing else."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Data is tokenized by the trainer itself."})
    max_length: int = field(default=DEFAULT_MAX_LENGTH, metadata={"help": "Longest sample, in tokens."})
    packing: bool = field(
        default=False,
        metadata={
            "help": "Train on rows of up to max_length tokens, each holding as many whole samples as fit, which do not "
            "see each other. A batch size then counts rows. Evaluation is not packed."
        },
    )
    longest_first: bool = field(
        default=False,
        metadata={
            "help": "Try forward and backward of the longest samples before the first step, so that memory that does "
            "not suffice runs out at once. Training gives the same bits."
        },
    )
    cuda_graph: bool = field(
        default=False,
        metadata={
            "help": "Replay forward and backward as one CUDA graph per shape of batches, on one GPU. The graphs keep "
            "the memory of a pass for themselves."
        },
    )
    taps: str = field(
        default="auto",
        metadata={
            "help": "Where hidden states wait for backward: device, int8, host, or none, which does not train the "
            "down-projections. auto: on the device, as int8, on the host, whatever fits first."
        },
    )
    memory_budget: str | None = field(
        default=None,
        metadata={
            "help": "Device memory to train in, as a card is sold, such as 12GB: a backbone that the trainer loads is "
            "streamed as far as that needs. Default: what is free."
        },
    )
    max_skipped_steps: int = field(
        default=DEFAULT_MAX_SKIPPED_STEPS,
        metadata={"help": "Steps in a row left out for a gradient that is not finite before training stops."},
    )
    ignore_memory_plan: bool = field(default=False, metadata={"help": "Start even where the plan exceeds free memory."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; expected at least 2 tokens")
        if self.max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps is {self.max_skipped_steps}; expected at least 1")
        if self.taps != "auto":
            check_tap_policy(self.taps)
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if self.optim == "adamw_torch_8bit" and find_spec("torchao") is None:
            raise ValueError("optim adamw_torch_8bit needs torchao: pip install 'ladder-engine[adamw8bit]'")
        if self.cuda_graph and self.packing:
            raise ValueError("packing makes rows of ever new layouts, each a graph of its own: leave out cuda_graph")
        if self.cuda_graph:
            self.logging_nan_inf_filter = False


def check_supported(args: TrainingArguments) -> None:
    """Refuse what the fused loss cannot do instead of ignoring it.

    Raises:
        ValueError: label smoothing, noise on embeddings, or more than one GPU in one process.
    """
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor is {args.label_smoothing_factor}; the fused loss supports 0 only")
    if args.neftune_noise_alpha is not None:
        raise ValueError("neftune_noise_alpha is set; the embedding belongs to the frozen backbone and takes no noise")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process; start one process per GPU with torchrun, or show it one "
            "with CUDA_VISIBLE_DEVICES"
        )


def optimizer_policy(args: TrainingArguments) -> Literal["adamw", "adamw_8bit"]:
    """In how many bits the optimizer keeps its moments."""
    return "adamw_8bit" if "8bit" in args.optim else "adamw"


def workload(args: TrainingArguments, device_type: str, itemsize: int, longest: int | None = None) -> Workload:
    """What a step of these arguments trains on, every sample as long as the longest, or where that is not known as it
    may be."""
    tokens = longest or getattr(args, "max_length", None) or DEFAULT_MAX_LENGTH
    return Workload(tokens, args.per_device_train_batch_size, args.gradient_accumulation_steps, device_type, itemsize)
