"""What several side networks hold that follow the same passes and take turns with loss, backward and optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.memory.plan import StepParts

Bytes = Mapping[str, int]


def joined_phases(networks: Sequence[StepParts]) -> dict[str, Bytes]:
    """Bytes by phase and part of a step of all networks, in the order of their turns.

    Weights, scratch and taps are there once. A network holds all of its side states until its turn and none after it,
    and gradients during the turns of others only where they are summed over several passes.
    """
    plans = [network.plan().phases for network in networks]
    own = {"side parameters", "moments", "side states"}
    if networks[0].work.accumulation > networks[0].work.group:
        own.add("gradients")
    tapped = frozenset().union(*(network.kept_taps for network in networks))
    most = max(len(network.kept_taps) for network in networks)

    def joined(all_parts: Sequence[Bytes]) -> dict[str, int]:
        names = dict.fromkeys(name for parts in all_parts for name in parts)
        sizes = {name: (sum if name in own else max)(parts.get(name, 0) for parts in all_parts) for name in names}
        return sizes | ({"taps": sizes["taps"] * len(tapped) // most} if sizes.get("taps") else {})

    done, waiting = [network.during_passes() for network in networks], [network.passed() for network in networks]

    def worst_turn(moments: Sequence[Sequence[Bytes]]) -> Bytes:
        turns = [
            joined([*done[:turn], moment, *waiting[turn + 1 :]])
            for turn, of_one in enumerate(moments)
            for moment in of_one
        ]
        return max(turns, key=lambda parts: sum(parts.values()))

    in_turns = {
        "loss": worst_turn([[plan["loss"]] for plan in plans]),
        "backward": worst_turn([network.backward() for network in networks]),
        "optimizer": worst_turn([[plan["optimizer"]] for plan in plans]),
    }
    return {phase: in_turns.get(phase) or joined([plan[phase] for plan in plans]) for phase in plans[0]}
