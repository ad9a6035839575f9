"""Which variables a layer-wise option leaves out: one place for names, regexes and variables."""

import re
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf


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
        entries: Strings (searched for in the path as regular expressions) and variables, or
            ``None`` for nothing.

    Raises:
        TypeError: An entry is neither, or ``entries`` is a bare string.
        ValueError: An entry is no valid regular expression.
    """

    def __init__(self, argument: str, entries: Iterable[Any] | None):
        self._argument = argument
        self._patterns: list[re.Pattern[str]] = []
        self._variables: list[Any] = []
        expected = "a list of variables or of regular expressions over the variable path"
        if isinstance(entries, (str, bytes)) or (
            entries is not None and not isinstance(entries, Iterable)
        ):
            raise TypeError(f"`{argument}` must be {expected}. Received: {argument}={entries!r}")
        for entry in entries or ():
            self.add(entry, expected)

    def add(self, entry: Any, expected: str = "a variable or a regular expression") -> None:
        """Adds one variable or regular expression."""
        argument = self._argument
        if isinstance(entry, str):
            try:
                self._patterns.append(re.compile(entry))
            except re.error as error:
                raise ValueError(
                    f"`{argument}` must be {expected}. "
                    f"Received: {entry!r}, which is no regular expression ({error})"
                ) from error
        elif isinstance(entry, (keras.Variable, tf.Variable)):
            self._variables.append(entry)
        else:
            raise TypeError(
                f"`{argument}` must be {expected}. "
                f"Received an entry of type {type(entry).__name__}: {entry!r}"
            )

    def __contains__(self, variable: Any) -> bool:
        path = path_of(variable)
        return any(_same(variable, other) for other in self._variables) or any(
            pattern.search(path) for pattern in self._patterns
        )

    def config(self) -> list[str]:
        """Regular expressions that stand for the same variables in a fresh process."""
        exact = [f"^{re.escape(path_of(variable))}$" for variable in self._variables]
        return [pattern.pattern for pattern in self._patterns] + exact


def name_pattern(pattern: str) -> str:
    """A regex over paths that finds ``pattern`` in the variable's own name, the last component.

    ``Optimizer.exclude_from_weight_decay(var_names=…)`` of Keras looks at names, not at paths.
    """
    if pattern.startswith("^"):
        return f"(?:^|/)(?:{pattern[1:]})[^/]*$"
    return f"(?:{pattern})[^/]*$"


def _same(one: Any, other: Any) -> bool:
    return tensorflow_variable(one) is tensorflow_variable(other)
