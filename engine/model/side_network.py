"""The trained part: narrow decoder layers that read the frozen backbone's hidden states as these pass by.

    z_j = tap_down_j(h_i)                       for every connection (i, j)
    s   = merge_j(s, z_j)                       "lst": g*s + (1-g)*z, g = sigmoid(gate_logit_j / T);  "sum": s + z
    s   = side_layer_j(s)                       RMSNorm, causal attention with RoPE, RMSNorm, SwiGLU
    y   = combine(h_{L-k}, s)                   takes the place of h_{L-k} below the top k blocks (`rejoin`; with k = 0
                                                of h_L before the final norm and head)

Before the first tap there is no state: the first tapped layer starts from s = z and has no gate, unless the embeddings
are tapped. Parameters are fp32; every one is cast to the hidden states' dtype where it is used.

Sources: arXiv 2512.14237 (Ladder, xLadder), arXiv 2206.06522 (LST), arXiv 2401.07159 (QST).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from engine.config import BackboneShape, LadderConfig, SideDims, side_dims
from engine.model.connections import connections
from engine.model.tap_store import TapKeeper, TapPolicy, check_tap_policy
from engine.sequence import SequenceLayout, attention, inverse_frequencies, rotary_table
from ladder_kernels import SideLayerWeights, rms_norm, side_layer


class Tap(nn.Module):
    """Projects a hidden state to the side width and merges it into the side state.

    Args:
        config: kind and rank of the projection, merge rule, gate temperature.
        hidden_size: backbone width D.
        side_dim: side width S.
        gated: whether there is a state to merge with and the rule has a gate.
    """

    def __init__(self, config: LadderConfig, hidden_size: int, side_dim: int, gated: bool) -> None:
        super().__init__()
        self.kind = config.tap_down
        self.side_dim = side_dim
        self.temperature = config.gate_temperature
        if self.kind == "linear":
            self.weight = nn.Parameter(torch.empty(side_dim, hidden_size))
        elif self.kind in ("low_rank", "adapter"):
            self.weight = nn.Parameter(torch.empty(config.tap_rank, hidden_size))
            self.expand = nn.Parameter(torch.empty(side_dim, config.tap_rank))
        self.gate_logit = nn.Parameter(torch.empty(())) if gated else None

    def forward(self, hidden: Tensor, state: Tensor | None, keeper: TapKeeper) -> Tensor:
        """merge(state [T, S], tap_down(hidden [T, D])) -> [T, S]; the projection itself where there is no state.

        The keeper says where hidden waits for backward.
        """
        gate = self.gate
        is_fused = self.kind == "linear"
        if is_fused and gate is not None and gate.requires_grad:
            # The op takes a gate's gradient out of dW: beside a frozen projection h would be kept for that alone.
            is_fused = self.weight.requires_grad
        if is_fused:
            return keeper.tap(hidden, self._wide_weight(hidden), state, gate)
        projected = self._project(hidden, keeper)
        if state is None:
            return projected
        return state + projected if gate is None else projected + gate * (state - projected)

    @property
    def gate(self) -> Tensor | None:
        """The share of the state in the mix, 0-dim."""
        return None if self.gate_logit is None else torch.sigmoid(self.gate_logit / self.temperature)

    def train_projection(self, trains: bool) -> None:
        """Whether backward computes the gradient that needs hidden states, which is that of `weight`."""
        if self.kind not in ("avg_pool", "max_pool"):
            self.weight.requires_grad_(trains)

    def _project(self, hidden: Tensor, keeper: TapKeeper) -> Tensor:
        if self.kind == "avg_pool":
            return F.adaptive_avg_pool1d(hidden, self.side_dim)
        if self.kind == "max_pool":
            return F.adaptive_max_pool1d(hidden, self.side_dim)
        inner = keeper.tap(hidden, self._wide_weight(hidden))
        if self.kind == "linear":
            return inner
        return F.linear(F.silu(inner) if self.kind == "adapter" else inner, self.expand.to(hidden.dtype))

    def _wide_weight(self, hidden: Tensor) -> Tensor:
        """The op rounds a wider weight itself and returns its gradient unrounded."""
        return self.weight.to(torch.promote_types(self.weight.dtype, hidden.dtype))


class SideLayer(nn.Module):
    """A pre-norm decoder layer of width S: s + attention(norm(s)), then s + SwiGLU(norm(s)); no biases.

    Args:
        dims: its sizes.
        eps: of both RMSNorms.
    """

    def __init__(self, dims: SideDims, eps: float) -> None:
        super().__init__()
        width, inner = dims.side_dim, dims.intermediate_size
        self.dims = dims
        self.eps = eps
        self.attention_norm = nn.Parameter(torch.empty(width))
        self.qkv = nn.Parameter(torch.empty((dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim, width))
        self.attention_out = nn.Parameter(torch.empty(width, dims.num_heads * dims.head_dim))
        self.mlp_norm = nn.Parameter(torch.empty(width))
        self.gate_up = nn.Parameter(torch.empty(2 * inner, width))
        self.mlp_out = nn.Parameter(torch.empty(width, inner))

    def forward(
        self,
        state: Tensor,
        tables: tuple[Tensor, Tensor],
        layout: SequenceLayout,
        cache: DynamicCache | None,
        cache_layer: int,
    ) -> Tensor:
        """state [T, S] -> [T, S]; tables: (cos, sin) [T, head_dim]; cache_layer: this layer's index in the cache."""

        lengths, eps, weights = layout.lengths, self.eps, self.weights()
        if cache is None:
            return side_layer(state, weights, *tables, lengths, eps, offsets=layout.offsets)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, key, value, layout, cache=cache, layer=cache_layer)

        return side_layer(state, weights, *tables, lengths, eps, attend=attend)

    def weights(self) -> SideLayerWeights:
        """The parameters as the op takes them."""
        return SideLayerWeights(
            self.attention_norm, self.qkv, self.attention_out, self.mlp_norm, self.gate_up, self.mlp_out
        )


class SideNetwork(nn.Module):
    """All taps and side layers of one configuration beside one backbone shape.

    Its side layers attend to the whole document, also where the backbone has a sliding window, and use plain rotary
    embeddings with the backbone's base and their own head size.

    Args:
        config: what to build.
        backbone: sizes of the backbone.

    Raises:
        ValueError: the configuration's connections do not fit the backbone's number of blocks.
    """

    def __init__(self, config: LadderConfig, backbone: BackboneShape) -> None:
        super().__init__()
        pairs, num_side_layers = connections(config, backbone.num_layers)
        dims = side_dims(backbone, config.reduction_factor)
        width, side_dim = backbone.hidden_size, dims.side_dim
        self.config = config
        self.dims = dims
        self.joins_at = config.joins_at(backbone.num_layers)
        self.rope_theta = backbone.rope_theta
        self.eps = backbone.rms_norm_eps
        self.side_layer_of = dict(pairs)
        self.embedding_tap = Tap(config, width, side_dim, gated=False) if config.tap_embeddings else None
        gated = config.merge == "lst"
        self.taps = nn.ModuleList(
            Tap(config, width, side_dim, gated and (j > 0 or config.tap_embeddings)) for j in range(len(pairs))
        )
        self.layers = nn.ModuleList(SideLayer(dims, backbone.rms_norm_eps) for _ in range(num_side_layers))
        self.final_norm = nn.Parameter(torch.empty(side_dim)) if config.output == "side_only" else None
        self.side_up = nn.Parameter(torch.empty(width, side_dim))
        self.mix_alpha = nn.Parameter(torch.empty(())) if config.output == "mix" else None
        self._tap_policy: TapPolicy = "device"
        self.reset_parameters()

    @property
    def tap_policy(self) -> TapPolicy:
        """Where hidden states wait for backward, see `engine.model.tap_store`; no part of the configuration.

        Set to "none" it freezes the down-projections, and unfreezes them when set to another policy after that.

        Raises:
            ValueError: set to something else.
        """
        return self._tap_policy

    @tap_policy.setter
    def tap_policy(self, policy: TapPolicy) -> None:
        check_tap_policy(policy)
        if "none" in (policy, self._tap_policy):
            for tap in (*self.taps, *([] if self.embedding_tap is None else [self.embedding_tap])):
                tap.train_projection(policy != "none")
        self._tap_policy = policy

    @property
    def num_side_layers(self) -> int:
        """Side layers l, which is also how many cache layers the side network uses."""
        return len(self.layers)

    @torch.no_grad()
    def gates(self) -> Tensor:
        """Every merge gate in the order of the taps, 1-dim: 0 takes the tap alone, 1 the state alone."""
        gates = [gate for gate in (tap.gate for tap in self.taps) if gate is not None]
        return torch.stack(gates) if gates else torch.empty(0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights from `config.seed` alone; the global random state is neither read nor changed.

        Matrices are normal with variance 1 / fan_in, those that end a residual branch 1 / sqrt(2 l) smaller. side_up
        starts at zero for the output "residual", which makes step 0 the backbone. For "mix" alpha = 1 alone does that,
        and side_up is random: with both closed, neither would let a gradient through to the side layers. For
        "side_only" a zero side_up would put the final norm at its singular point.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        branch_scale = (2 * self.num_side_layers) ** -0.5
        for name, parameter in self.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf.endswith("norm") or leaf == "mix_alpha":
                parameter.fill_(1.0)
            elif leaf == "gate_logit" or (leaf == "side_up" and self.config.output == "residual"):
                parameter.zero_()
            elif parameter.device.type != "meta":
                scale = branch_scale if leaf in ("attention_out", "mlp_out") else 1.0
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * (scale * parameter.shape[-1] ** -0.5))

    def forward(
        self,
        hidden_stream: Iterator[tuple[int, Tensor]],
        layout: SequenceLayout,
        cache: DynamicCache | None = None,
        first_cache_layer: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """`follow` of one network and one batch: h_{L-k} [T, D] and s [T, S]."""
        return follow([self], hidden_stream, [layout], cache, first_cache_layer)[0][0]

    def combine(self, hidden: Tensor, state: Tensor) -> Tensor:
        """y [R, D] from hidden states h_{L-k} [R, D] and side states [R, S] of the same rows.

        "residual": h + up(s). "side_only": up(norm(s)). "mix": alpha*h + (1-alpha)*up(s), written
        h + (1-alpha)*(up(s) - h) so that alpha = 1 gives h exactly and 1 - alpha keeps its precision in a 16-bit dtype.
        """
        dtype = state.dtype
        if self.final_norm is not None:
            state = rms_norm(state, self.final_norm.to(dtype), self.eps)
        widened = F.linear(state, self.side_up.to(dtype))
        if self.config.output == "residual":
            return hidden + widened
        if self.mix_alpha is None:
            return widened
        return hidden + (1 - self.mix_alpha) * (widened - hidden)

    def rotary(self, layout: SequenceLayout, state: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, head_dim] of the rows in the state's dtype."""
        frequencies = inverse_frequencies(self.rope_theta, self.dims.head_dim, state.device)
        return rotary_table(layout.positions, frequencies, state.dtype)


def follow(
    networks: Sequence[SideNetwork],
    hidden_stream: Iterator[tuple[int, Tensor]],
    layouts: Sequence[SequenceLayout],
    cache: DynamicCache | None = None,
    first_cache_layer: int = 0,
) -> list[list[tuple[Tensor, Tensor]]]:
    """Follow the backbone's hidden states with each of several side networks, once for each of several batches whose
    rows lie one after the other.

    The stream is consumed as it is produced and no state is held longer than its own turn, beyond what the taps'
    backwards need; of that one copy serves all networks, but for the policy "int8".

    Args:
        networks: beside the same backbone.
        hidden_stream: (i, h_i [T, D]) in order, without gradient, from i = 0 to the last that a network joins at.
        layouts: documents and positions of each batch's rows, T in all.
        cache: keys and values of earlier columns while decoding, of one network.
        first_cache_layer: cache index of side layer 0.

    Returns:
        for each network, the hidden state it joins at [N, D] and s [N, S] of each batch.
    """
    keepers = {policy: [TapKeeper(policy) for _ in layouts] for policy in {one.tap_policy for one in networks}}
    climbs = [
        [
            _Climb(network, layout, keeper, cache, first_cache_layer)
            for layout, keeper in zip(layouts, keepers[network.tap_policy], strict=True)
        ]
        for network in networks
    ]
    sizes = [sum(layout.lengths) for layout in layouts]
    for index, hidden in hidden_stream:
        parts = hidden.split(sizes)
        for climb, part in itertools.chain.from_iterable(zip(of_one, parts, strict=True) for of_one in climbs):
            climb.meet(index, part)
        # The loop's variables would keep this state alive while the backbone computes the next one.
        del hidden, parts, part
    return [[climb.finish() for climb in of_one] for of_one in climbs]


class _Climb:
    """One pass of a side network over the rows of a batch, from the first tap to the last side layer."""

    def __init__(
        self,
        network: SideNetwork,
        layout: SequenceLayout,
        keeper: TapKeeper,
        cache: DynamicCache | None,
        first_cache_layer: int,
    ) -> None:
        self._network = network
        self._layout = layout
        self._cache = cache
        self._first_cache_layer = first_cache_layer
        self._state: Tensor | None = None
        self._joined: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._keeper = keeper

    def meet(self, index: int, hidden: Tensor) -> None:
        """Take h_index [T, D], without gradient; nothing of it is held beyond what its tap's backward needs."""
        network = self._network
        if index == 0 and network.embedding_tap is not None:
            self._state = network.embedding_tap(hidden, None, self._keeper)
        if (tapped := network.side_layer_of.get(index)) is not None:
            self._state = network.taps[tapped](hidden, self._state, self._keeper)
            self._run_layer(tapped)
        if index == network.joins_at:
            self._joined = hidden

    def finish(self) -> tuple[Tensor, Tensor]:
        """h_{L-k} [T, D], and the side state [T, S] after the layers above the last tap."""
        for untapped in range(len(self._network.taps), self._network.num_side_layers):
            self._run_layer(untapped)
        assert self._joined is not None and self._state is not None
        return self._joined, self._state

    def _run_layer(self, index: int) -> None:
        assert self._state is not None
        self._tables = self._tables or self._network.rotary(self._layout, self._state)
        cache_layer = self._first_cache_layer + index
        layer = self._network.layers[index]
        self._state = layer(self._state, self._tables, self._layout, self._cache, cache_layer)
