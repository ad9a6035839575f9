"""The gradient variance factor of every layer over the first epochs: Figure 2 of the CLARS paper.

Entry point of ``python -m benchmarks.variance_factor``; see docs/clars.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import progress_bar
from official_recipes.common.files import atomic_write, write_json
from official_recipes.common.flag_parsing import (
    EXIT_BAD_FLAG,
    FlagValueError,
    define_integer,
    define_positive_float,
    help_text,
    parse_flags,
)
from official_recipes.common.image_data import DataFormatError, ImageData, find_source
from official_recipes.common.interruption import run_program

if TYPE_CHECKING:
    import keras

PROGRAM = "python -m benchmarks.variance_factor"
SUMMARY = (
    "Trains a fully connected and a convolutional network of five layers with sigmoid activations\n"
    "by Nesterov's SGD and measures, after every epoch, the gradient variance factor of each\n"
    "layer's kernel on a sample of the training images."
)
MODELS = ("fcn", "cnn")


def define_flags() -> flags.FlagValues:
    """Returns the flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("data_dir", None, "Folder with MNIST or CIFAR-10.", flag_values=values)
    define_integer(values, "epochs", 10, "Passes over the training images.")
    define_integer(values, "batch_size", 128, "Images per update.")
    define_positive_float(values, "learning_rate", 0.001, "Of Nesterov's SGD, momentum 0.9.")
    define_integer(values, "examples", 2000, "Training images that the factor is measured on.")
    define_integer(values, "seed", 1, "Of the initial weights and the shuffling.", minimum=0)
    flags.DEFINE_string(
        "output_dir", "runs/variance_factor", "Folder for the plot and the table.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("help", False, "Show this text.", flag_values=values)
    return values


def build_model(name: str, data: ImageData, seed: int) -> keras.Model:
    """Five layers with weights and sigmoid activations.

    The paper gives neither widths nor kernel sizes. These are ours; docs/clars.md has those of the
    authors' code.

    Args:
        name: ``"fcn"`` or ``"cnn"``.
        data: The images.
        seed: Of the initial weights.
    """
    import keras

    from official_recipes.cifar.models import sigmoid_cnn

    keras.utils.set_random_seed(seed)
    inputs = keras.Input(data.train_images.shape[1:])
    x = keras.layers.Rescaling(2.0 / data.max_value, offset=-1.0)(inputs)
    if name == "fcn":
        x = keras.layers.Flatten()(x)
        for number in range(4):
            x = keras.layers.Dense(128, activation="sigmoid", name=f"layer_{number + 1}")(x)
        x = keras.layers.Dense(data.classes, name="layer_5")(x)
    else:
        x = sigmoid_cnn(x, data.classes)
    return keras.Model(inputs, x)


def measure(name: str, data: ImageData, options: Any, on_epoch: Any) -> dict[str, list[float]]:
    """Trains one network.

    Returns:
        The factor of every kernel after every epoch, and the training loss.
    """
    import keras

    from tf_lbopt.callbacks import GradientVarianceFactor

    model = build_model(name, data, options.seed)
    model.compile(
        optimizer=keras.optimizers.SGD(options.learning_rate, momentum=0.9, nesterov=True),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    callback = GradientVarianceFactor(
        data.train_images[: options.examples], data.train_labels[: options.examples], batch_size=500
    )
    history = model.fit(
        data.train_images,
        data.train_labels,
        batch_size=options.batch_size,
        epochs=options.epochs,
        verbose=0,
        callbacks=[callback, keras.callbacks.LambdaCallback(on_epoch_end=on_epoch)],
    ).history
    factors = {
        key.split("/")[-2]: values for key, values in history.items() if key.endswith("/kernel")
    }
    return {"loss": history["loss"], **factors}


def _plot(path: Path, data_name: str, results: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, len(results), figsize=(11, 4.2), layout="constrained")
    for axis, (name, curves) in zip(axes, results.items(), strict=True):
        layers = [layer for layer in curves if layer != "loss"]
        for number, layer in enumerate(layers):
            epochs = range(1, len(curves[layer]) + 1)
            color = plt.colormaps["viridis"](number / max(1, len(layers) - 1))
            axis.plot(epochs, curves[layer], marker="o", markersize=4, color=color, label=layer)
        axis.set_yscale("log")
        axis.set_xlabel("epoch")
        axis.set_title(f"{name.upper()} on {data_name}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), title="from bottom to top"
    )
    axes[0].set_ylabel("gradient variance factor $M_k$ (log scale)")
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=130)
    finally:
        plt.close(figure)


def _table(name: str, curves: dict[str, list[float]]) -> Table:
    table = Table(title=f"{name.upper()}: gradient variance factor after each epoch")
    table.add_column("epoch", justify="right")
    for column in curves:
        table.add_column(column, justify="right")
    for epoch in range(len(curves["loss"])):
        table.add_row(str(epoch + 1), *(f"{values[epoch]:.4g}" for values in curves.values()))
    return table


def main(argv: Sequence[str]) -> int:
    """Runs the study.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code: 0, or 2 for flags or data that cannot be used.
    """
    values = define_flags()
    try:
        parse_flags(values, argv)
        if values.help:
            print(help_text(values, PROGRAM, SUMMARY))
            return 0
        if values.data_dir is None:
            raise FlagValueError("data_dir", "a folder with MNIST or CIFAR-10", None)
        source = find_source(Path(values.data_dir))
        output = Path(values.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        _run(values, source, output)
    except DataFormatError as error:
        return _fail(FlagValueError("data_dir", "a folder with MNIST or CIFAR-10", error))
    except FlagValueError as error:
        return _fail(error)
    return 0


def _run(values: Any, source: Any, output: Path) -> None:
    from official_recipes.common.replicas import quiet_tensorflow

    quiet_tensorflow()
    data = source.load()
    results = {}
    with progress_bar(Console(stderr=True)) as progress:
        for name in MODELS:
            task = progress.add_task(f"{name}, epochs", total=values.epochs)
            results[name] = measure(
                name, data, values, lambda epoch, logs, task=task: progress.advance(task)
            )
            progress.remove_task(task)
    _plot(output / "variance_factor.png", data.name, results)
    write_json(output / "variance_factor.json", {"data": data.name, **results})
    console = Console()
    for name, curves in results.items():
        console.print(_table(name, curves))


def _fail(error: FlagValueError) -> int:
    print(" ".join(str(error).split()), file=sys.stderr)
    return EXIT_BAD_FLAG


if __name__ == "__main__":
    run_program(main, sys.argv)
