"""Argument checks: every error names the argument, what was expected and what was received.

It is a `TypeError` for a value of the wrong type (a bool is no number), else a `ValueError`.
"""

import math
import numbers
import os
from collections.abc import Iterable, Sequence
from typing import Any

_SHOWN = 200  # characters of a value
_LISTED = 10


def shown(value: object) -> str:
    """A value as error messages have it: its `repr`, on one line of limited length."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def refusal(error: type[Exception], name: str, expected: str, value: object) -> Exception:
    """The error for an argument that is not what is expected; a `TypeError` names its type."""
    kind = f" (of type {type(value).__name__})" if error is TypeError else ""
    return error(f"`{name}` must be {expected}. Received: {name}={shown(value)}{kind}")


def listed(items: Iterable[object]) -> str:
    """Items as error messages have them: the first of them, and how many there are beyond."""
    names = [str(item) for item in items]
    beyond = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", … ({beyond} more)" if beyond > 0 else "")


def real(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    optional: bool = False,
) -> Any:
    """Checks that ``value`` is a finite number between ``low`` and ``high``; returns it as float.

    Where the interval is open, its end itself is refused. ``None`` passes through if ``optional``.
    """
    if value is None and optional:
        return None
    expected = _interval(low, high, low_open, high_open) + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refusal(TypeError, name, expected, value)
    number = float(value)
    if math.isinf(number):
        raise refusal(ValueError, name, f"finite, {expected}", value)
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (above and below):
        raise refusal(ValueError, name, expected, value)
    return number


def positive(name: str, value: object) -> Any:
    """Checks that ``value`` is a finite number above 0 and returns it as float, as `real` does."""
    return real(name, value, low=0.0, low_open=True)


def integer(name: str, value: object, *, low: int, optional: bool = False) -> Any:
    """Checks that ``value`` is a whole number of at least ``low``, and returns it as int."""
    if value is None and optional:
        return None
    expected = f"an integer >= {low}" + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise refusal(TypeError, name, expected, value)
    if value < low:
        raise refusal(ValueError, name, expected, value)
    return int(value)


def boolean(name: str, value: object) -> bool:
    """Checks that ``value`` is True or False."""
    if not isinstance(value, bool):
        raise refusal(TypeError, name, "True or False", value)
    return value


def boolean_or_auto(name: str, value: object) -> bool | str:
    """Checks that ``value`` is `True`, `False` or `"auto"`."""
    if isinstance(value, bool) or value == "auto":
        return value  # type: ignore[return-value]
    error = ValueError if isinstance(value, str) else TypeError
    raise error(
        f"`{name}` must be True, False or 'auto'. Received: {name}={shown(value)} "
        f"(of type {type(value).__name__})"
    )


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Checks that ``value`` is one of a few strings."""
    expected = "one of " + ", ".join(repr(option) for option in choices)
    if not isinstance(value, str):
        raise refusal(TypeError, name, expected, value)
    if value not in choices:
        raise refusal(ValueError, name, expected, value)
    return value


def path(name: str, value: object) -> Any:
    """Checks that ``value`` is a path or `None`."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise refusal(TypeError, name, "a path or None", value)
    return value


def _interval(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if math.isinf(low) and math.isinf(high):
        return "a real number"
    if math.isinf(high):
        return f"a real number {'>' if low_open else '>='} {low:g}"
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    return f"a real number in {left}{low:g}, {high:g}{right}"
