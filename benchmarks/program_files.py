"""Programs as files: what `xla_programs` writes and `run_programs` reads. Needs NumPy only.

A program is two files: ``NAME.hlo.pb``, a serialized HloModule, and ``NAME.json``, which says what
its arguments are, what they start with, which of them its results take the place of, and what the
weights must be after some updates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from official_recipes.common.files import atomic_write, write_json

FORMAT = "tf_lbopt program 1"
_SAMPLES = 100

Terms = tuple[tuple[int, float, float], ...]
"""Seed, lower and upper bound of uniform numbers that are added up."""


class NotAProgramError(ValueError):
    """A file is none of ours."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """What a program is called with.

    Attributes:
        name: For people.
        role: "input" (the same in each call), "weight", "slot", or "other" (counters, rates,
            accumulators).
        shape: Its shape.
        dtype: As NumPy has it.
        terms: What it starts with.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    terms: Terms

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def values(self) -> np.ndarray:
        """What it starts with: the same on every machine and with every NumPy."""
        total = sum(_uniform(seed, low, high, self.shape) for seed, low, high in self.terms)
        return np.asarray(total).astype(self.dtype)


def _uniform(seed: int, low: float, high: float, shape: Sequence[int]) -> np.ndarray:
    if low == high:
        return np.full(shape, low, np.float32)
    size = math.prod(shape)
    # Of NumPy's streams only the raw ones stay as they are.
    raw = np.random.PCG64(seed).random_raw(-(-size // 2)).astype("<u8").view("<u4")[:size]
    unit = (raw >> 8).astype(np.float32) * np.float32(2.0**-24)
    return (np.float32(low) + np.float32(high - low) * unit).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a weight must be after the updates, in float64.

    Attributes:
        argument: Which it is.
        scale: What errors of elements are a part of: how far any element of it has changed.
        change: The norm of the difference to what it started with.
        values: Of some elements, evenly spread.
    """

    argument: int
    scale: float
    change: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, argument: int, start: np.ndarray, end: np.ndarray, least: float) -> Expected:
        """From a weight before and after.

        Args:
            argument: Which it is.
            start: Before.
            end: After.
            least: Of the scale.
        """
        scale = max(float(np.abs(end - start).max()), least)
        values = tuple(end.ravel()[_sampled(end.size)].tolist())
        return cls(argument, scale, _norm(end - start), values)

    def error(self, start: np.ndarray, end: np.ndarray) -> float:
        """How far a result is off, as a part of the scale."""
        off = np.abs(end.ravel()[_sampled(end.size)] - np.asarray(self.values)).max()
        # Of the elements that are not stored the norm of the change tells.
        change = _norm(np.subtract(end, start, dtype=np.float64))
        of_all = abs(change - self.change) / max(self.change, self.scale)
        return float(np.maximum(off / self.scale, of_all))  # NaN stays


def _sampled(size: int) -> np.ndarray:
    return np.linspace(0, size - 1, min(size, _SAMPLES)).astype(int)


def _norm(x: np.ndarray) -> float:
    return math.sqrt(np.vdot(x, x))


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and what is known of it.

    Attributes:
        name: Its name, of which there is one in a group.
        group: Programs of which are compared: a model's.
        base: Of the program that it is to be compared with, or "".
        kind: "update", or "step" for a whole training step.
        versions: Of what made it.
        arguments: In order.
        results: For each result the argument of the next call that it is, or -1.
        updates: After how many updates the weights are as expected.
        expected: Of each weight.
        tolerance: The largest error that is right: of any weight, of a step the median of all.
        code: The serialized HloModule.
    """

    name: str
    group: str
    base: str
    kind: str
    versions: dict[str, str]
    arguments: tuple[Argument, ...]
    results: tuple[int, ...]
    updates: int
    expected: tuple[Expected, ...]
    tolerance: float
    code: bytes

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(a.shape) for a in self.arguments if a.role == "weight")

    @property
    def least_bytes(self) -> int | None:
        """What an update has to move: inputs are read, weights and slots read and written."""
        if self.kind != "update":
            return None
        times = {"input": 1, "weight": 2, "slot": 2, "other": 0}
        return sum(times[a.role] * a.bytes for a in self.arguments)


def write(folder: Path, program: Program) -> Path:
    """Writes a program's two files, and returns the path of the one that is to be read."""
    content = dataclasses.asdict(program)
    code = content.pop("code")
    path = folder / f"{program.group}_{program.name}.json"
    with atomic_write(path.with_suffix(".hlo.pb")) as temporary:
        temporary.write_bytes(code)
    write_json(path, {"format": FORMAT, "sha256": hashlib.sha256(code).hexdigest(), **content})
    return path


def read(path: Path) -> Program:
    """Reads a program.

    Raises:
        NotAProgramError: It is none, or the file beside it is missing or another's.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise NotAProgramError(f"{path}: not of the format {FORMAT!r}")
        sha256 = content.pop("sha256")
        code = path.with_suffix(".hlo.pb").read_bytes()
    except FileNotFoundError as error:
        raise NotAProgramError(f"{error.filename}: no such file") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, NotAProgramError):
            raise
        expected = "expected a .json file that benchmarks.xla_programs wrote"
        raise NotAProgramError(f"{path}: {expected}") from None
    if hashlib.sha256(code).hexdigest() != sha256:
        raise NotAProgramError(f"{path.with_suffix('.hlo.pb')}: not the program of {path.name}")
    arguments = [
        Argument(**{**a, "shape": tuple(a["shape"]), "terms": tuple(map(tuple, a["terms"]))})
        for a in content.pop("arguments")
    ]
    expected = [Expected(**{**e, "values": tuple(e["values"])}) for e in content.pop("expected")]
    results = tuple(content.pop("results"))
    return Program(
        **content, arguments=tuple(arguments), results=results, expected=tuple(expected), code=code
    )
