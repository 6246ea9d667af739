"""Reads the disassembly of a kernel: its main loop, what is in it, and what that asks of a multiprocessor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Mma of a warp, of a warp group, of a thread block, by generation.
TENSOR_FAMILIES = ("HMMA", "IMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);")
_BRANCH_TARGET = re.compile(r"\bBRA\b.*?`\((\.L_x_\d+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_GLOBAL_ACCESS = ("LDG", "STG", "LDGSTS", "LD", "ST")


class Usage(NamedTuple):
    """What `cuobjdump --dump-resource-usage` says: registers of a thread, bytes of its stack and local memory."""

    registers: int
    stack_bytes: int


class Loop(NamedTuple):
    """Instructions of a loop, or of a whole kernel without one, predicates stripped and padding left out."""

    instructions: tuple[str, ...]

    @property
    def families(self) -> Counter[str]:
        """How often each opcode is there, without its modifiers."""
        return Counter(family(text) for text in self.instructions)

    @property
    def tensor_instructions(self) -> int:
        """Tensor-core instructions."""
        return sum(self.families[name] for name in TENSOR_FAMILIES)


def read_usage(text: str) -> Usage:
    """Parse the resource usage of a cubin's only kernel.

    Raises:
        ValueError: there is none in the text.
    """
    match = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if match is None:
        raise ValueError(f"expected resource usage with REG, STACK and LOCAL, got {text!r}")
    registers, stack, local = map(int, match.groups())
    return Usage(registers, stack + local)


def family(instruction: str) -> str:
    """The opcode without modifiers: "LDG.E.128 R4, [R2]" is an LDG."""
    return instruction.split(None, 1)[0].split(".", 1)[0]


def read_instructions(listing: str) -> tuple[list[str], dict[str, int]]:
    """Instructions of an `nvdisasm -c` listing in order, and by label the index of the one behind it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(_PREDICATE.sub("", instruction[1]))
    return instructions, labels


def read_main_loop(listing: str) -> Loop:
    """The innermost loop with the most tensor-core instructions, else the longest.

    The whole kernel where there is no loop, or where tensor-core instructions stand outside of all loops: a product of
    one step leaves none on sm_100 but that which waits for it.

    Raises:
        ValueError: the listing has no instructions.
    """
    instructions, labels = read_instructions(listing)
    if not instructions:
        raise ValueError("expected a listing of nvdisasm, got no instructions")
    loops = []
    for index, instruction in enumerate(instructions):
        target = _BRANCH_TARGET.search(instruction)
        # A branch to itself is the trap behind the end of a kernel.
        if target is not None and labels.get(target[1], index) < index:
            loops.append(_without_padding(instructions[labels[target[1]] : index + 1]))
    whole, most = _without_padding(instructions), max((loop.tensor_instructions for loop in loops), default=0)
    if not loops or (most == 0 and whole.tensor_instructions):
        return whole
    if most == 0:
        return max(loops, key=lambda loop: len(loop.instructions))
    return min((loop for loop in loops if loop.tensor_instructions == most), key=lambda loop: len(loop.instructions))


def count_local_accesses(listing: str) -> int:
    """Loads and stores of local memory anywhere in a kernel: what spilling causes."""
    return sum(family(text) in ("LDL", "STL") for text in read_instructions(listing)[0])


def tensor_fma_per_warp(instructions: Iterable[str]) -> int | None:
    """Multiply-adds that one warp's tensor-core instructions are; None where the listing does not tell."""
    total = 0
    for text in instructions:
        opcode = text.split(None, 1)[0]
        name = family(text)
        if name not in TENSOR_FAMILIES:
            continue
        if warp := re.match(r"[HIQO]MMA\.16(\d)(\d+)\b", opcode):  # 16816 is 16 x 8 x 16
            total += 16 * int(warp[1]) * int(warp[2])
        elif group := re.match(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)\b", opcode):
            total += int(group[1]) * int(group[2]) * int(group[3]) // 4  # four warps share it
        else:  # Blackwell's takes its shape from a register
            return None
    return total


def count_lookups(instructions: Sequence[str], entry_bytes: int) -> int:
    """Loads from shared memory as wide as an entry of a table: its look-ups, and whatever else has that width."""
    modifiers = [text.split(None, 1)[0].split(".") for text in instructions if family(text) == "LDS"]
    return sum(("64" in found, "128" in found) == (entry_bytes == 8, False) for found in modifiers)


def global_bytes_per_thread(instructions: Sequence[str]) -> int:
    """Bytes that a thread loads from and stores to global memory, predicates taken as true."""
    return sum(_access_bytes(text.split(None, 1)[0]) for text in instructions if family(text) in _GLOBAL_ACCESS)


def _access_bytes(opcode: str) -> int:
    modifiers = opcode.split(".")
    for modifier, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if modifier in modifiers:
            return size
    return 4


def _without_padding(instructions: Sequence[str]) -> Loop:
    return Loop(tuple(text for text in instructions if family(text) != "NOP"))
