"""What a compiled program's text tells, and how figures are compared. Needs nothing but Python."""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

COMPARED = (
    "bytes",
    "all_reduces",
    "reduced_bytes",
    "loops",
    "conditions",
    "sorts",
    "long_divisions",
    "program_bytes",
)
"""Figures that must not be above those that are stored; of equal versions they are equal."""

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4}
_SIZES |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8}

# "  ROOT %name = TYPE opcode(": a type is a tuple or one word, with a layout behind it.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"([a-z][a-z0-9]+)\[([\d,]*)\]")


def figures(text: str) -> dict[str, int]:
    """Counts in the text of a compiled program, in all of its computations.

    Args:
        text: An HloModule as text.

    Returns:
        "all_reduces" and the "reduced_bytes" that they have for a result on each replica, "loops",
        "conditions" and "sorts".
    """
    opcodes: collections.Counter[str] = collections.Counter()
    reduced = 0
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        made, opcode = match.groups()
        opcode = opcode.removesuffix("-start")
        opcodes[opcode] += 1
        if opcode == "all-reduce":
            reduced += sum(_size(*array) for array in _ARRAY.findall(made))
    return {
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
        if name in stored and row[name] > stored[name]
    ]


def _size(dtype: str, shape: str) -> int:
    return _SIZES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
