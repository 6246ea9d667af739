"""QLoRA's side of the comparison: peft's LoRA on a transformers model that holds the decoded NF4 values.

Decoded, the linears compute the same function as bitsandbytes' packed ones (its product decodes to the compute dtype
and multiplies), at less cost: nothing is decoded in a step. Everything of the backbone is frozen, norms, embedding and
head too; adapters are fp32. What could be held against the rival is left out: rows are documents side by side without
padding, as FlashAttention's variable-length form lets them be on a GPU, the head multiplies supervised rows only, and
nothing is computed twice but with checkpointing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from engine.backbone import Backbone
from engine.model.rows import IGNORE_INDEX
from ladder_kernels import NF4Weight, dequantize_nf4
from ladder_kernels.attention import attention

_LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
_BY_DOCUMENTS = "by_documents"


class LowRankModel(nn.Module):
    """A frozen decoder with trainable adapters; forward and generate take what `LadderForCausalLM` takes.

    Args:
        backbone: whose weights it decodes; with a folder.
        rank: of the adapters; their scale is 2 (alpha is twice the rank).
        top_blocks: only the uppermost blocks carry adapters: below them nothing is back-propagated. None: all.
        seed: of the initial adapters.
        checkpointing: blocks keep their inputs alone and run again in backward, as QLoRA's recipe has it.
    """

    def __init__(
        self, backbone: Backbone, rank: int, top_blocks: int | None = None, seed: int = 0, checkpointing: bool = False
    ) -> None:
        super().__init__()
        layers, names = backbone.config.num_layers, backbone.config.names
        adapters = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=[getattr(names, linear).rpartition(".")[2] for linear in _LINEARS],
            layers_to_transform=None if top_blocks is None else list(range(layers - top_blocks, layers)),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = get_peft_model(decoded_model(backbone), adapters)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.disable_input_require_grads()  # of the embeddings, which non-reentrant checkpoints need not
        self.train()  # else nothing is checkpointed, neither where FLOPs are counted

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_lengths: Sequence[int],
        supervised_rows: Tensor,
        supervised_targets: Tensor,
        num_items_in_batch: int | Tensor = 1,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Loss of a batch of `engine.data.collator.Collator`: the sum over supervised tokens / `num_items_in_batch`."""
        decoder = self.model.get_base_model()
        hidden = decoder.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, document_lengths=document_lengths
        ).last_hidden_state[0]
        logits = decoder.lm_head(hidden[supervised_rows]).float()
        total = F.cross_entropy(logits, supervised_targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return {"loss": total / num_items_in_batch}

    def generate(self, **inputs: Any) -> Tensor:
        """transformers' own, with its cache, on left-padded prompts."""
        decoder = self.model.get_base_model()
        decoder.set_attn_implementation("sdpa")
        try:
            return self.model.generate(**inputs)
        finally:
            decoder.set_attn_implementation(_BY_DOCUMENTS)


def decoded_model(backbone: Backbone) -> PreTrainedModel:
    """The function of `backbone` as a transformers model in its compute dtype, every NF4 linear decoded."""
    model = AutoModelForCausalLM.from_pretrained(
        backbone.folder, dtype=backbone.dtype, attn_implementation=_BY_DOCUMENTS
    ).to(backbone.device)
    names = backbone.config.names
    with torch.no_grad():
        for index, block in enumerate(backbone.blocks):
            for name in _LINEARS:
                weight = getattr(block, name).weight
                if isinstance(weight, NF4Weight):
                    path = f"{names.layer.format(index)}{getattr(names, name)}.weight"
                    dequantize_nf4(weight, backbone.dtype, out=model.get_parameter(path).data)
    return model


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    document_lengths: Sequence[int] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Heads [1, H, T, d] of documents side by side -> [1, T, Hq d], by the function that our decoder calls."""
    rows = (heads[0].transpose(0, 1) for heads in (query, key, value))
    return attention(*rows, document_lengths)[None], None


AttentionInterface.register(_BY_DOCUMENTS, _attend)
