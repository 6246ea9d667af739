"""QLoRA as its users run it: transformers + peft + bitsandbytes, the competitor of `train_step`.

The recipe is peft's: `prepare_model_for_kbit_training` (norms, embedding and head in fp32, gradient checkpointing),
LoRA of rank 16 on all linears of the blocks, and a trainer with `bf16=True`, that is, autocast. NF4 with double
quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LORA_RANK = 16
_PAGE_BYTES = 4096
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_nf4_model(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The NF4 checkpoint in `folder` as transformers and bitsandbytes run it, multiplying in `dtype`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.bfloat16, device_map={"": str(device)}
    )


def qlora_model(model: PreTrainedModel, checkpointing: bool) -> nn.Module:
    """The model with trainable adapters.

    Args:
        model: with bitsandbytes' NF4 linears.
        checkpointing: recompute activations in backward, peft's default, instead of keeping them.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    model.config.use_cache = False
    adapters = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(_LINEARS), task_type="CAUSAL_LM")
    model = get_peft_model(model, adapters).train()
    _make_resident(model)
    return model


def _make_resident(model: nn.Module) -> None:
    """Read every page of the model's tensors.

    transformers leaves NF4 tensors mapped from the file. Their pages would come in during the first step and be counted
    as memory that the step takes, against QLoRA, though they are weights.
    """
    for tensor in _held_tensors(model):
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        # A tensor does not start on a page, so its last byte may lie on one page more.
        data[::_PAGE_BYTES].sum(), data[-1:].sum()


def _held_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter.data
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = getattr(state, "state2", None)


def qlora_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean loss of the labels, under autocast where the dtype is a half one."""
    with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
        return model(input_ids=input_ids, labels=labels).loss


def bitsandbytes_path(device: torch.device) -> str:
    """Which path a Linear4bit takes in a training step."""
    if device.type == "cuda":
        return "bitsandbytes gemm_4bit"
    from bitsandbytes.functional import has_avx512bf16

    note = "present, used for inference only" if has_avx512bf16() else "absent"
    return f"bitsandbytes dequantize + F.linear (AVX512-BF16 path {note})"
