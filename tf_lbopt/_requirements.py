"""What must be there before the rest of the package is imported: a TensorFlow and a Keras."""

import importlib.util
import os
import re
import sys
import warnings

_TENSORFLOW = (2, 16), (2, 21)
_KERAS = (3, 7), (3, 15)
"""The oldest version that works, and the newest that was tried."""

_INSTALL = (
    "TensorFlow comes in several wheels, so tf-lbopt leaves the choice to you: "
    "pip install 'tf-lbopt[cpu]', 'tf-lbopt[gpu]' or 'tf-lbopt[tpu]', or the wheel itself"
)


def check() -> None:
    """Looks at the backend of Keras and at the versions of TensorFlow and Keras.

    Raises:
        ImportError: Keras runs on something else, or one of the two is missing or too old.
    """
    # Before Keras is imported, which imports its backend.
    _check_backend(os.environ.get("KERAS_BACKEND") or "tensorflow")
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(f"tf_lbopt needs TensorFlow 2.16 or later. {_INSTALL}. Received: none")
    if importlib.util.find_spec("keras") is None:
        raise ImportError("tf_lbopt needs Keras 3.7 or later: pip install keras. Received: none")
    import tensorflow as tf

    _check_version("TensorFlow", getattr(tf, "__version__", "none"), *_TENSORFLOW)
    import keras

    _check_version("Keras", keras.__version__, *_KERAS)
    _check_backend(keras.config.backend())


def warn_if_untried(what: str) -> None:
    """Warns that something was not tried with this TensorFlow or Keras, which are newer."""
    import keras
    import tensorflow as tf

    _check_version("TensorFlow", tf.__version__, *_TENSORFLOW, what)
    _check_version("Keras", keras.__version__, *_KERAS, what)


def _check_backend(backend: str) -> None:
    if backend != "tensorflow":
        raise ImportError(
            "tf_lbopt runs on Keras's TensorFlow backend. Expected: 'tensorflow' in the "
            "environment variable KERAS_BACKEND (or, where it is not set, in ~/.keras/keras.json). "
            f"Received: {backend!r}"
        )


def _check_version(
    name: str,
    version: str,
    oldest: tuple[int, int],
    newest: tuple[int, int],
    what: str = "tf_lbopt",
) -> None:
    found = re.match(r"(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else (0, 0)
    if number < oldest:
        hint = f" {_INSTALL}." if name == "TensorFlow" else ""
        raise ImportError(
            f"{what} needs {name} {oldest[0]}.{oldest[1]} or later.{hint} "
            f"Received: {name} {version}"
        )
    if number > newest:
        warnings.warn(
            f"{what} was tried with {name} up to {newest[0]}.{newest[1]}. Received: {version}; "
            "if something fails, try that one",
            stacklevel=4,
        )


def _is_run() -> bool:
    """Whether this import is that of ``python -m tf_lbopt`` or of a module inside."""
    if sys.argv[:1] != ["-m"]:  # which it is until the module is found
        return False
    name = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return name.partition(".")[0] == "tf_lbopt"


try:
    check()
except ImportError as problem:
    # Others are failures inside of TensorFlow or Keras.
    if _is_run() and str(problem).startswith("tf_lbopt "):
        sys.exit(str(problem))
    raise
