"""Which variables a layer-wise option leaves out: one place for names, regexes and variables."""

import re
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

_EXPECTED = "a list of variables or of regular expressions over the variable path"


def path_of(variable: Any) -> str:
    """The path of a Keras variable, or the name of a TensorFlow one without its output number."""
    return getattr(variable, "path", None) or variable.name.split(":")[0]


def tensorflow_variable(variable: Any) -> tf.Variable:
    """The TensorFlow variable in a Keras one (or the thing itself)."""
    return variable.value if isinstance(variable, keras.Variable) else variable


class Exclusion:
    """A set of variables given as regexes over the variable path, or as the variables themselves.

    Args:
        argument: The name of the optimizer's argument, for error messages.
        entries: Strings (searched for in the path as regular expressions), variables, and, as
            `config` writes them, ``{"name": regex}`` for regexes over the variable's own name; or
            ``None`` for nothing.

    Raises:
        TypeError: An entry is none of these, or ``entries`` is no list of them.
        ValueError: An entry is no valid regular expression.
    """

    def __init__(self, argument: str, entries: Iterable[Any] | None):
        self._argument = argument
        self._path_patterns: list[re.Pattern[str]] = []
        self._name_patterns: list[re.Pattern[str]] = []
        self._variables: list[Any] = []
        for entry in listed(argument, entries):
            self.add(entry)

    def add(self, entry: Any) -> None:
        """Adds one variable or regular expression over the path."""
        if isinstance(entry, str):
            self._path_patterns.append(self._compiled(entry))
        elif isinstance(entry, (keras.Variable, tf.Variable)):
            self._variables.append(entry)
        elif isinstance(entry, dict) and list(entry) == ["name"]:
            self.add_name(entry["name"])
        else:
            raise TypeError(
                f"`{self._argument}` must be {_EXPECTED}. "
                f"Received an entry of type {type(entry).__name__}: {entry!r}"
            )

    def add_name(self, pattern: str) -> None:
        """Adds a regular expression over the variable's own name, the last part of its path."""
        self._name_patterns.append(self._compiled(pattern))

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`{self._argument}` must be {_EXPECTED}. "
                f"Received: {pattern!r}, which is no regular expression ({error})"
            ) from error

    def __contains__(self, variable: Any) -> bool:
        path = path_of(variable)
        name = path.rpartition("/")[2]
        return (
            any(tensorflow_variable(variable) is tensorflow_variable(v) for v in self._variables)
            or any(pattern.search(path) for pattern in self._path_patterns)
            or any(pattern.search(name) for pattern in self._name_patterns)
        )

    def config(self) -> list[str | dict[str, str]]:
        """Entries that stand for the same variables in a fresh process."""
        exact = [f"^{re.escape(path_of(variable))}$" for variable in self._variables]
        names = [{"name": pattern.pattern} for pattern in self._name_patterns]
        return [pattern.pattern for pattern in self._path_patterns] + exact + names


def listed(argument: str, entries: Iterable[Any] | None) -> list[Any]:
    """The entries as a list.

    Raises:
        TypeError: They are no list (a bare string would be read letter by letter).
    """
    if isinstance(entries, (str, bytes, dict)) or (
        entries is not None and not isinstance(entries, Iterable)
    ):
        raise TypeError(f"`{argument}` must be {_EXPECTED}. Received: {argument}={entries!r}")
    return list(entries or ())
