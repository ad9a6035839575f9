"""What `callbacks.GradientNoiseScale` has logged: in `fit`, a JSON file or TensorBoard's files."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from tf_lbopt import _validation

NOISE_SCALE = "noise_scale"
STANDARD_ERROR = "noise_scale_standard_error"
EXAMPLES = "examples_per_update"
# Before the name in the files of Keras's own TensorBoard callback.
_OF_KERAS = "epoch_"
_EXPECTED = (
    "a keras History, its dictionary, or the path of such a dictionary as JSON or of a TensorBoard "
    f"folder, with `{NOISE_SCALE}` in it, which callbacks.GradientNoiseScale logs"
)


class _OfFit(Protocol):
    """A `keras.callbacks.History`."""

    history: dict[str, list[float]]


History: TypeAlias = str | os.PathLike[str] | Mapping[str, Sequence[float | None]] | _OfFit


def read_history(history: History) -> list[list[float]]:
    """The numbers that matter here: of each epoch, or of each time that they were logged.

    Returns:
        Noise scales, their standard errors and the batches, equally many; NaN where one is missing.

    Raises:
        TypeError, ValueError: `history` is nothing of that, or there is no noise scale.
    """
    if isinstance(history, str | os.PathLike):
        content = _read_path(Path(history))
    else:
        content = getattr(history, "history", history)
    if not isinstance(content, Mapping):
        raise _validation.refusal(TypeError, "history", _EXPECTED, history)
    if NOISE_SCALE not in content:
        raise ValueError(
            f"`history` must be {_EXPECTED}. Received: "
            + (f"the path {str(history)!r}, " if isinstance(history, str | os.PathLike) else "")
            + f"with {_validation.listed(content) or 'nothing'}"
        )
    found = [_numbers(NOISE_SCALE, content[NOISE_SCALE])]
    epochs = len(found[0])
    for name in (STANDARD_ERROR, EXAMPLES):
        found.append(_numbers(name, content.get(name, [None] * epochs)))
        if len(found[-1]) != epochs:
            raise ValueError(
                f"`history` must have equally many numbers of each kind. Received: {epochs} of "
                f"`{NOISE_SCALE}` and {len(found[-1])} of `{name}`"
            )
    return found


def _numbers(name: str, values: Iterable[float | None]) -> list[float]:
    try:
        return [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"`history` must have a list of numbers as `{name}`. "
            f"Received: {_validation.shown(values)}"
        ) from None


def _read_path(path: Path) -> object:
    if path.is_dir():
        return _read_events(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`history` must be {_EXPECTED}. Received: the path {str(path)!r} ({error})"
        ) from error


def _read_events(folder: Path) -> dict[str, list[float]]:
    """Scalars of all event files in a folder and those below it, by their name."""
    import tensorflow as tf

    names = (NOISE_SCALE, STANDARD_ERROR, EXAMPLES)
    files = sorted(map(str, folder.rglob("*tfevents*")))
    found: dict[str, dict[int, float]] = {p + name: {} for p in ("", _OF_KERAS) for name in names}
    try:
        for record in tf.data.TFRecordDataset(files) if files else ():
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.tag in found:
                    scalar = value.simple_value
                    if value.HasField("tensor"):
                        scalar = float(tf.make_ndarray(value.tensor))
                    found[value.tag][event.step] = scalar
    except (tf.errors.OpError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"`history` must be {_EXPECTED}. Received: the path {str(folder)!r}, whose event files "
            f"can not be read ({message})"
        ) from error
    # Both may be there, by updates and by epochs.
    prefix = "" if found[NOISE_SCALE] else _OF_KERAS
    steps = sorted(found[prefix + NOISE_SCALE])
    return {
        name: [found[prefix + name].get(step, math.nan) for step in steps]
        for name in names
        if found[prefix + name]
    }
