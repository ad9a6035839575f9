"""Argument checks: every error names the argument, what was expected and what was received."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

_SHOWN = 200


def shown(value: object) -> str:
    """A value as error messages have it: its `repr`, on one line of limited length."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def listed(items: Iterable[object], most: int = 10) -> str:
    """Items as error messages have them: the first of them, and how many there are beyond.

    Args:
        items: What to name.
        most: How many of them are named.
    """
    names = [str(item) for item in items]
    beyond = len(names) - most
    return ", ".join(names[:most]) + (f", … ({beyond} more)" if beyond > 0 else "")


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
    """Checks that ``value`` is a real number between ``low`` and ``high`` and returns it as float.

    Args:
        name: The argument's name, for the message.
        value: What the caller was given.
        low: Least value allowed (excluded if ``low_open``).
        high: Greatest value allowed (excluded if ``high_open``).
        low_open: Whether ``low`` itself is refused.
        high_open: Whether ``high`` itself is refused.
        optional: Whether ``None`` passes through.

    Raises:
        TypeError: ``value`` is not a real number (a bool is none).
        ValueError: ``value`` is NaN, infinite or outside the interval.
    """
    if value is None and optional:
        return None
    expected = _interval(low, high, low_open, high_open) + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` must be {expected}. Received: {name}={shown(value)} "
            f"(of type {type(value).__name__})"
        )
    number = float(value)
    if math.isinf(number):
        raise ValueError(f"`{name}` must be finite, {expected}. Received: {name}={shown(value)}")
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (above and below):
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={shown(value)}")
    return number


def integer(name: str, value: object, *, low: int, optional: bool = False) -> Any:
    """Checks that ``value`` is a whole number of at least ``low`` and returns it as int.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is below ``low``.
    """
    if value is None and optional:
        return None
    expected = f"an integer >= {low}" + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be {expected}. Received: {name}={shown(value)} "
            f"(of type {type(value).__name__})"
        )
    if value < low:
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={shown(value)}")
    return int(value)


def boolean(name: str, value: object) -> bool:
    """Checks that ``value`` is True or False.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={shown(value)} "
            f"(of type {type(value).__name__})"
        )
    return value


def boolean_or_auto(name: str, value: object) -> bool | str:
    """Checks that ``value`` is `True`, `False` or `"auto"`.

    Raises:
        TypeError, ValueError: It is not.
    """
    if isinstance(value, bool) or value == "auto":
        return value  # type: ignore[return-value]
    error = ValueError if isinstance(value, str) else TypeError
    raise error(
        f"`{name}` must be True, False or 'auto'. Received: {name}={shown(value)} "
        f"(of type {type(value).__name__})"
    )


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Checks that ``value`` is one of a few strings.

    Raises:
        TypeError: It is not a string.
        ValueError: It is another one.
    """
    expected = "one of " + ", ".join(repr(option) for option in choices)
    if not isinstance(value, str):
        raise TypeError(
            f"`{name}` must be {expected}. Received: {name}={shown(value)} "
            f"(of type {type(value).__name__})"
        )
    if value not in choices:
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={shown(value)}")
    return value


def _interval(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if math.isinf(low) and math.isinf(high):
        return "a real number"
    if math.isinf(high):
        return f"a real number {'>' if low_open else '>='} {low:g}"
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    return f"a real number in {left}{low:g}, {high:g}{right}"
