"""The progress bar of recipes and benchmarks."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from official_recipes.common.interruption import Interruption


def progress_bar(console: Console) -> Progress:
    """A progress bar that vanishes at its end and is silent without a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Bar:
    """Shows how far something is, and ends it between two steps if a signal has come.

    Args:
        progress: Where it is shown.
        text: What it is.
        interrupted: Whether a signal has come.
    """

    def __init__(self, progress: Progress, text: str, interrupted: Interruption) -> None:
        self._progress = progress
        self._text = text
        self._task: TaskID | None = None
        self._interrupted = interrupted

    def __call__(self, done: int, total: int) -> None:
        """Shows that so many of so many steps are done."""
        self._interrupted.check()
        if self._task is None:
            self._task = self._progress.add_task(self._text, total=total)
        self._progress.update(self._task, completed=done, total=total)
        if done >= total:
            self.remove()

    def remove(self) -> None:
        """Shows it no longer."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
