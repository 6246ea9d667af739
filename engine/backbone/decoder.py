"""The forward pass of a frozen decoder, one for all families: rows in, hidden states out, nothing kept.

    h_0 = embedding[ids]
    a   = h_i + W_o attention(rope(norm(W_q x)), rope(norm(W_k x)), W_v x),   x = RMSNorm(h_i)
    h_{i+1} = a + W_down(silu(W_gate x) * W_up x),                            x = RMSNorm(a)

There is no batch dimension: hidden states are [T, D] and a `SequenceLayout` says which rows form documents.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase

from engine.backbone.block import Block, wants_gradient
from engine.backbone.chunks import by_rows
from engine.backbone.families import BackboneConfig, rotary_frequencies
from engine.backbone.host_memory import pin, unpin
from engine.sequence import SequenceLayout, attention, rotary_table
from ladder_kernels import (
    HeadWeight,
    Int8Weight,
    NF4Weight,
    Workspace,
    embedding_rows,
    frozen_rms_norm,
    head_logits,
    nf4_swiglu,
    rms_norm,
    rotary,
    swiglu,
    swiglu_,
)

if TYPE_CHECKING:
    from engine.backbone.residency import Layers


class _Rows(NamedTuple):
    """What every block of a pass reads beside hidden states: cos and sin of the rows, their documents, the cache."""

    tables: tuple[Tensor, Tensor]
    layout: SequenceLayout
    cache: DynamicCache | None = None


class Backbone:
    """A frozen pretrained decoder. Not an nn.Module: its weights are no parameters and belong to no state dict.

    Attributes:
        config: what the forward pass depends on.
        hf_config: the transformers config object it was read from.
        source: path or hub id as the user gave it.
        folder: where the checkpoint's files lie, None for a backbone built in memory.
        embedding: [V, D] in host memory, pinned for a GPU, unless it is the head as well.
        layers: the blocks, on the device or streamed to it; norm_weight: [D] on the device.
        head_weight: [V, D] on the device, dense or packed; the same tensor as `embedding` where the family ties them
            and it is dense.
    """

    def __init__(
        self,
        config: BackboneConfig,
        hf_config: PreTrainedConfig,
        embedding: Tensor,
        layers: Layers,
        norm_weight: Tensor,
        head_weight: HeadWeight,
        *,
        source: str = "",
        folder: Path | None = None,
        fingerprint: str = "",
    ) -> None:
        self.config = config
        self.hf_config = hf_config
        self.embedding = embedding
        self.layers = layers
        self.norm_weight = norm_weight
        self.head_weight = head_weight
        self.source = source
        self.folder = folder
        self._fingerprint = fingerprint
        frequencies, self._rotary_scale = rotary_frequencies(hf_config)
        self._frequencies = frequencies.to(self.device)
        self._workspace = Workspace()
        self._pin_embedding()

    @property
    def device(self) -> torch.device:
        """Where hidden states are computed."""
        return self.norm_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of hidden states."""
        return self.norm_weight.dtype

    @property
    def head_dtype(self) -> str:
        """What the head is kept as: "dense", "int8" or "nf4"."""
        if isinstance(self.head_weight, Tensor):
            return "dense"
        return "int8" if isinstance(self.head_weight, Int8Weight) else "nf4"

    @property
    def blocks(self) -> Sequence[Block]:
        """The weights of every layer where they live: on the device, or in host memory where they are streamed."""
        return self.layers.blocks

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, wherever they are, a tied head counted once."""
        outer = {id(weight): weight.nbytes for weight in (self.embedding, self.norm_weight, self.head_weight)}
        return sum(outer.values()) + sum(tensor.nbytes for block in self.blocks for tensor in block.tensors())

    def scratch(self) -> tuple[Tensor, ...]:
        """The scratch memory that forward passes reuse."""
        return self._workspace.buffers()

    def fingerprint(self) -> str:
        """sha256 in hex that identifies the backbone an adapter was trained on.

        Taken while loading over the config, a sample of every tensor as stored in the checkpoint (values, not the type
        they are stored in) and how the linears are quantized. So it differs between dense, NF4 and double-quantized NF4
        of one checkpoint, and is the same for every device, compute dtype and thread count.

        Raises:
            ValueError: the backbone was not loaded from a checkpoint.
        """
        if not self._fingerprint:
            raise ValueError("this backbone has no fingerprint: expected one loaded by load_backbone")
        return self._fingerprint

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved beside the weights.

        Raises:
            ValueError: the backbone has no folder, or the folder holds no usable tokenizer.
        """
        if self.folder is None:
            raise ValueError("this backbone was built in memory: expected one loaded by load_backbone")
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"no usable tokenizer in {self.folder}: {error}") from error

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, head_dim] in the compute dtype for int64 positions [T]."""
        return rotary_table(positions, self._frequencies, self.dtype, self._rotary_scale)

    def embed(self, input_ids: Tensor) -> Tensor:
        """h_0 [T, D] of integer ids [T]."""
        return embedding_rows(input_ids.long(), self.embedding)

    def hidden_states(
        self, input_ids: Tensor, layout: SequenceLayout, cache: DynamicCache | None = None, last: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (0, h_0), (1, h_1) .. (L, h_L), each [T, D], without gradients.

        Gradients are off only while the backbone computes, so the consumer's own grad mode holds between yields. A
        yielded tensor is never written to, and lives no longer than the consumer and the next attention need it.

        Args:
            input_ids: int64 [T].
            layout: documents of the T rows; with a cache, `SequenceLayout.cached`.
            cache: keys and values of earlier columns, extended in place at layers 0 .. last-1.
            last: number of the last state that is wanted; None for L.
        """
        with torch.no_grad():
            rows = _Rows(self.rotary(layout.positions), layout, cache)
            hidden = self.embed(input_ids)
        yield 0, hidden
        for index in range(len(self.blocks) if last is None else last):
            with torch.no_grad(), self.layers.on_device(index) as block:
                out = self._few_rows(block, index, hidden, rows)
                if out is None:
                    hidden = self._attention(block, index, hidden, rows)  # h_index is freed
                    out = self._mlp(block, hidden)
                hidden = out
            yield index + 1, hidden

    def run_above(
        self, hidden: Tensor, first: int, layout: SequenceLayout, cache: DynamicCache | None = None
    ) -> Tensor:
        """h_L [T, D] of some other h_first [T, D], through the blocks above it; differentiable once, in hidden.

        A block keeps its input for backward, which computes the rest again.

        Args:
            hidden: what takes the place of h_first.
            first: from 0 to L.
            layout: documents of the T rows, as of the pass that has computed the states below.
            cache: of that pass, extended in place at layers first .. L-1.

        Raises:
            ValueError: a gradient is wanted of what fills a cache, through layers that are streamed and would be gone.
        """
        if cache is not None and wants_gradient(hidden) and self.layers.num_streamed:
            raise ValueError("use_cache with streamed layers: expected no gradients, call this under torch.no_grad()")
        rows = _Rows(self.rotary(layout.positions), layout, cache)
        for index in range(first, len(self.blocks)):
            if cache is None and wants_gradient(hidden):
                hidden = _BlockAbove.apply(hidden, self, index, first, rows)
            else:
                with self.layers.on_device(index) as block:
                    hidden = self._run_block(block, index, hidden, rows)
        return hidden

    def _run_block(self, block: Block, index: int, hidden: Tensor, rows: _Rows) -> Tensor:
        """h_{index + 1} of h_index."""
        out = self._few_rows(block, index, hidden, rows)
        return self._mlp(block, self._attention(block, index, hidden, rows)) if out is None else out

    def _block_gradient(self, dout: Tensor, block: Block, index: int, hidden: Tensor, rows: _Rows) -> Tensor:
        """Gradient of h_index [T, D] from that of h_{index + 1}: the MLP in slices of rows, then the attention."""

        def through_mlp(middle: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                middle = middle.detach().requires_grad_()
                return torch.autograd.grad(self._mlp(block, middle), middle, dout)

        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            middle = self._attention(block, index, hidden, rows)
        bytes_per_token = gradient_bytes_per_token(self.config, hidden.element_size())
        (dmiddle,) = by_rows(through_mlp, (middle.detach(), dout), bytes_per_token)
        return torch.autograd.grad(middle, hidden, dmiddle)[0]

    def _few_rows(self, block: Block, index: int, hidden: Tensor, rows: _Rows) -> Tensor | None:
        """What `_attention` and `_mlp` compute, to the bit, from two native calls; None where these do not apply."""
        if block.packed is None:
            return None
        attend = self._attend(index, rows)
        return block.packed(hidden, *rows.tables, self.config.rms_norm_eps, attend, workspace=self._workspace)

    def _attend(self, index: int, rows: _Rows) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The attention of a block, of rotated query, key and value."""
        window = self.config.layer_windows[index]
        return functools.partial(attention, layout=rows.layout, window=window, cache=rows.cache, layer=index)

    def _attention(self, block: Block, index: int, hidden: Tensor, rows: _Rows) -> Tensor:
        """hidden + W_o attention(x), x the normed hidden states."""
        config, itemsize = self.config, hidden.element_size()
        mixed_width, heads = config.num_heads * config.head_dim, config.num_heads + 2 * config.num_kv_heads

        def project(hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            return self._heads(block, hidden, cos, sin)

        def add(mixed: Tensor, hidden: Tensor) -> tuple[Tensor]:
            return (block.output(mixed, self._workspace, hidden),)

        projected_bytes = (config.hidden_size + 2 * heads * config.head_dim) * itemsize
        query, key, value = by_rows(project, (hidden, *rows.tables), projected_bytes)
        mixed = self._attend(index, rows)(query, key, value)
        del query, key, value
        return by_rows(add, (mixed, hidden), (mixed_width + config.hidden_size) * itemsize)[0]

    def _heads(self, block: Block, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, d], keys and values [T, Hkv, d] of hidden states [T, D], rotated."""
        config = self.config
        x = self._norm(hidden, block.attention_norm)
        query = block.query(x, self._workspace).unflatten(-1, (config.num_heads, config.head_dim))
        key = block.key(x, self._workspace).unflatten(-1, (config.num_kv_heads, config.head_dim))
        value = block.value(x, self._workspace).unflatten(-1, (config.num_kv_heads, config.head_dim))
        if block.query_norm is not None and block.key_norm is not None:
            query, key = self._norm(query, block.query_norm), self._norm(key, block.key_norm)
        return rotary(query, cos, sin), rotary(key, cos, sin), value

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension; for a gradient it keeps x alone."""
        epsilon = self.config.rms_norm_eps
        if wants_gradient(x):
            return frozen_rms_norm(x.flatten(0, -2), weight, epsilon).view_as(x)
        return rms_norm(x, weight, epsilon)

    def _mlp(self, block: Block, hidden: Tensor) -> Tensor:
        """hidden + W_down(silu(W_gate x) * W_up x), in the memory of hidden where that is long."""
        config = self.config

        def mlp(hidden: Tensor) -> tuple[Tensor]:
            x = self._norm(hidden, block.mlp_norm)
            gate, up = block.gate, block.up
            is_packed = isinstance(gate.weight, NF4Weight) and isinstance(up.weight, NF4Weight)
            if wants_gradient(x):
                activated = swiglu(gate(x, self._workspace), up(x, self._workspace))
            elif is_packed and gate.bias is up.bias is None:
                activated = nf4_swiglu(x, gate.weight, up.weight, workspace=self._workspace)
            else:
                activated = swiglu_(gate(x, self._workspace), up(x, self._workspace))
            return (block.down(activated, self._workspace, hidden),)

        width = 2 * (config.hidden_size + config.intermediate_size)
        out = () if wants_gradient(hidden) else (hidden,)
        return by_rows(mlp, (hidden,), width * hidden.element_size(), out)[0]

    def final_norm(self, y: Tensor) -> Tensor:
        """The frozen final RMSNorm of y [R, D]; differentiable in y, with the same bits where no gradient is wanted."""
        return frozen_rms_norm(y, self.norm_weight, self.config.rms_norm_eps)

    def logits(self, normed: Tensor) -> Tensor:
        """[..., V] of normed hidden states [..., D]."""
        return head_logits(normed, self.head_weight, workspace=self._workspace)

    def to(self, device: torch.device | str) -> Backbone:
        """Move to another device, in place; the embedding (where it is not the head) and streamed layers stay in host
        memory."""
        tied = self.head_weight is self.embedding
        self.head_weight = self.head_weight.to(device)
        self.embedding = self.head_weight if tied else self.embedding
        self.norm_weight = self.norm_weight.to(device)
        self._frequencies = self._frequencies.to(device)
        self.layers.to(device)
        self._workspace = Workspace()
        self._pin_embedding()
        return self

    def _pin_embedding(self) -> None:
        """So that a GPU gathers rows from host memory by itself; once, it stays pinned if the backbone moves."""
        if self.device.type == "cuda" and self.embedding.is_cpu and not self.embedding.is_pinned():
            weakref.finalize(self, unpin, pin([self.embedding], self.device), self.device).atexit = False


def gradient_bytes_per_token(config: BackboneConfig, itemsize: int) -> int:
    """What the MLP of a block holds for a row while a gradient passes through it."""
    return itemsize * (2 * config.hidden_size + 6 * config.intermediate_size)


class _BlockAbove(torch.autograd.Function):
    """A frozen block that keeps its input only.

    Behind the last block the same ones come again from the top down to `first`, then those of the next pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, backbone: Backbone, index: int, first: int, rows: _Rows) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.call = backbone, index, first, rows
        down = range(len(backbone.blocks) - 1, first - 1, -1)
        with backbone.layers.on_device(index, down if index == down[0] else None) as block:
            return backbone._run_block(block, index, hidden, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,), (backbone, index, first, rows) = ctx.saved_tensors, ctx.call
        then = (*range(index - 1, first - 1, -1), *range(first))
        # As the forward pass ran, wherever backward() is called: autocast would give its products other dtypes.
        with torch.autocast(dout.device.type, enabled=False), backbone.layers.on_device(index, then) as block:
            dhidden = backbone._block_gradient(dout, block, index, hidden, rows)
        return dhidden, None, None, None, None
