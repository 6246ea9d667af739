"""Small ladder models for tests, and a naive twin of the whole method written from its formulas."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoints import tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.backbone import Backbone, load_backbone
from engine.config import LadderConfig
from engine.model.causal_lm import LadderForCausalLM
from engine.model.connections import connections
from engine.model.side_network import SideNetwork

SMALL = {"reduction_factor": 2}
"""64 / 2 = 32 wide: one head of 32."""


_TEMPORARY: dict[str, tempfile.TemporaryDirectory[str]] = {}


def checkpoint_folder(family: str = "qwen2") -> Path:
    """A tiny checkpoint that lives as long as the process."""
    if family not in _TEMPORARY:
        _TEMPORARY[family] = tempfile.TemporaryDirectory()
        tiny_checkpoint(Path(_TEMPORARY[family].name), family)
    return next(Path(_TEMPORARY[family].name).iterdir())


@cache
def _backbone(family: str, dtype: torch.dtype, quantize: bool) -> Backbone:
    return load_backbone(checkpoint_folder(family), dtype=dtype, quantize=quantize)


def tiny_backbone(family: str = "qwen2", dtype: torch.dtype = torch.float32, quantize: bool = True) -> Backbone:
    """A tiny backbone, loaded once and shared: do not move or change it."""
    return _backbone(family, dtype, quantize)


def ladder_model(preset: str = "ladder", backbone: Backbone | None = None, **overrides: Any) -> LadderForCausalLM:
    """An untrained model, in evaluation mode."""
    config = LadderConfig.preset(preset, **(SMALL | overrides))
    return LadderForCausalLM.from_backbone(backbone or tiny_backbone(), config).eval()


def trained(model: LadderForCausalLM, seed: int = 1) -> LadderForCausalLM:
    """The same model with every side parameter moved, so that each of them matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() < 2 else 0.5 * parameter.shape[-1] ** -0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def batch(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def backbone_logits(backbone: Backbone, input_ids: Tensor) -> Tensor:
    """What the backbone itself says of one sequence [T] -> [T, V]."""
    from engine.sequence import SequenceLayout

    *_, (_, last) = backbone.hidden_states(input_ids, SequenceLayout.packed([len(input_ids)]))
    return F.linear(backbone.final_norm(last), backbone.head_weight)


def naive_logits(network: SideNetwork, config: LadderConfig, family: str, input_ids: Tensor) -> Tensor:
    """fp64 logits of one unquantized sequence [T] through transformers' backbone and a side network from the formulas.

    Autograd runs through everything, the frozen backbone included, whose hidden states are made to require gradients.
    """
    hidden, head, final_norm, blocks = _transformers_states(family, input_ids)
    p = {name: value.double() for name, value in network.named_parameters()}
    pairs, num_side_layers = connections(config, len(hidden) - 1)
    tapped_by = {side_layer: backbone_layer for backbone_layer, side_layer in pairs}
    state = _project(p, "embedding_tap.", hidden[0], network, config) if config.tap_embeddings else None
    for j in range(num_side_layers):
        if j in tapped_by:
            z = _project(p, f"taps.{j}.", hidden[tapped_by[j]], network, config)
            if state is None:
                state = z
            elif config.merge == "sum":
                state = state + z
            else:
                gate = 1 / (1 + torch.exp(-p[f"taps.{j}.gate_logit"] / config.gate_temperature))
                state = gate * state + (1 - gate) * z
        assert state is not None
        state = _side_layer(p, f"layers.{j}.", state, network)
    assert state is not None
    joins_at = len(blocks) - round(config.rejoin * len(blocks))
    last = hidden[joins_at]
    if config.output == "residual":
        y = last + state @ p["side_up"].T
    elif config.output == "side_only":
        y = _rms_norm(state, p["final_norm"], network.eps) @ p["side_up"].T
    else:
        y = p["mix_alpha"] * last + (1 - p["mix_alpha"]) * (state @ p["side_up"].T)
    for block in blocks[joins_at:]:
        y = block(y)
    return final_norm(y) @ head.T


def _transformers_states(
    family: str, input_ids: Tensor
) -> tuple[list[Tensor], Tensor, Any, list[Callable[[Tensor], Tensor]]]:
    """h_0 .. h_L, the head, the final norm and the blocks, which take and return [T, D]."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint_folder(family), dtype=torch.float64, attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # transformers' own computes in fp32, whatever the weights are.
            module.forward = lambda x, m=module: _rms_norm(x, m.weight, m.variance_epsilon)
    hidden: list[Tensor] = []
    embedded = model.model.embed_tokens(input_ids[None]).requires_grad_()
    blocks: list[Callable[[Tensor], Tensor]] = []

    def note(module: Any, arguments: Any, options: dict[str, Any], out: Tensor) -> None:
        hidden.append(out)
        blocks.append(lambda x: module(x[None], **options)[0])

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in model.model.layers]
    model.model(inputs_embeds=embedded, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert all(state.requires_grad for state in hidden)
    return [embedded[0], *(state[0] for state in hidden)], model.lm_head.weight, model.model.norm, blocks


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _project(p: dict[str, Tensor], prefix: str, hidden: Tensor, network: SideNetwork, config: LadderConfig) -> Tensor:
    side_dim = network.dims.side_dim
    if config.tap_down in ("avg_pool", "max_pool"):
        groups = hidden.unflatten(-1, (side_dim, -1))
        return groups.mean(-1) if config.tap_down == "avg_pool" else groups.max(-1).values
    z = hidden @ p[prefix + "weight"].T
    if config.tap_down == "adapter":
        z = z / (1 + torch.exp(-z))
    return z if config.tap_down == "linear" else z @ p[prefix + "expand"].T


def _side_layer(p: dict[str, Tensor], prefix: str, state: Tensor, network: SideNetwork) -> Tensor:
    dims, tokens = network.dims, len(state)
    qkv = _rms_norm(state, p[prefix + "attention_norm"], network.eps) @ p[prefix + "qkv"].T
    sizes = [dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim]
    query, key, value = (part.unflatten(-1, (-1, dims.head_dim)).transpose(0, 1) for part in qkv.split(sizes, -1))
    half = dims.head_dim // 2
    frequencies = network.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().double(), angles.sin().double()

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    query, key = rotate(query), rotate(key)
    group = dims.num_heads // dims.num_kv_heads
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.transpose(1, 2) / dims.head_dim**0.5
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
    state = state + mixed @ p[prefix + "attention_out"].T
    gate, up = (_rms_norm(state, p[prefix + "mlp_norm"], network.eps) @ p[prefix + "gate_up"].T).chunk(2, -1)
    return state + (gate / (1 + torch.exp(-gate)) * up) @ p[prefix + "mlp_out"].T
