"""Interleaved timing, the speed of memory, and how much memory the process holds."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_COPY_FLOATS = 1 << 26  # 256 MiB per array, beyond any cache


@dataclasses.dataclass(frozen=True)
class Timing:
    """Durations of one thing, in milliseconds."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.times)

    @property
    def p10(self) -> float:
        """A tenth is shorter."""
        return float(np.percentile(self.times, 10))

    @property
    def p90(self) -> float:
        """A tenth is longer."""
        return float(np.percentile(self.times, 90))


class MemoryCopy:
    """A copy between two large arrays by as many threads as there are cores."""

    def __init__(self) -> None:
        # Both are written here: pages that were never touched would be mapped during the copy.
        self._source, self._target = (np.full(_COPY_FLOATS, i, np.float32) for i in (1, 2))
        self._threads = ThreadPoolExecutor(cores())
        bounds = np.linspace(0, _COPY_FLOATS, cores() + 1).astype(int)
        self._slices = [slice(a, b) for a, b in itertools.pairwise(bounds)]

    bytes_moved = 8 * _COPY_FLOATS
    """Four read and four written per float."""

    def __call__(self) -> None:
        """Copies once."""
        for copied in [self._threads.submit(self._copy, part) for part in self._slices]:
            copied.result()

    def _copy(self, part: slice) -> None:
        np.copyto(self._target[part], self._source[part])


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    repeats: int,
    tick: Callable[[], None],
    seed: int = 0,
) -> dict[str, Timing]:
    """Times every task once per round, in another order each round.

    Whatever else slows the machine down hits all tasks alike that way, and none always finds the
    caches as the same other one leaves them.

    Args:
        tasks: What to time, by name.
        repeats: The number of rounds.
        tick: Called after each task.
        seed: Of the orders.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    shuffle = random.Random(seed).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            tasks[name]()
            times[name].append(1e3 * (time.perf_counter() - started))
            tick()
    return {name: Timing(tuple(values)) for name, values in times.items()}


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int | None:
    """The memory that the process holds now; ``None`` where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most memory that the process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
