"""The error of data that can not be read, and of which flag it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from official_recipes.common.flag_parsing import FlagValueError


class DataFormatError(ValueError):
    """A data file or folder is missing, damaged or of an unknown form."""


@contextlib.contextmanager
def data_of_flag(flag: str, expected: str, given: str | None = None) -> Iterator[None]:
    """Makes an error of data one of the flag that named them.

    Args:
        flag: Its name.
        expected: What it takes.
        given: Its value, where the error does not name it.

    Raises:
        FlagValueError: A `DataFormatError` was raised in the block.
    """
    try:
        yield
    except DataFormatError as error:
        received = error if given is None else f"{given!r} ({error})"
        raise FlagValueError(flag, expected, received) from error
