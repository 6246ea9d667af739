"""Training arguments with defaults that suit a side network."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

DEFAULT_MAX_LENGTH = 1024
DEFAULT_LEARNING_RATE = 3e-3


@dataclass
class LadderArguments(TrainingArguments):
    """`transformers.TrainingArguments` with other defaults, `max_length` and `ignore_memory_plan`.

    The learning rate is about ten times what low-rank adapters take (LST trains side networks with 3e-3), reached after
    a warm-up of 3 % of the steps and followed by a cosine. Evaluation never builds logits.
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
    ignore_memory_plan: bool = field(default=False, metadata={"help": "Start even where the plan exceeds free memory."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; expected at least 2 tokens")
