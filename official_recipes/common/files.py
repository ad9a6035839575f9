"""Writing result files and folders so that a reader never sees half of one."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from official_recipes.common.flag_parsing import FlagValueError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; it replaces ``path`` when the block succeeds.

    Args:
        path: The file to create or replace. Its folder must exist.

    Yields:
        The temporary file to write to, with the same suffix as ``path``.
    """
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates files that only the owner can read; results get the usual mode.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(flag: str, folder: Path) -> None:
    """Checks that a folder can be made by `new_folder`, and makes the one that it will be in.

    Args:
        flag: Whose value it is, for the error.
        folder: An absolute path.

    Raises:
        FlagValueError: It can not.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FlagValueError(flag, "a folder that is empty or does not exist", repr(str(folder)))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlagValueError(flag, "a folder that can be made", repr(str(folder))) from error
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise FlagValueError(flag, "a folder in one that can be written to", repr(str(folder)))


@contextlib.contextmanager
def new_folder(flag: str, folder: Path) -> Iterator[Path]:
    """Yields a hidden folder beside ``folder``, which gets its name when the block succeeds.

    A process that is killed leaves the hidden one behind; the next one for the same ``folder``
    removes what is in it.

    Args:
        flag: Whose value ``folder`` is, for the error.
        folder: The folder to make, as `check_new_folder` allows it.

    Yields:
        The empty folder to write to.

    Raises:
        FlagValueError: Another process is writing it.
    """
    partial = folder.parent / f".{folder.name}.partial"
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FlagValueError(
                flag, "a folder that no other run is writing", repr(str(folder))
            ) from error
        for leftover in partial.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        try:
            yield partial
            os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one JSON row to a file, whole or not at all, whoever else appends.

    Args:
        path: The file, made if missing.
        row: What JSON can hold.
    """
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        # A writer that was killed may have left a part of a line.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            content = os.pread(descriptor, size, 0)
            os.ftruncate(descriptor, content.rfind(b"\n") + 1)
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{path}: wrote {written} of {len(line)} bytes")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
