"""Writing result files so that a reader never sees half of one."""

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from official_recipes.common.data_format import DataFormatError


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


def plain(content: Any) -> Any:
    """Returns a tree of results as JSON has it.

    Args:
        content: Mappings, lists and tuples of numbers, text, arrays, tensors and paths.

    Returns:
        The same of dictionaries with text as keys, lists, plain numbers and text. Numbers that are
        infinite or NaN, which JSON has not, are ``None``.
    """
    if isinstance(content, Mapping):
        return {str(key): plain(item) for key, item in content.items()}
    if hasattr(content, "numpy"):
        content = content.numpy()
    if hasattr(content, "tolist"):
        content = content.tolist()
    if isinstance(content, list | tuple):
        return [plain(item) for item in content]
    if isinstance(content, bytes):
        return content.decode(errors="replace")
    if isinstance(content, float) and not math.isfinite(content):
        return None
    known = content is None or isinstance(content, bool | int | float | str)
    return content if known else str(content)


def json_text(content: Any) -> str:
    """Returns :func:`plain` ``content`` as the text of a JSON file."""
    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file so that a reader never sees half of it.

    Args:
        path: The file to create or replace. Its folder must exist.
        content: What :func:`plain` takes.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Reads a JSON file that :func:`write_json` wrote.

    Args:
        path: The file.
        keys: What it must have.

    Raises:
        DataFormatError: It can not be read, or is no object with these keys.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataFormatError(f"{path}: {error}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        raise DataFormatError(f"{path}: no JSON object with {', '.join(missing) or 'keys'}")
    return content


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one JSON row to a file, whole or not at all, whoever else appends.

    Args:
        path: The file, made if missing.
        row: What JSON can hold, as :func:`plain` returns it.

    Raises:
        ValueError: A number is infinite or NaN.
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
