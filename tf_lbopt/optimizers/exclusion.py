"""Which variables a layer-wise option leaves out: one place for names, regexes and variables."""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import keras
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.optimizers.trained import Variable, path_of

_Item = TypeVar("_Item")

_EXPECTED = "a list of variables or of regular expressions over the variable path"


class _Entry(NamedTuple):
    """One entry of a list: what stands for it in a configuration, and which variables it fits."""

    config: str | dict[str, str]
    fits: Callable[[Variable], bool]
    path: str | None = None
    """Of the one variable meant, if it is known by its path only."""


class Exclusion:
    """A set of variables given as regexes over the variable path, or as the variables themselves.

    Loading a model renames its variables: Keras leaves out names of models, and numbers layers
    anew. So once an optimizer is built, its exclusions are those of its variables by number, and
    its configuration says which ones these were; another optimizer that is built with what may be
    the same variables excludes the same. For other variables the entries count.

    Args:
        argument: The name of the optimizer's argument, for error messages.
        entries: Strings (searched for in the path as regular expressions), variables, and what
            `config` writes: ``{"name": regex}`` for regexes over the variable's own name,
            ``{"path": path}`` for one variable, and ``{"built": paths, "excluded": numbers}`` for
            what the entries before it came to. Or ``None`` for nothing.

    Raises:
        TypeError: An entry is none of these, or ``entries`` is no list of them.
        ValueError: An entry is no valid regular expression.
    """

    def __init__(self, argument: str, entries: Iterable[object] | None):
        self.argument = argument
        self.given = entries is not None
        self._entries: list[_Entry] = []
        self._built: dict[str, Any] | None = None
        self._entries_built = 0
        self._excluded: dict[str, bool] = {}  # by key, of variables that it was built for
        for entry in listed(argument, entries):
            self.add(entry)

    def add(self, entry: object) -> None:
        """Adds one variable, regular expression over the path or entry of a configuration."""
        if isinstance(entry, str):
            pattern = self._compiled(entry)
            self._entries.append(_Entry(entry, lambda v: bool(pattern.search(path_of(v)))))
        elif isinstance(entry, (keras.Variable, tf.Variable)):
            own = _compat.key_of(entry)
            self._entries.append(
                _Entry({"path": path_of(entry)}, lambda v: _compat.key_of(v) == own)
            )
        elif isinstance(entry, dict) and list(entry) == ["name"]:
            self.add_name(entry["name"])
        elif isinstance(entry, dict) and list(entry) == ["path"]:
            path = entry["path"]
            self._entries.append(_Entry({"path": path}, lambda v: path_of(v) == path, path))
        elif isinstance(entry, dict) and set(entry) == {"built", "excluded"}:
            self._built, self._entries_built = dict(entry), len(self._entries)
        else:
            raise TypeError(
                f"`{self.argument}` must be {_EXPECTED}. "
                f"Received an entry of type {type(entry).__name__}: {_validation.shown(entry)}"
            )

    def add_name(self, pattern: str) -> None:
        """Adds a regular expression over the variable's own name, the last part of its path."""
        compiled = self._compiled(pattern)

        def fits(variable: Variable) -> bool:
            return bool(compiled.search(path_of(variable).rpartition("/")[2]))

        self._entries.append(_Entry({"name": pattern}, fits))

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`{self.argument}` must be {_EXPECTED}. "
                f"Received: {_validation.shown(pattern)}, which is no regular expression ({error})"
            ) from error

    def __contains__(self, variable: Variable) -> bool:
        excluded = self._excluded.get(_compat.key_of(variable))
        if excluded is None:
            return any(entry.fits(variable) for entry in self._entries)
        return excluded

    def build(self, variables: Sequence[Variable]) -> None:
        """Finds out which of an optimizer's variables are excluded.

        Warns of entries that fit none of them.
        """
        paths = [path_of(variable) for variable in variables]
        excluded = [False] * len(paths)
        entries = self._entries
        if self._built is not None:
            numbers = _numbers_of(paths, self._built["built"])
            if numbers is not None:
                excluded = [number in self._built["excluded"] for number in numbers]
                entries = entries[self._entries_built :]
        in_vain = []
        for entry in entries:
            fitting = [entry.fits(variable) for variable in variables]
            if entry.path is not None and not any(fitting):
                similar = [_same_end(path, entry.path) for path in paths]
                fitting = similar if sum(similar) == 1 else fitting
            if not any(fitting):
                in_vain.append(entry.config)
            excluded = [a or b for a, b in zip(excluded, fitting, strict=True)]
        if in_vain:
            warnings.warn(
                f"`{self.argument}` has entries that fit none of the trainable variables: "
                f"{_validation.listed(map(_validation.shown, in_vain))}. "
                f"The variables are: {_validation.listed(paths)}",
                stacklevel=2,
            )
        if self._entries:
            numbers = [number for number, is_excluded in enumerate(excluded) if is_excluded]
            self._built = {"built": paths, "excluded": numbers}
            self._entries_built = len(self._entries)
        keys = map(_compat.key_of, variables)
        self._excluded = dict(zip(keys, excluded, strict=True))

    def config(self) -> list[object] | None:
        """Entries that stand for the same variables in a fresh process, or another model.

        ``None`` if nothing was given, not even an empty list.
        """
        if not self.given:
            return None
        entries: list[object] = [entry.config for entry in self._entries]
        if self._built is not None:
            entries.insert(self._entries_built, self._built)
        return entries


def _numbers_of(paths: Sequence[str], former: Sequence[str]) -> list[int] | None:
    """For each variable the number that it had, or ``None`` if these are not those variables.

    They are found by name, be they fewer (layers are frozen now) or in another order. Where layers
    were numbered anew, by their order.
    """
    if paths != former:
        by_name = [[n for n, old in enumerate(former) if _same_end(path, old)] for path in paths]
        numbers = [found[0] for found in by_name if len(found) == 1]
        if len(set(numbers)) == len(paths):
            return numbers
        here, there = map(_without_numbers, paths), map(_without_numbers, former)
        if len(paths) != len(former) or not all(map(_same_end, here, there)):
            return None
    return list(range(len(paths)))


def _same_end(one: str, other: str) -> bool:
    """Whether two paths are the same but for names in front of one of them."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def _without_numbers(path: str) -> str:
    """A path without the numbers that tell layers of the same kind apart."""
    return re.sub(r"_\d+(?=/|$)", "", path)


def listed(argument: str, entries: Iterable[_Item] | None) -> list[_Item]:
    """The entries as a list.

    Raises:
        TypeError: They are no list (a bare string would be read letter by letter).
    """
    one = str, bytes, dict, keras.Variable, tf.Variable
    try:
        if not isinstance(entries, one):
            return [] if entries is None else list(entries)
    except (TypeError, NotImplementedError):  # a number; a tensor: a scalar, or symbolic
        pass
    raise TypeError(
        f"`{argument}` must be {_EXPECTED}. Received: {argument}={_validation.shown(entries)}"
    )
