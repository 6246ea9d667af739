"""What the numbers of a listing mean on a card: shared memory limits, rates, bank conflicts, the predicted bound."""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from typing import NamedTuple

BANKS = 32
WARP = 32
SCHEDULERS = 4  # instructions a multiprocessor issues per clock
L2_BYTES_PER_CLOCK = 64  # nominal width of a multiprocessor's port to the second-level cache
_DRAWS = 4000


class Card(NamedTuple):
    """A card of an architecture, from its data sheet.

    Attributes:
        name: whose numbers these are.
        shared_bytes: what a thread block can have of shared memory.
        tensor_fma: dense 16-bit multiply-adds with fp32 sums, per clock and multiprocessor.
        memory_bytes: of device memory, per clock and multiprocessor.
    """

    name: str
    shared_bytes: int
    tensor_fma: int
    memory_bytes: float


# Bandwidth / multiprocessors / boost clock; GeForce sums in fp32 at half its fp16 rate.
CARDS = {
    75: Card("T4", 64 << 10, 512, 320 / 40 / 1.59),
    80: Card("A100 80GB", 163 << 10, 1024, 2039 / 108 / 1.41),
    86: Card("RTX 3060", 99 << 10, 256, 360 / 28 / 1.777),
    89: Card("RTX 4070", 99 << 10, 256, 504 / 46 / 2.475),
    90: Card("H200", 227 << 10, 2048, 4800 / 132 / 1.98),
    100: Card("B200", 227 << 10, 4096, 8000 / 148 / 1.85),
    120: Card("RTX 5070", 99 << 10, 256, 672 / 48 / 2.512),
}


class Work(NamedTuple):
    """What a thread block does in one pass of its main loop.

    Attributes:
        warps: of the thread block.
        instructions: of each warp.
        tensor_fma: multiply-adds of all its tensor-core instructions; None where there are none or it is unknown.
        memory_bytes: that all its threads load from and store to global memory; scales that many lanes share, which a
            cache serves, count for each.
        lookups: table look-ups of each warp.
        lookup_wavefronts: passes over the banks that a look-up takes.
        is_shared_by_blocks: whether other thread blocks read the same data, so that it comes from the cache.
    """

    warps: int
    instructions: int
    tensor_fma: int | None
    memory_bytes: int
    lookups: int
    lookup_wavefronts: float
    is_shared_by_blocks: bool


def cycles(work: Work, card: Card) -> dict[str, float]:
    """Clocks that each resource of a multiprocessor is busy for, by its name."""
    rate = L2_BYTES_PER_CLOCK if work.is_shared_by_blocks else card.memory_bytes
    busy = {
        "tensor pipe": (work.tensor_fma or 0) / card.tensor_fma,
        "issue slots": work.instructions * work.warps / SCHEDULERS,
        "bytes": work.memory_bytes / rate,
    }
    if work.lookups:
        busy["table banks"] = work.lookups * work.warps * work.lookup_wavefronts
    return busy


def predicted_bound(work: Work, card: Card) -> str:
    """The resource that is busy for longest: which one, not how long, for latency is not in it."""
    busy = cycles(work, card)
    return max(busy, key=lambda name: busy[name])


@functools.cache
def lookup_wavefronts(entries: int, entry_bytes: int = 4) -> float:
    """Expected passes over the banks when the lanes of a warp look up random entries of a table in shared memory.

    Lanes that want the same entry share it, others in the same bank queue; entries of 8 bytes go half a warp at a time.
    Drawn with a fixed seed; for 4 bytes 16 entries give 1, 256 about 3.2.
    """
    phases = max(1, entry_bytes // 4)
    columns = BANKS // phases
    generator = random.Random(0)
    total = 0
    for _ in range(_DRAWS):
        wanted = {generator.randrange(entries) for _ in range(WARP // phases)}
        total += max(Counter(entry % columns for entry in wanted).values())
    return phases * total / _DRAWS


def table_shape(ttgir: str) -> tuple[int, int] | None:
    """Entries and bytes of an entry of the largest table that the kernel looks up; None without a look-up."""
    tables = re.findall(r"tt\.gather .*?: \(tensor<(\d+)x[a-z]+(\d+)", ttgir)
    return max(((int(entries), int(bits) // 8) for entries, bits in tables), default=None)


def blackwell_tensor_fma(ptx: str, tensor_instructions: int) -> int | None:
    """Multiply-adds of a thread block's `tcgen05.mma` on 16-bit operands, whose shape is in a descriptor of the PTX.

    Bits 17 to 22 hold N / 8, bits 24 to 28 M / 16, and K is 16. None unless all have one constant descriptor.
    """
    registers = set(re.findall(r"tcgen05\.mma\S*kind::f16 .*?, (%r\d+), %p\d+;", ptx))
    constants = {match for name in registers for match in re.findall(rf"mov\.b32\s+{name}, (\d+);", ptx)}
    if len(constants) != 1:
        return None
    descriptor = int(constants.pop())
    return tensor_instructions * (descriptor >> 17 & 63) * 8 * (descriptor >> 24 & 31) * 16 * 16
