"""Flag parsers and the error that ends a recipe with one line and exit code 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

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


class IntegerParser(flags.ArgumentParser):
    """Parses an integer of at least ``minimum`` and at most ``maximum``."""

    flag_type_name = "int"

    def __init__(self, minimum: int = 1, maximum: int | None = None) -> None:
        super().__init__()
        self.minimum = minimum
        self.maximum = maximum
        self.syntactic_help = "a positive integer" if minimum == 1 else f"an integer >= {minimum}"
        if maximum is not None:
            self.syntactic_help = f"an integer from {minimum} to {maximum}"

    def parse(self, argument: str | int) -> int:
        """Returns the integer, or raises ``ValueError`` naming what was expected."""
        try:
            value = int(argument)
        except ValueError:
            value = self.minimum - 1
        if value < self.minimum or (self.maximum is not None and value > self.maximum):
            raise ValueError(f"expected {self.syntactic_help}, received {argument!r}")
        return value

    def flag_type(self) -> str:
        """Returns the type's name for help texts."""
        return self.flag_type_name


class PositiveFloatParser(flags.ArgumentParser):
    """Parses a finite number greater than zero."""

    syntactic_help = "a positive number"

    def parse(self, argument: str | float) -> float:
        """Returns the number, or raises ``ValueError`` naming what was expected."""
        try:
            value = float(argument)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"expected {self.syntactic_help}, received {argument!r}")
        return value

    def flag_type(self) -> str:
        """Returns the type's name for help texts."""
        return "float"


class NumberParser(flags.ArgumentParser):
    """Parses a finite number of at least ``minimum``."""

    def __init__(self, minimum: float) -> None:
        super().__init__()
        self.minimum = minimum
        self.syntactic_help = f"a number >= {minimum:g}"

    def parse(self, argument: str | float) -> float:
        """Returns the number, or raises ``ValueError`` naming what was expected."""
        try:
            value = float(argument)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= self.minimum):
            raise ValueError(f"expected {self.syntactic_help}, received {argument!r}")
        return value

    def flag_type(self) -> str:
        """Returns the type's name for help texts."""
        return "float"


class ShareParser(flags.ArgumentParser):
    """Parses a number from 0 up to, but without, 1."""

    syntactic_help = "a number in [0, 1)"

    def parse(self, argument: str | float) -> float:
        """Returns the number, or raises ``ValueError`` naming what was expected."""
        try:
            value = float(argument)
        except ValueError:
            value = math.nan
        if not 0 <= value < 1:
            raise ValueError(f"expected {self.syntactic_help}, received {argument!r}")
        return value

    def flag_type(self) -> str:
        """Returns the type's name for help texts."""
        return "float"


class PositiveFloatsParser(flags.ArgumentParser):
    """Parses a comma-separated list of different finite numbers greater than zero."""

    syntactic_help = "a comma-separated list of different positive numbers"

    def parse(self, argument: str | tuple[float, ...]) -> tuple[float, ...]:
        """Returns the numbers, rising, or raises ``ValueError`` naming what was expected."""
        if isinstance(argument, tuple):
            return argument
        parser = PositiveFloatParser()
        try:
            rates = sorted(parser.parse(part) for part in argument.split(","))
        except ValueError:
            rates = []
        if not rates or len(set(rates)) < len(rates):
            raise ValueError(f"expected {self.syntactic_help}, received {argument!r}")
        return tuple(rates)

    def flag_type(self) -> str:
        """Returns the type's name for help texts."""
        return "list of floats"


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
    parser = IntegerParser(minimum, maximum)
    flags.DEFINE(parser, name, default, help_text, flag_values=values)


def define_positive_float(
    values: flags.FlagValues, name: str, default: float | None, help_text: str
) -> None:
    """Defines a flag that takes a finite number greater than zero."""
    flags.DEFINE(PositiveFloatParser(), name, default, help_text, flag_values=values)


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
