"""Our training step at the shape of a real model under the tracker: same modules, same order as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedConfig

from benchmarks.tracker import ACTIVATIONS, HOST, StorageTracker, tracked
from engine.backbone import Backbone
from engine.backbone.families import BackboneConfig, backbone_config, expected_tensors
from engine.backbone.layout import packed_nbytes, views
from engine.backbone.loader import assemble_block
from engine.backbone.residency import Layers
from engine.config import LadderConfig
from engine.memory.workload import MemoryPolicies
from engine.model.ladder_model import LadderModel, run_pass
from engine.model.rows import Rows
from engine.model.side_network import SideNetwork
from engine.model.tap_store import _HostCopy
from engine.sequence import SequenceLayout
from ladder_kernels import NF4Weight
from ladder_kernels.head import HeadWeight
from ladder_kernels.int8 import Int8Weight


def track_ladder(
    hf_config: PreTrainedConfig,
    config: LadderConfig,
    tokens: int,
    batch: int = 1,
    policies: MemoryPolicies | None = None,
    group: int = 1,
    beside: Sequence[LadderConfig] = (),
) -> StorageTracker:
    """A tracked optimizer step whose every token is supervised, moments and scratch being there from a step before.

    Args:
        hf_config: the backbone's.
        tokens: of each of the `batch` documents.
        policies: None for the defaults; the optimizer is the default one.
        group: micro-batches of `batch` documents that pass the backbone together.
        beside: further side networks that train on the same passes, in a sweep.
    """
    policies = policies or MemoryPolicies()
    tracker, fake = StorageTracker(), FakeTensorMode(allow_non_fake_inputs=True)
    shape = backbone_config(hf_config)
    with tracked(tracker, fake):
        tensors = empty_tensors(shape, policies, tracker)
    backbone = Backbone(shape, hf_config, *tensors)  # reads its rotary frequencies, which have to be real
    with tracked(tracker, fake):
        with tracker.making("side parameters"), patch.object(SideNetwork, "to", lambda module, device: module):
            models = [LadderModel(backbone, one) for one in (config, *beside)]
        for model in models:
            model.side_network.tap_policy = policies.taps
            model.share(models[0])
        _observe(models[0], tracker)
        rows = Rows(torch.empty(batch * tokens, dtype=torch.int64), _layout(tokens, batch), (batch, tokens))
        optimizers = [optimizer_with_moments(model, tracker) for model in models]
        with patch.object(_HostCopy, "__init__", tracker.makes(HOST, _HostCopy.__init__)):
            _step(models, [rows] * group, optimizers, tracker)
    return tracker


def empty_tensors(
    config: BackboneConfig, policies: MemoryPolicies, tracker: StorageTracker
) -> tuple[Tensor, Layers, Tensor, HeadWeight]:
    """What a `Backbone` is made of, without contents, where the policies say: embedding, layers, final norm, head."""
    table = (config.vocab_size, config.hidden_size)
    with tracker.phase("load"):
        layers = _empty_layers(config, policies, tracker)
        with tracker.making("head"):
            norm = torch.empty(config.hidden_size, dtype=torch.bfloat16)
            head = empty_head(*table, policies.head_dtype)
        if config.tie_word_embeddings and isinstance(head, Tensor):
            return head, layers, norm, head
        with tracker.making(HOST if policies.embedding == "host" else "embedding"):
            embedding = torch.empty(table, dtype=torch.bfloat16)
    return embedding, layers, norm, head


def _empty_layers(config: BackboneConfig, policies: MemoryPolicies, tracker: StorageTracker) -> Layers:
    """Resident layers, then streamed ones with their staging buffers."""
    resident = config.num_layers if policies.residency == "device" else policies.resident_layers
    blocks, buffers = [], {}
    for index in range(config.num_layers):
        prefix = config.names.layer.format(index)
        expected = {name: tensor for name, tensor in expected_tensors(config).items() if name.startswith(prefix)}
        with tracker.making("backbone layers"):
            loaded: dict[str, HeadWeight] = {
                name: empty_nf4(*tensor.shape) if tensor.linear else torch.empty(tensor.shape, dtype=torch.bfloat16)
                for name, tensor in expected.items()
            }
            block = assemble_block(config, index, loaded)
        if index >= resident:
            with tracker.making(HOST):
                buffers[index] = torch.empty(packed_nbytes(block), dtype=torch.uint8)
            block = views(block, buffers[index])
        blocks.append(block)
    with tracker.making("layers in flight"):
        return Layers(blocks, torch.device("cpu"), buffers, prefetch=policies.prefetch)


def empty_head(rows: int, columns: int, head_dtype: str) -> HeadWeight:
    """An output matrix without contents."""
    if head_dtype == "nf4":
        return empty_nf4(rows, columns)
    if head_dtype == "int8":
        return Int8Weight(torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows))
    return torch.empty(rows, columns, dtype=torch.bfloat16)


def empty_nf4(rows: int, columns: int) -> NF4Weight:
    """A double-quantized weight without contents."""
    blocks = -(-rows * columns // 64)
    return NF4Weight(
        packed=torch.empty(-(-rows * columns // 2), dtype=torch.uint8),
        absmax=torch.empty(blocks, dtype=torch.uint8),
        codebook=torch.empty(16),
        shape=(rows, columns),
        dtype=torch.bfloat16,
        absmax_scale=torch.empty(-(-blocks // 256)),
        absmax_map=torch.empty(256),
        absmax_offset=torch.empty(()),
    )


def optimizer_with_moments(model: nn.Module, tracker: StorageTracker) -> torch.optim.AdamW:
    """Fused AdamW after a first step, as every step but the first finds it; gradients are counted as such."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    with tracker.making("moments"):
        optimizer.step()
    optimizer.zero_grad()
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda done: tracker.label(done.grad, "gradients"))
    return optimizer


def _layout(tokens: int, batch: int) -> SequenceLayout:
    return SequenceLayout.packed((tokens,) * batch)


def _observe(model: LadderModel, tracker: StorageTracker) -> None:
    """Tell the tracker where the backbone's turns begin and end, and what is scratch."""
    backbone, stream = model.backbone, model.backbone.hidden_states

    def phased(*args: Any, **kwargs: Any) -> Iterator[tuple[int, Tensor]]:
        iterator = stream(*args, **kwargs)
        while True:
            with tracker.phase("backbone pass"):
                item = next(iterator, None)
            if item is None:
                return
            yield item
            del item

    backbone.hidden_states = phased  # type: ignore[method-assign]
    for workspace in (backbone._workspace, model._shared.workspace):
        workspace.take = tracker.makes("scratch", workspace.take)  # type: ignore[method-assign]


def _step(
    models: list[LadderModel], group: list[Rows], optimizers: list[torch.optim.AdamW], tracker: StorageTracker
) -> None:
    """What `LadderForCausalLM.forward` and a trainer do; of several, one after the other behind the pass."""
    count, width = len(group[0].input_ids), models[0].backbone.config.hidden_size
    targets, chosen = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    models[0].loss(torch.empty(count, width, dtype=torch.bfloat16), targets)  # its scratch, as the last step left it

    def kept(tensor: Tensor) -> Tensor:
        part = "taps" if tensor.shape[-1:] == (width,) else "side states"
        tracker.label(tensor, part, only_from=ACTIVATIONS)
        return tensor

    with tracker.phase("side forward"), torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        asked = [model.asks(group) for model in models]
        passed = run_pass(models[0].backbone, asked)
    for model, optimizer in zip(models, optimizers, strict=True):
        of_model = passed.pop(0)
        while of_model:
            with tracker.phase("loss"):
                combined = model.combined(*of_model.pop(0), group[0].layout, chosen)
                loss = model.loss(combined, targets) / count
                del combined
            with tracker.phase("backward"):
                loss.backward()
        with tracker.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
