"""Backbone and side network as one module, without what makes a transformers causal language model of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.backbone import Backbone
from engine.config import LadderConfig
from engine.model.rows import Rows, enter
from engine.model.side_network import SideNetwork, follow
from engine.sequence import SequenceLayout
from ladder_kernels import Workspace, decode_head, linear_cross_entropy


class FrozenHead(nn.Module):
    """The backbone's output matrix, dense or packed, as a module without parameters: logits = hidden @ weight^T."""

    bias = None

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._backbone = backbone

    @property
    def weight(self) -> Tensor:
        """[V, D] in the compute dtype; of a packed head a decoded copy."""
        return decode_head(self._backbone.head_weight, self._backbone.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return self._backbone.logits(hidden)


Passed = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BackbonePass:
    """What a side network asks of its backbone: one pass over the rows of some batches, and to follow it.

    Attributes:
        network: what follows.
        input_ids: int64 [T], the rows of all batches.
        layout: of all of them.
        layouts: of each batch.
        cache: of earlier columns, while decoding.
        grad: whether a backward will follow.
    """

    network: SideNetwork
    input_ids: Tensor
    layout: SequenceLayout
    layouts: Sequence[SequenceLayout]
    cache: DynamicCache | None
    grad: bool

    def same_rows(self, other: BackbonePass) -> bool:
        """Whether one pass can serve both: the same tokens in the same documents, and the same use of them."""
        return (
            self.grad == other.grad
            and [layout.lengths for layout in self.layouts] == [layout.lengths for layout in other.layouts]
            and torch.equal(self.input_ids, other.input_ids)
            and torch.equal(self.layout.positions, other.layout.positions)
        )


def run_pass(backbone: Backbone, asked: Sequence[BackbonePass]) -> list[list[Passed]]:
    """One pass of the backbone for all that ask for the same rows.

    Returns:
        for each that asks, h_{L-k} [N, D] and side state [N, S] of each of its batches.
    """
    first = asked[0]
    # Both networks fix their own dtypes; autocast would round the side network's a second time.
    with torch.autocast(backbone.device.type, enabled=False), torch.set_grad_enabled(first.grad):
        networks = [one.network for one in asked]
        last = max(network.joins_at for network in networks)
        stream = backbone.hidden_states(first.input_ids, first.layout, first.cache, last)
        return follow(networks, stream, first.layouts, first.cache, backbone.config.num_layers)


class _Shared:
    """Keeps the backbone and scratch memory out of the module tree and out of copies.

    Attributes:
        meet: where several models train in lockstep, what answers a pass once all have asked for theirs.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.workspace = Workspace()
        self.meet: Callable[[BackbonePass], list[Passed]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class LadderModel(nn.Module):
    """Backbone and side network without the head: the base model in transformers' sense."""

    def __init__(self, backbone: Backbone, config: LadderConfig) -> None:
        super().__init__()
        self._shared = _Shared(backbone)
        self.side_network = SideNetwork(config, backbone.config).to(backbone.device)

    @property
    def backbone(self) -> Backbone:
        return self._shared.backbone

    def run(self, rows: Rows, cache: DynamicCache | None = None) -> Passed:
        """h_{L-k} [N, D] and side state [N, S] of all rows; the cache is extended in place."""
        return self._answered(self.asks([rows], cache))[0]

    def run_together(self, batches: Sequence[Rows]) -> list[Passed]:
        """`run` of several batches in one pass of the backbone, which decodes and streams every weight once.

        The side network runs for each by itself, so that a later backward frees the memory of one after the other.
        """
        return self._answered(self.asks(batches))

    def asks(self, batches: Sequence[Rows], cache: DynamicCache | None = None) -> BackbonePass:
        """The pass that `run` or `run_together` of these batches takes; with a cache, of one batch."""
        layouts = [rows.layout for rows in batches]
        input_ids, layout = batches[0].input_ids, layouts[0]
        if len(batches) > 1:
            input_ids, layout = torch.cat([rows.input_ids for rows in batches]), SequenceLayout.joined(layouts)
        return BackbonePass(self.side_network, input_ids, layout, layouts, cache, torch.is_grad_enabled())

    def _answered(self, asked: BackbonePass) -> list[Passed]:
        meet = self._shared.meet
        return run_pass(self.backbone, [asked])[0] if meet is None or asked.cache is not None else meet(asked)

    def share(self, other: LadderModel) -> None:
        """Use the backbone, the scratch memory and the passes of another model."""
        self._shared = other._shared

    def meet_at(self, meet: Callable[[BackbonePass], list[Passed]] | None) -> None:
        """Let passes of this model, and of all that share its backbone, be answered by `meet`; None: one by one."""
        self._shared.meet = meet

    def combined(
        self,
        hidden: Tensor,
        state: Tensor,
        layout: SequenceLayout,
        chosen: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """What the frozen head multiplies, [R, D]: the final norm of the top k blocks of combine(h_{L-k}, s).

        Args:
            hidden, state: h_{L-k} [N, D] and s [N, S], as `run` returns them.
            layout: of their rows.
            chosen: rows that are wanted, None for all.
            cache: that `run` has extended; the top k blocks extend it too.
        """
        network, backbone = self.side_network, self.backbone
        with torch.autocast(hidden.device.type, enabled=False):
            if network.joins_at == len(backbone.blocks):
                hidden, state = _rows(hidden, chosen), _rows(state, chosen)  # the others are freed
                return backbone.final_norm(network.combine(hidden, state))
            hidden = backbone.run_above(network.combine(hidden, state), network.joins_at, layout, cache)
            return backbone.final_norm(_rows(hidden, chosen))

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy of rows [R, D] from `combined` and token ids [R], -100 counting nothing."""
        shared = self._shared
        return linear_cross_entropy(hidden, shared.backbone.head_weight, targets, workspace=shared.workspace)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **unsupported: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] after the final norm, zero on padding. Arguments as of `LadderForCausalLM`."""
        refuse_unsupported(unsupported)
        rows, cache = enter(input_ids, attention_mask, position_ids, cu_seq_lens_q, past_key_values, use_cache)
        hidden = self.combined(*self.run(rows, cache), rows.layout, cache=cache)
        return BaseModelOutputWithPast(last_hidden_state=rows.padded(hidden), past_key_values=cache)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LadderModel:
        super()._apply(fn, recurse)
        # What fn does to an integer tensor is its device move without its dtype cast.
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.backbone.device)).device
        if device != self.backbone.device:
            self.backbone.to(device)
        return self


def refuse_unsupported(unsupported: dict[str, Any]) -> None:
    """Refuse inputs that would be ignored, unless they ask for nothing, as the collator's record numbers do."""
    asked = {name: value for name, value in unsupported.items() if name != "sample_ids"}
    names = [name for name, value in asked.items() if value is not None and value is not False]
    if names:
        raise TypeError(f"LadderForCausalLM does not take {names}; see its forward() for what it takes")


def _rows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    return tensor if chosen is None else tensor.index_select(0, chosen)
