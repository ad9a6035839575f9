"""Trains a transformer to translate, with any optimizer; ``--help`` lists the flags.

Entry point of ``python -m official_recipes.multi30k.train``.
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
from official_recipes.common.text_data import read_lines
from official_recipes.multi30k.data import KNOWN_FORMS, PairSource, find_pairs

if TYPE_CHECKING:
    from official_recipes.multi30k.task import TranslationTask

CONFIGS = Path(__file__).parent / "configs"


def define_flags() -> flags.FlagValues:
    """Returns the recipe's flags."""
    values = define_training_flags(batch_size=128, epochs=4, schedule="inverse_sqrt")
    values.set_default("warmup_epochs", 2.0)
    for side, language in (("source", "en"), ("target", "de")):
        flags.DEFINE_string(
            f"{side}_language",
            language,
            "As the files of --data_dir end.",
            flag_values=values,
        )
    flags.DEFINE_string(
        "translate",
        None,
        "With --predictions: a file of sentences, one a line (also .gz), to translate in the "
        "place of the test split.",
        flag_values=values,
    )
    define_integer(values, "layers", 3, "In the encoder, and as many in the decoder.")
    define_integer(values, "width", 256, "Of the embeddings; a multiple of --heads.")
    define_integer(values, "inner", 1024, "Of the dense layers.")
    define_integer(values, "heads", 4, "Of the attention.")
    define_integer(values, "pieces", 8000, "The most word pieces of both languages.", minimum=100)
    define_integer(values, "longest", 48, "The most pieces of a sentence.", minimum=4)
    flags.DEFINE(BELOW_ONE, "dropout", 0.1, "Dropout.", flag_values=values)
    flags.DEFINE(BELOW_ONE, "label_smoothing", 0.1, "Label smoothing.", flag_values=values)
    return values


def make_source(values: flags.FlagValues) -> PairSource:
    """Returns the sentence pairs that the flags name, not read yet.

    Raises:
        FlagValueError: The folder is missing or holds no known pairs, or sizes do not fit.
    """
    if values.width % values.heads:
        raise FlagValueError("width", f"a multiple of --heads={values.heads}", values.width)
    languages = values.source_language, values.target_language
    if languages[0] == languages[1]:
        raise FlagValueError("target_language", "another than --source_language", languages[1])
    if values.translate is not None and not values.predictions:
        raise FlagValueError("translate", "to be given together with --predictions", "none")
    if values.translate is not None and not Path(values.translate).is_file():
        raise FlagValueError("translate", "a file of sentences", repr(values.translate))
    if values.data_dir is None and languages != ("en", "de"):
        raise FlagValueError(
            "data_dir", f"a folder with sentences of {' and '.join(languages)}", None
        )
    with data_of_flag("data_dir", f"a folder with {KNOWN_FORMS}", values.data_dir):
        return find_pairs(None if values.data_dir is None else Path(values.data_dir), *languages)


def make_task(values: flags.FlagValues, progress: Callable[[int, int], None]) -> TranslationTask:
    """Reads the pairs, makes word pieces and returns the task.

    Raises:
        FlagValueError: The files cannot be read.
    """
    import warnings

    from official_recipes.multi30k.model import Shape
    from official_recipes.multi30k.task import TranslationTask

    # The table of embeddings is that of the logits too, whose gradient is dense anyway.
    warnings.filterwarnings(
        "ignore", message="Converting sparse IndexedSlices", module="tensorflow"
    )
    source = make_source(values)
    to_translate = None
    if values.translate is not None:
        with data_of_flag("translate", "a file of sentences"):
            to_translate = read_lines(Path(values.translate))
    with data_of_flag("data_dir", "readable sentence pairs"):
        splits = source.load()
        task = TranslationTask(
            source.label(splits),
            splits,
            Shape(values.layers, values.width, values.inner, values.heads, values.dropout),
            pieces=values.pieces,
            longest=values.longest,
            label_smoothing=values.label_smoothing,
            to_translate=to_translate,
        )
    progress(1, 1)
    return task


RECIPE = Recipe(
    program="python -m official_recipes.multi30k.train",
    summary=(
        "Trains a transformer of half the base size on Multi30k or other sentence pairs (or,\n"
        "without --data_dir, on number words), with any optimizer, and evaluates loss and BLEU."
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
