"""How large the package is, and how long the way from `apply` to a formula.

    python -m benchmarks.structure

Lines are those of all files, docstrings and empty lines included. Calls are those of named
functions of the package in one trace of one LAMB update of two variables, after `build`; frames are
those of the package between `apply` and Adam's formula, both ends included.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import collections
import pathlib
import sys
from types import FrameType
from typing import Any

import keras
import tensorflow as tf

import tf_lbopt

_ROOT = pathlib.Path(tf_lbopt.__file__).parent


def lines() -> dict[str, int]:
    """Lines of Python of each folder of the package, and of all."""
    counts: collections.Counter[str] = collections.Counter()
    for path in _ROOT.rglob("*.py"):
        folder, *rest = path.relative_to(_ROOT).parts
        counts[folder if rest else "(top level)"] += len(path.read_text().splitlines())
    return {**dict(sorted(counts.items())), "all": sum(counts.values())}


def traced(
    optimizer: keras.optimizers.Optimizer, package: pathlib.Path, formula: str
) -> tuple[int, list[str]]:
    """Traces one update of two variables.

    Args:
        optimizer: A new one.
        package: Whose functions count.
        formula: The name of the function up to which frames count.

    Returns:
        How many calls of named functions there were, and the names of the frames at the first call
        of ``formula``.
    """
    variables = [keras.Variable(tf.ones([3, 4])), keras.Variable(tf.ones([4]))]
    gradients = [tf.ones([3, 4]), tf.ones([4])]
    optimizer.build(variables)
    calls: list[str] = []
    frames: list[str] = []

    def is_ours(frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(str(package))

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not is_ours(frame) or frame.f_code.co_name.startswith("<"):
            return
        calls.append(frame.f_code.co_name)
        if frame.f_code.co_name == formula:
            names, above = [], frame
            while above is not None:
                if is_ours(above):
                    names.append(above.f_code.co_name)
                above = above.f_back
            frames[:] = names[::-1]

    step = tf.function(lambda: optimizer.apply(gradients, variables), autograph=False)
    sys.setprofile(profile)
    try:
        step.get_concrete_function()
    finally:
        sys.setprofile(None)
    return len(calls), frames


def main() -> None:
    """Prints all."""
    counts = lines()
    width = max(map(len, counts))
    for folder, count in counts.items():
        print(f"{folder:{width}} {count:7,} lines")
    print(f"without per_example {counts['all'] - counts['per_example']:,}")
    calls, frames = traced(tf_lbopt.LAMB(0.1, weight_decay=0.01), _ROOT, "adam")
    print(f"\nLAMB, two variables: {calls} calls; {len(frames)} frames: {' > '.join(frames)}")
    stock = pathlib.Path(keras.src.__file__).parent / "optimizers"  # type: ignore[attr-defined]
    calls, _ = traced(keras.optimizers.Lamb(0.1, weight_decay=0.01), stock, "update_step")
    print(f"keras.optimizers.Lamb: {calls} calls of its optimizers' functions")


if __name__ == "__main__":
    main()
