"""Asking for a path that may be on storage which does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from official_recipes.common.flag_parsing import FlagValueError

LIMIT_S = 60.0
"""How long storage may take to answer."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL, as of a bucket."""
    return "://" in path


def reach(flag: str, expected: str, path: str, call: Callable[[str], Any]) -> Any:
    """What a function of `tf.io.gfile` returns, within `LIMIT_S` if the path is remote.

    TensorFlow tries again for minutes where a network does not answer, and no signal ends that.

    Args:
        flag: The name of the flag that gave the path, for errors.
        expected: What it takes, for errors.
        path: The path.
        call: Asks for it, given the path.

    Raises:
        FlagValueError: The storage does not answer, is not known to TensorFlow, or says no.
    """
    import tensorflow as tf

    answers: list[Any] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(call(path))
        except (tf.errors.OpError, OSError, ValueError) as error:
            errors.append(error)

    if is_remote(path):
        thread = threading.Thread(target=ask, name="reach", daemon=True)
        thread.start()
        thread.join(LIMIT_S)
    else:
        ask()
    if answers:
        return answers[0]
    reason = str(errors[0]).split("\n")[0] if errors else f"no answer within {LIMIT_S:g} s"
    raise FlagValueError(flag, expected, f"{path!r}: {reason}")
