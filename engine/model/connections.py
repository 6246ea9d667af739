"""Connection maps: which backbone block feeds which side layer.

A map is a list of (backbone_layer, side_layer) pairs. backbone_layer i in 1..L names the hidden state h_i, the output
of the i-th block; side_layer j in 0..l-1 counts from zero, as modules do. The embeddings h_0 are never in a map: where
a method taps them, they are what the side network starts from, not an input of a layer.
"""

from __future__ import annotations

from engine.config import LadderConfig

Connections = list[tuple[int, int]]


def ladder_connections(num_layers: int, tap_every: int = 1) -> Connections:
    """Every `tap_every`-th block counted down from the last, each feeding a side layer of its own.

    Args:
        num_layers: backbone blocks L.
        tap_every: distance of tapped blocks; 1 taps all of them.

    Returns:
        ceil(L / tap_every) pairs; the last block is always among them.

    Raises:
        ValueError: tap_every outside 1..L.
    """
    if not 1 <= tap_every <= num_layers:
        raise ValueError(
            f"tap_every must be from 1 to the {num_layers} blocks that the side network follows, got {tap_every}"
        )
    tapped = sorted(range(num_layers, 0, -tap_every))
    return [(backbone_layer, side_layer) for side_layer, backbone_layer in enumerate(tapped)]


def xladder_connections(num_layers: int, num_taps: int, num_side_layers: int) -> Connections:
    """The top `num_taps` blocks feed the first `num_taps` side layers; the side layers above have no tap.

    What the last tap carries has passed L blocks and still passes the l - delta free layers, so that l = 2 * delta
    gives the depth L + delta of arXiv 2512.14237.

    Args:
        num_layers: backbone blocks L.
        num_taps: tapped blocks delta.
        num_side_layers: side layers l.

    Raises:
        ValueError: num_taps outside 1..min(L, l).
    """
    if not 1 <= num_taps <= num_layers:
        raise ValueError(
            f"num_taps must be from 1 to the {num_layers} blocks that the side network follows, got {num_taps}"
        )
    if num_taps > num_side_layers:
        raise ValueError(
            f"num_taps={num_taps} needs at least as many side layers, got num_side_layers={num_side_layers}: "
            "lower num_taps or raise num_side_layers"
        )
    first = num_layers - num_taps + 1
    return [(first + side_layer, side_layer) for side_layer in range(num_taps)]


def connections(config: LadderConfig, num_layers: int) -> tuple[Connections, int]:
    """The connection map of a configuration beside a backbone of `num_layers` blocks, and the number of side layers.

    Blocks above `config.joins_at` are as if they were not there: what they compute follows from the side network.

    Raises:
        ValueError: the configuration does not fit that many blocks.
    """
    num_layers = config.joins_at(num_layers)
    if config.connection == "xladder":
        num_side_layers = config.num_side_layers or num_layers
        num_taps = config.num_taps or max(1, num_side_layers // 2)
        return xladder_connections(num_layers, num_taps, num_side_layers), num_side_layers
    pairs = ladder_connections(num_layers, config.tap_every)
    if config.num_side_layers not in (None, len(pairs)):
        raise ValueError(
            f"num_side_layers={config.num_side_layers}, but tap_every={config.tap_every} taps {len(pairs)} of "
            f"{num_layers} blocks and a ladder has one side layer per tap: leave num_side_layers unset and choose "
            "tap_every, or use the preset xladder"
        )
    return pairs, len(pairs)
