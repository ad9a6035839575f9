"""An output folder that appears when all of it is written, never before."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from official_recipes.common.flag_parsing import FlagValueError, fail
from official_recipes.common.interruption import Interrupted, Interruption, interruption
from official_recipes.common.progress import progress_bar

INSTALL = "install what recipes need by pip install '.[recipes]' in the project's folder"
"""What to do where a module is missing."""

NOTHING_WRITTEN = "interrupted: nothing was written"

_LIMIT_S = 2


def exit_code_of(prepare: Callable[[], None], *mistakes: type[Exception]) -> int:
    """Runs the preparation of data, whose errors end in one line on stderr.

    Args:
        prepare: Parses the command line and writes the data.
        *mistakes: Errors besides `FlagValueError` whose message says all.

    Returns:
        0, 2 for flags or data that cannot be used or a package that is missing, 130 or 143 when
        interrupted.
    """
    told: tuple[type[Exception], ...] = (FlagValueError, ModuleNotFoundError, *mistakes)
    try:
        prepare()
    except told as error:
        missing = isinstance(error, ModuleNotFoundError)
        return fail(f"{error}: {INSTALL}" if missing else error)
    except KeyboardInterrupt as error:
        print(NOTHING_WRITTEN, file=sys.stderr)
        return error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT
    return 0


def check_folder(flag: str, folder: Path) -> None:
    """Checks that a folder can be written to, or be made, without making it.

    Args:
        flag: The name of the flag that gave it, for errors.
        folder: The folder.

    Raises:
        FlagValueError: It can not.
    """
    absolute = there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
    except OSError as error:  # Such as a name that is too long.
        raise FlagValueError(flag, "a folder that can be made", repr(str(folder))) from error
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    if not writable and there == absolute and there.is_dir():
        raise FlagValueError(flag, "a folder that can be written to", repr(str(folder)))
    if not writable:
        raise FlagValueError(flag, "a folder that can be made", repr(str(folder)))


def make_folder(flag: str, folder: Path) -> None:
    """Makes a folder where there is none yet.

    Args:
        flag: The name of the flag that gave it, for errors.
        folder: The folder, whose parents are made too.

    Raises:
        FlagValueError: It cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlagValueError(flag, "a folder that can be made", repr(str(folder))) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FlagValueError(flag, "a folder that can be written to", repr(str(folder)))


def check_output_dir(value: str | None, flag: str = "output_dir") -> Path:
    """The folder to make, when it can be made.

    Args:
        value: As given on the command line.
        flag: Its name, for errors.

    Raises:
        FlagValueError: It is none, has something in it, or cannot be made.
    """
    if not value:
        raise FlagValueError(flag, "a path", repr(value))
    folder = Path(value).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FlagValueError(flag, "a folder that is empty or does not exist", repr(str(folder)))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlagValueError(flag, "a folder that can be made", repr(str(folder))) from error
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise FlagValueError(flag, "a folder in one that can be written to", repr(str(folder)))
    return folder


@contextlib.contextmanager
def writing(output_dir: Path) -> Iterator[tuple[Path, Progress, Interruption]]:
    """`replacing` with a progress bar, unless a signal comes before its end.

    A signal that no check has seen within two seconds, as in another library, ends the process.

    Args:
        output_dir: The folder to make; nothing or an empty folder is there.

    Yields:
        The folder to write into, the progress bar, and whether a signal has come.

    Raises:
        FlagValueError: Another run is writing the same output.
        Interrupted: A signal has come, and nothing was written.
    """
    with (
        interruption((signal.SIGINT, signal.SIGTERM), NOTHING_WRITTEN, _LIMIT_S) as stop,
        replacing(output_dir) as partial,
        progress_bar(Console(stderr=True)) as progress,
    ):
        stop.clean_up = lambda: _remove(partial)
        yield partial, progress, stop
        stop.check()


@contextlib.contextmanager
def replacing(output_dir: Path, flag: str = "output_dir") -> Iterator[Path]:
    """A hidden folder that gets the name of the output when the block succeeds, whole.

    A process that is killed leaves it behind; the next run for the same output removes it.

    Args:
        output_dir: The folder to make; nothing or an empty folder is there.
        flag: The name of the flag that gave it, for errors.

    Yields:
        The folder to write into.

    Raises:
        FlagValueError: Another run is writing the same output.
    """
    partial = output_dir.parent / f".{output_dir.name}.partial"
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FlagValueError(
                flag, "a folder that no other run is writing", repr(str(output_dir))
            ) from error
        for leftover in partial.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        try:
            yield partial
            os.rename(partial, output_dir)
        except BaseException:
            _remove(partial)
            raise
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    for _ in range(10):  # Another thread may still be writing into it.
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
