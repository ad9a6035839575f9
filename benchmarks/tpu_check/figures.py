"""What a compiled program's text tells, and how figures are compared. Needs nothing but Python."""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

COMPARED = (
    "bytes",
    "memory_bytes",
    "all_reduces",
    "reduced_bytes",
    "loops",
    "conditions",
    "sorts",
    "long_divisions",
    "program_bytes",
)
"""Figures that must not be above those that are stored."""

TOLERANCE = 1e-4
"""By so much they may be, relative: a few scalars, where one more pass is over a whole layer."""

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4}
_SIZES |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8}

# "  ROOT %name = TYPE opcode(OPERANDS), ...": a type is a tuple or one word; in braces behind an
# array is its layout, with "S(1)" where it is on the chip and not in the chip's memory (HBM).
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*?)\)(?:, |$)"
)
_ARRAY = re.compile(r"([a-z][a-z0-9]+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_FUSED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_MOVES_NOTHING = {
    "bitcast", "conditional", "constant", "get-tuple-element", "parameter", "tuple", "while",
    "all-reduce-done", "async-done", "copy-done", "slice-done",
}  # fmt: skip


def figures(text: str) -> dict[str, int]:
    """Counts in the text of a compiled program, in all of its computations.

    Args:
        text: An HloModule as text.

    Returns:
        "memory_bytes", which the instructions read from the chip's memory and write there;
        "all_reduces" and the "reduced_bytes" that they have for a result on each replica; "loops",
        "conditions" and "sorts".
    """
    opcodes: collections.Counter[str] = collections.Counter()
    fused = {*_FUSED.findall(text)}
    computation, memory, reduced = "", 0, 0
    in_memory: dict[str, int] = {}
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            computation, in_memory = begin[1], {}
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, made, opcode, operands = match.groups()
        arrays = [
            (_size(dtype, shape), "S(" in layout) for dtype, shape, layout in _ARRAY.findall(made)
        ]
        in_memory[name] = sum(size for size, on_chip in arrays if not on_chip)
        if computation not in fused and opcode not in _MOVES_NOTHING:
            if opcode == "copy-start":  # results are the copy and what it is of
                memory += sum(size for size, on_chip in arrays[:2] if not on_chip)
            elif opcode == "slice-start":
                memory += arrays[1][0]
            elif '"ConcatBitcast"' not in line:
                memory += in_memory[name]
                memory += sum(in_memory.get(o, 0) for o in re.findall(r"%([\w.\-]+)", operands))
        opcode = opcode.removesuffix("-start")
        opcodes[opcode] += 1
        if opcode == "all-reduce":
            reduced += sum(size for size, _ in arrays)
    return {
        "memory_bytes": memory,
        "all_reduces": opcodes["all-reduce"],
        "reduced_bytes": reduced,
        "loops": opcodes["while"],
        "conditions": opcodes["conditional"],
        "sorts": opcodes["sort"],
    }


def above(row: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """What is worse in a row than in the one that is stored, one text for each figure."""
    if "error" in row:
        return [row["error"]]
    return [
        f"{name}: {row[name]:,}, stored {stored[name]:,}"
        for name in COMPARED
        if name in stored and row[name] > (1 + TOLERANCE) * stored[name]
    ]


def _size(dtype: str, shape: str) -> int:
    return _SIZES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
