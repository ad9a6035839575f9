"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from official_recipes.common.flag_parsing import (
    EXIT_BAD_FLAG,
    EXIT_INTERRUPTED,
    FlagValueError,
)
from official_recipes.common.interruption import NO_RESULTS
from official_recipes.common.progress import progress_bar as progress_bar

Options = TypeVar("Options")


def exit_code_of(run: Callable[[], None]) -> int:
    """Runs a benchmark whose errors end in one line on stderr.

    Args:
        run: Parses the command line and measures.

    Returns:
        0, 2 for flags that cannot be used, 130 when interrupted, and that of a process of the
        benchmark's own that failed.
    """
    try:
        run()
    except FlagValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return EXIT_BAD_FLAG
    except subprocess.CalledProcessError as error:
        print(f"the run failed: {' '.join(map(str, error.cmd[1:]))}", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt:
        print(NO_RESULTS, file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def run_benchmark(
    argv: Sequence[str],
    parse: Callable[[Sequence[str]], Options | None],
    run: Callable[[Options], None],
) -> int:
    """Runs a benchmark on its command line.

    Args:
        argv: The command line, program name first.
        parse: Returns the options; ``None`` if help was asked for and printed.
        run: Measures.

    Returns:
        The exit code, that of :func:`exit_code_of`.
    """

    def parse_and_run() -> None:
        options = parse(argv)
        if options is not None:
            run(options)

    return exit_code_of(parse_and_run)


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
