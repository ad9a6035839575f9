"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from official_recipes.common.files import atomic_write
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.progress import progress_bar as progress_bar


def listed_names(entries: Sequence[str]) -> tuple[str, ...]:
    """The entries of a list flag: lower-case, each once, in the order given."""
    return tuple(dict.fromkeys(entry.strip().lower() for entry in entries))


def as_given(entries: Sequence[str]) -> str:
    """The entries as they were given, for an error message."""
    return repr(",".join(entries))


def output_file(argument: str | None) -> Path | None:
    """The file named by ``--output``, which must be writable; ``None`` if none is."""
    if argument is None:
        return None
    path = Path(argument)
    if not argument or path.is_dir() or not path.parent.is_dir():
        raise FlagValueError("output", "a file name in a folder that exists", repr(argument))
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file beside its place and puts it there when it is whole."""
    with atomic_write(path) as temporary:
        text = json.dumps(content, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
