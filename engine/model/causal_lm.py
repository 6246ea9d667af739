"""A frozen backbone and its side network as one transformers causal language model.

The backbone is not in the module tree: parameters, state dict, optimizer, DDP and checkpoints see the side network
only. `device` moves take it along, dtype casts do not. Copies of the model share it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from engine.backbone import Backbone, load_backbone
from engine.backbone.families import expected_tensors
from engine.backbone.residency import PLACEMENT_OPTIONS
from engine.config import LadderConfig
from engine.model.adapter import check_backbone, load_adapter, read_adapter, save_adapter
from engine.model.ladder_model import FrozenHead, LadderModel, refuse_unsupported
from engine.model.rows import IGNORE_INDEX, enter, rows_of_batch, supervision
from engine.model.side_network import SideNetwork
from engine.model.transformers_config import LadderModelConfig, generation_config, model_config

_SIDE_PREFIX = "model.side_network."


@dataclass
class LadderOutput(CausalLMOutputWithPast):
    """What `LadderForCausalLM.forward` returns; `num_supervised` (int64, 0-dim) counts the tokens behind the loss."""

    num_supervised: Tensor | None = None


class LadderForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose backbone is frozen and whose side network is trained.

    Build it with `from_backbone` or `from_pretrained`.

    Args:
        config: as `LadderModelConfig`, derived from the other two.
        backbone: the frozen part.
        ladder_config: the side network's configuration.
    """

    config_class = LadderModelConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True

    def __init__(self, config: LadderModelConfig, backbone: Backbone, ladder_config: LadderConfig) -> None:
        super().__init__(config)
        self.model = LadderModel(backbone, ladder_config)
        self.ladder_config = ladder_config
        self.generation_config = generation_config(backbone)
        self.post_init()

    @classmethod
    def from_backbone(
        cls, backbone: Backbone | str | Path, config: LadderConfig | None = None, **load_options: Any
    ) -> LadderForCausalLM:
        """A new side network beside a backbone.

        Args:
            backbone: a loaded one, or what `load_backbone` takes.
            config: None for the preset "ladder".
            load_options: of `load_backbone`, where it is called.

        Raises:
            ValueError: the configuration does not fit the backbone, or the backbone cannot be loaded.
        """
        if not isinstance(backbone, Backbone):
            backbone = load_backbone(backbone, **load_options)
        elif load_options:
            raise TypeError(f"{sorted(load_options)} are options of loading, but the backbone is loaded already")
        config = config or LadderConfig()
        return cls(model_config(backbone, config), backbone, config)

    def beside(self, config: LadderConfig) -> LadderForCausalLM:
        """Another, new side network on this model's backbone; the two share scratch memory, so they take turns."""
        other = type(self).from_backbone(self.backbone, config)
        other.model.share(self.model)
        return other

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        backbone: Backbone | str | Path | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        config: PreTrainedConfig | None = None,
        **options: Any,
    ) -> LadderForCausalLM:
        """Load an adapter folder beside its backbone.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`.
            backbone: None loads the recorded source; a path or id is loaded the way the recorded one was.
            dtype: compute dtype, where the backbone is loaded here. None or "auto": the one it was trained in.
            device: where the backbone is loaded to.
            revision: of the backbone's hub repository.
            config: accepted because transformers' Auto classes pass it; the folder decides.
            options: residency, layer_budget, prefetch and packed_cache as of `load_backbone`, where the backbone is
                loaded here; and what the Auto classes pass along, none of it used.

        Raises:
            TypeError: an option this model does not have, or one of loading beside a loaded backbone.
            ValueError: a damaged or foreign folder, or another backbone than it was trained beside.
        """
        # The Auto classes always pass adapter_kwargs, which are for peft adapters.
        placement = {name: options.pop(name) for name in PLACEMENT_OPTIONS & options.keys()}
        if given := sorted(name for name, value in options.items() if value and name != "adapter_kwargs"):
            raise TypeError(
                f"from_pretrained takes dtype, device, revision, {', '.join(sorted(PLACEMENT_OPTIONS))} of the "
                f"backbone, got {given}"
            )
        if placement and isinstance(backbone, Backbone):
            raise TypeError(f"{sorted(placement)} are options of loading, but the backbone is loaded already")
        folder = Path(pretrained_model_name_or_path)
        record = read_adapter(folder)
        if not isinstance(backbone, Backbone):
            source = backbone or record.backbone.source
            if isinstance(dtype, str) and dtype != "auto":
                dtype = _torch_dtype(dtype)
            try:
                backbone = load_backbone(
                    source,
                    dtype=dtype if isinstance(dtype, torch.dtype) else record.backbone.torch_dtype,
                    quantize=record.backbone.quantized,
                    double_quant=record.backbone.double_quant,
                    head_dtype=record.backbone.head_dtype,
                    device=device,
                    revision=revision,
                    **placement,
                )
            except ValueError as error:
                raise ValueError(
                    f"the backbone {source} of the adapter {folder} could not be loaded; if it lies elsewhere, "
                    f"pass backbone= (--model of the command): {error}"
                ) from error
        check_backbone(record, backbone, folder)
        model = cls.from_backbone(backbone, record.config)
        load_adapter(folder, model.side_network, backbone)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write an adapter folder (see `engine.model.adapter`).

        Args:
            save_directory: created if it is missing.
            is_main_process: False writes nothing, as in distributed training.
            state_dict: this model's state dict where the caller has gathered it already.
            tokenizer: saved along.
            push_to_hub: refused here; `push_to_hub()` does it.
            options: safe_serialization, max_shard_size and their like, which change nothing: the format is fixed.
        """
        if push_to_hub:
            raise ValueError("save_pretrained(push_to_hub=True) is not supported: call model.push_to_hub(repo_id)")
        if options.get("safe_serialization") is False:
            raise ValueError("safe_serialization=False is not supported: adapters are safetensors only")
        if not is_main_process:
            return
        state = self.state_dict() if state_dict is None else state_dict
        foreign = [name for name in state if not name.startswith(_SIDE_PREFIX)]
        if foreign:
            raise ValueError(f"state_dict must be this model's own, with keys {_SIDE_PREFIX}*; got {foreign[:3]}")
        weights = {name.removeprefix(_SIDE_PREFIX): weight for name, weight in state.items()}
        if missing := sorted(self.side_network.state_dict().keys() - weights.keys()):
            raise ValueError(f"state_dict lacks {len(missing)} weights of the side network, first {missing[0]}")
        save_adapter(save_directory, self.ladder_config, self.backbone, weights, tokenizer)
        self.config.save_pretrained(save_directory)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes; transformers' own would put an empty card in the place of ours.

        Args:
            repo_id: "owner/name", made if it does not exist.
            tokenizer: uploaded along.
            private: whether a new repository is.
            token: of the hub; None: the one logged in with.
            revision: branch to commit to, made if it does not exist.
            commit_message: of the one commit.
            create_pr: as a pull request.

        Returns:
            address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer=tokenizer)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    @property
    def backbone(self) -> Backbone:
        return self.model.backbone

    def scratch(self) -> tuple[Tensor, ...]:
        """The scratch memory that passes reuse: what a CUDA graph of one must keep alive."""
        return (*self.model._shared.workspace.buffers(), *self.backbone.scratch())

    @property
    def side_network(self) -> SideNetwork:
        return self.model.side_network

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        document_lengths: Sequence[int] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        supervised_rows: Tensor | None = None,
        supervised_targets: Tensor | None = None,
        passed: tuple[Tensor, Tensor] | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> LadderOutput | tuple[Tensor, ...]:
        """Loss of the supervised tokens, or logits where nothing is supervised.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], nonzero on real tokens, padding left or right; with a cache [B, past + T].
            position_ids: int64 [B, T] or [1, T]; where they do not continue, a document starts.
            labels: int64 [B, T], unshifted, -100 where unsupervised.
            past_key_values: cache of earlier columns, extended in place.
            use_cache: True makes a new cache where none is given.
            cu_seq_lens_q: int [documents + 1], cumulated document lengths over the flattened batch.
            cu_seq_lens_k: the same, not read; as are max_length_q and max_length_k.
            document_lengths: what cu_seq_lens_q says, as host integers: with them nothing waits for the device.
            logits_to_keep: logits of the last this many columns only (0: all), or of these column indices.
            num_items_in_batch: what the summed loss is divided by, at least 1; None: the number of supervised tokens.
            supervised_rows: int64 [R], rows of the flattened, unpadded batch whose logits are supervised; used instead
                of labels, together with supervised_targets.
            supervised_targets: int64 [R], the token each predicts, -100 on entries that only fill a bucket.
            passed: what `run_ahead` has computed of this batch; only with labels or targets.
            return_dict: False returns a tuple.

        Returns:
            loss (fp32, 0-dim) and no logits with labels or targets; else logits [B, kept columns, V], zero on padding.

        Raises:
            ValueError: shapes that disagree, or a combination that has no meaning.
            TypeError: an input this model does not have.
        """
        refuse_unsupported(unsupported)
        supervised = labels is not None or supervised_targets is not None
        if supervised and past_key_values is not None:
            raise ValueError("labels with past_key_values: a loss is over whole documents, leave the cache out")
        use_cache = use_cache and not supervised
        rows, cache = enter(
            input_ids, attention_mask, position_ids, cu_seq_lens_q, past_key_values, use_cache, document_lengths
        )
        if passed is not None and not (supervised and len(passed[0]) == len(rows.input_ids)):
            raise ValueError(
                f"passed holds {len(passed[0])} rows: expected what run_ahead() computed of this very batch of "
                f"{len(rows.input_ids)}, with labels or targets"
            )
        loss = logits = count = None
        if supervised:
            chosen, targets = supervision(rows, labels, supervised_rows, supervised_targets)
            hidden = self.model.combined(*(passed or self.model.run(rows)), rows.layout, chosen)
            total = self.model.loss(hidden, targets)
            count = (targets != IGNORE_INDEX).sum()
            # At least 1: a step without a supervised token has the loss 0, not NaN.
            loss = total / torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch).clamp_min(1)
        else:
            chosen, kept = rows.columns(logits_to_keep)
            hidden = self.model.combined(*self.model.run(rows, cache), rows.layout, chosen, cache)
            logits = kept.padded(self.backbone.logits(hidden))
        output = LadderOutput(loss=loss, logits=logits, past_key_values=cache, num_supervised=count)
        return output.to_tuple() if return_dict is False else output

    def run_ahead(self, batches: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
        """Hidden and side state of several batches, layer by layer, for `forward(passed=...)` of each.

        Every weight of the backbone is decoded, and streamed where it lies in host memory, once for all of them.

        Args:
            batches: inputs of `forward`; of those, what says which tokens form which documents is read.
        """
        names = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "document_lengths")
        parts = [rows_of_batch(*(batch.get(name) for name in names)) for batch in batches]
        return self.model.run_together(parts)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers', without position_ids: the mask says the same and costs no comparison."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return inputs

    def get_output_embeddings(self) -> FrozenHead:
        """The frozen head; it has no parameters and belongs to no state dict."""
        return FrozenHead(self.backbone)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: the embedding is frozen."""
        raise ValueError(
            f"the frozen backbone has {self.config.vocab_size} token embeddings and cannot learn new ones: use "
            "tokens of its own tokenizer, many reserve unused ones"
        )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Accepted without effect: the backbone stores nothing for backward that could be recomputed instead."""

    def gradient_checkpointing_disable(self) -> None:
        """Accepted without effect, see `gradient_checkpointing_enable`."""

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        shapes = (tensor.shape for tensor in expected_tensors(self.backbone.config).values())
        total = trainable + sum(torch.Size(shape).numel() for shape in shapes)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: there is nothing to merge.

        Raises:
            ValueError: always, with the reason.
        """
        raise ValueError(
            "a side network cannot be merged: it runs beside the backbone on its hidden states and changes no weight "
            "of it. Use this model's generate() directly; save_pretrained() keeps the side network and "
            "LadderForCausalLM.from_pretrained() puts both together again"
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `SideNetwork.reset_parameters` has drawn them, from its own seed."""


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'dtype must be "auto" or the name of a torch dtype such as "bfloat16", got {name!r}')
    return dtype


AutoConfig.register(LadderModelConfig.model_type, LadderModelConfig, exist_ok=True)
AutoModelForCausalLM.register(LadderModelConfig, LadderForCausalLM, exist_ok=True)
