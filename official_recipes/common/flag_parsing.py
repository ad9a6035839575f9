"""Flag parsers and the error that ends a recipe with one line and exit code 2."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

EXIT_BAD_FLAG = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it.


class FlagValueError(ValueError):
    """A flag has a value the recipe cannot use.

    Args:
        flag: The flag's name without dashes.
        expected: What the flag accepts.
        received: What it was given.
    """

    def __init__(self, flag: str, expected: str, received: object) -> None:
        super().__init__(f"--{flag}: expected {expected}, received {received}")


def fail(error: object, exit_code: int = EXIT_BAD_FLAG) -> int:
    """Prints an error as one line on stderr, and returns the exit code."""
    print(" ".join(str(error).split()), file=sys.stderr)
    return exit_code


class CheckedParser(flags.ArgumentParser):
    """Parses a flag by a function, and checks what that returns.

    Args:
        convert: Returns the value; raises ``ValueError`` for what is none.
        accepts: Whether a value is taken.
        expected: What is, for errors.
        kind: The type's name, for help texts.
    """

    def __init__(
        self,
        convert: Callable[[Any], Any],
        accepts: Callable[[Any], bool],
        expected: str,
        kind: str,
    ) -> None:
        super().__init__()
        self._convert = convert
        self._accepts = accepts
        self.syntactic_help = expected
        self._kind = kind

    def parse(self, argument: Any) -> Any:
        """Returns the value, or raises ``ValueError`` naming what was expected."""
        with contextlib.suppress(ValueError):
            value = self._convert(argument)
            if self._accepts(value):
                return value
        raise ValueError(f"expected {self.syntactic_help}, received {argument!r}")

    def flag_type(self) -> str:
        """Returns the type's name for help texts."""
        return self._kind


def integer_parser(minimum: int = 1, maximum: int | None = None) -> CheckedParser:
    """Returns a parser of integers of at least ``minimum`` and at most ``maximum``."""
    expected = "a positive integer" if minimum == 1 else f"an integer >= {minimum}"
    if maximum is not None:
        expected = f"an integer from {minimum} to {maximum}"
    most = math.inf if maximum is None else maximum
    return CheckedParser(int, lambda value: minimum <= value <= most, expected, "int")


def _rising(argument: str | tuple[float, ...]) -> tuple[float, ...]:
    parts = argument.split(",") if isinstance(argument, str) else argument
    return tuple(sorted(map(float, parts)))


def _positive(value: float) -> bool:
    return 0 < value < math.inf


POSITIVE = CheckedParser(float, _positive, "a positive number", "float")
NOT_NEGATIVE = CheckedParser(float, lambda x: 0 <= x < math.inf, "a number >= 0", "float")
BELOW_ONE = CheckedParser(float, lambda x: 0 <= x < 1, "a number in [0, 1)", "float")
DIFFERENT_POSITIVES = CheckedParser(
    _rising,
    lambda values: all(map(_positive, values)) and len({*values}) == len(values),
    "a comma-separated list of different positive numbers",
    "list of floats",
)


def define_integer(
    values: flags.FlagValues,
    name: str,
    default: int | None,
    help_text: str,
    *,
    minimum: int = 1,
    maximum: int | None = None,
) -> None:
    """Defines an integer flag with a lower and an optional upper bound."""
    parser = integer_parser(minimum, maximum)
    flags.DEFINE(parser, name, default, help_text, flag_values=values)


def define_positive_float(
    values: flags.FlagValues, name: str, default: float | None, help_text: str
) -> None:
    """Defines a flag that takes a finite number greater than zero."""
    flags.DEFINE(POSITIVE, name, default, help_text, flag_values=values)


def parse_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Parses the command line into ``values``.

    Args:
        values: The recipe's flags.
        argv: The command line, program name first.

    Raises:
        FlagValueError: A flag is unknown, has a bad value, or an argument is no flag.
    """
    known = ", ".join(f"--{name}" for name in sorted(values))
    try:
        rest = values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        raise FlagValueError(
            error.flagname, f"one of the flags {known}", "a flag that is unknown"
        ) from error
    except flags.IllegalFlagValueError as error:
        # The parsers above name what they expect; absl puts "flag --name=value: " before it.
        head, _, reason = str(error).partition(": ")
        name, _, received = head.removeprefix("flag --").partition("=")
        if reason.startswith("expected "):
            expected, _, received = reason.removeprefix("expected ").partition(", received ")
        else:
            expected, received = _expected_by(values[name]), repr(received)
        raise FlagValueError(name, expected, received) from error
    except (flags.Error, ValueError) as error:
        raise FlagValueError("flags", "a well-formed command line", error) from error
    if rest:
        raise FlagValueError("flags", "only flags of the form --name=value", repr(rest[0]))


def parse_unless_help(
    values: flags.FlagValues,
    argv: Sequence[str],
    program: str,
    summary: str,
    configs: Path | None = None,
) -> bool:
    """Parses the command line; prints help when that was asked for.

    Args:
        values: The program's flags; ``--help`` is added.
        argv: The command line, program name first.
        program: How it is called.
        summary: What it does.
        configs: The folder of the recipe's own config files, if there is one.

    Returns:
        Whether to go on.

    Raises:
        FlagValueError: A flag cannot be used.
    """
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    parse_flags(values, argv)
    if values.help:
        print(help_text(values, program, summary, configs))
    return not values.help


def _expected_by(flag: flags.Flag) -> str:
    """What a flag of absl's own kinds takes."""
    if flag.boolean:
        return "true or false"
    choices = getattr(flag.parser, "enum_values", None)
    return f"one of {', '.join(choices)}" if choices else flag.parser.syntactic_help


def config_path(name: str, configs: Path) -> Path:
    """The config file that ``--config_file`` names.

    Args:
        name: A path, or the name of one of the recipe's own files.
        configs: The folder with these.

    Raises:
        FlagValueError: It is neither.
    """
    for path in (Path(name), configs / name, configs / f"{name}.yaml"):
        if path.is_file():
            return path
    raise FlagValueError(
        "config_file",
        f"a YAML file, or one of the recipe's ({_config_names(configs)})",
        repr(name),
    )


def _config_names(configs: Path) -> str:
    return ", ".join(sorted(path.stem for path in configs.glob("*.yaml"))) or "none"


def help_text(
    values: flags.FlagValues, program: str, summary: str, configs: Path | None = None
) -> str:
    """Formats usage, summary, all flags with their defaults, and a recipe's config files."""
    lines = [f"usage: {program} [--flag=value ...]", "", summary, "", "flags:"]
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default_as_str is None else f" [default: {flag.default_as_str}]"
        boolean = flag.boolean and name != "help"
        lines.append(f"  --{'[no]' if boolean else ''}{name}{default}")
        lines.append(f"      {flag.help}")
    if configs is not None:
        lines += ["", f"config files of the recipe: {_config_names(configs)}"]
    return "\n".join(lines)
