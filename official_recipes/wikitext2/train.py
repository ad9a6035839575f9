"""Trains an LSTM language model with any optimizer; ``--help`` lists the flags.

Entry point of ``python -m official_recipes.wikitext2.train``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from official_recipes.common.data_format import data_of_flag
from official_recipes.common.flag_parsing import BELOW_ONE, FlagValueError, define_integer
from official_recipes.common.interruption import run_program
from official_recipes.common.keras_options import define_training_flags
from official_recipes.common.keras_program import Recipe, run_recipe
from official_recipes.wikitext2.data import KNOWN_FORMS, TextSource, find_text

if TYPE_CHECKING:
    from official_recipes.wikitext2.task import LanguageTask

CONFIGS = Path(__file__).parent / "configs"


def define_flags() -> flags.FlagValues:
    """Returns the recipe's flags."""
    values = define_training_flags(batch_size=32, epochs=4, schedule="constant")
    define_integer(values, "sequence_length", 35, "Words per window.")
    define_integer(values, "hidden", 128, "Units of each LSTM layer, and of the embedding.")
    define_integer(values, "layers", 2, "LSTM layers.")
    flags.DEFINE(
        BELOW_ONE, "dropout", 0.0, "Dropout before each layer and the logits.",
        flag_values=values,
    )  # fmt: skip
    define_integer(
        values,
        "validation_size",
        0,
        "Windows at the end of the training text to set apart and evaluate on instead.",
        minimum=0,
    )
    return values


def make_source(values: flags.FlagValues) -> TextSource:
    """Returns the text that the flags name, not read yet.

    Raises:
        FlagValueError: The folder is missing or holds no known text.
    """
    with data_of_flag("data_dir", f"a folder with {KNOWN_FORMS}", values.data_dir):
        return find_text(None if values.data_dir is None else Path(values.data_dir))


def make_task(values: flags.FlagValues, progress: Callable[[int, int], None]) -> LanguageTask:
    """Reads the text and returns the task.

    Raises:
        FlagValueError: The text cannot be read or is too short.
    """
    from official_recipes.wikitext2.task import LanguageTask

    with data_of_flag("data_dir", "readable text"):
        data = make_source(values).load()
    progress(1, 1)
    if values.validation_size:
        windows = (len(data.train) - 1) // values.sequence_length
        if values.validation_size >= windows:
            raise FlagValueError(
                "validation_size", f"less than the {windows} windows", values.validation_size
            )
        data = data.with_validation(values.validation_size * values.sequence_length)
    return LanguageTask(
        data,
        sequence_length=values.sequence_length,
        hidden=values.hidden,
        layers=values.layers,
        dropout=values.dropout,
    )


RECIPE = Recipe(
    program="python -m official_recipes.wikitext2.train",
    summary=(
        "Trains a two-layer LSTM on WikiText-2 (or, without --data_dir, on English text that\n"
        "ships with Python) with any optimizer, and evaluates its perplexity."
    ),
    define_flags=define_flags,
    configs=CONFIGS,
    check=make_source,
    make_task=make_task,
)


def main(argv: Sequence[str]) -> int:
    """Runs the recipe and returns the exit code."""
    return run_recipe(RECIPE, argv)


if __name__ == "__main__":
    run_program(main, sys.argv)
