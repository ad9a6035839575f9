"""Reading text files of the recipes, and English text that ships with Python."""

from __future__ import annotations

import gzip
from pathlib import Path

from official_recipes.common.data_format import DataFormatError


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 file, gzip-compressed if its name says so.

    Without their ends, those of Windows too, and without a byte order mark.

    Raises:
        DataFormatError: It is missing, damaged or not UTF-8.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataFormatError(f"{path}: {error}") from error
    text = text.replace("\r\n", "\n")
    return text.split("\n")[: -1 if text.endswith("\n") else None]


def first_file(folder: Path, names: list[str]) -> Path | None:
    """Returns the first of these files that the folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def python_topics() -> list[str]:
    """Returns the paragraphs of Python's help on its language, tens of thousands of words."""
    from pydoc_data.topics import topics

    return [
        " ".join(paragraph.split())
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
        if paragraph.strip()
    ]
