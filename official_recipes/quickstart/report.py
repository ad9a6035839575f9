"""The table, the plot and the JSON file of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags
from rich.table import Table

from official_recipes.common.files import atomic_write
from official_recipes.common.keras_options import TrainingOptions
from official_recipes.common.keras_training import RunResult

_VARIANCE_REDUCED = "vr_"


def label(options: TrainingOptions) -> str:
    """Returns a run's name in plots and on the screen."""
    return f"{options.optimizer}, batch {options.batch_size}"


def title(data_name: str, results: list[RunResult]) -> str:
    """Returns what all runs have in common."""
    return f"{data_name}, {results[0].options.replicas} CPU replicas"


def result_table(data_name: str, results: list[RunResult]) -> Table:
    """Returns one row per run: optimizer, batch, rate, updates, test accuracy, seconds."""
    table = Table(title=title(data_name, results))
    table.add_column("optimizer")
    for heading in ("batch", "learning rate", "updates", "test accuracy", "seconds"):
        table.add_column(heading, justify="right")
    for result in results:
        accuracy = f"{result.metrics[-1]['test_accuracy']:.2%}"
        table.add_row(
            result.options.optimizer,
            str(result.options.batch_size),
            f"{result.options.schedule.learning_rate:g}",
            str(result.updates),
            f"{accuracy} (diverged)" if result.diverged else accuracy,
            f"{result.seconds:.1f}",
        )
    return table


def comparison_record(
    data_name: str, values: flags.FlagValues, results: list[RunResult]
) -> dict[str, Any]:
    """Returns a comparison as plain data."""
    runs = []
    for result in results:
        options = result.options
        curves = {name: _curve(result, name) for name in ("test_loss", "test_accuracy")}
        runs.append(
            {
                "optimizer": options.optimizer,
                "batch_size": options.batch_size,
                "epochs": options.epochs,
                "learning_rate": options.schedule.learning_rate,
                "seed": options.seed,
                "warmup_fraction": values.warmup_fraction,
                "trust_coefficient": values.trust_coefficient,
                "updates": result.updates,
                "updates_per_epoch": _updates_per_epoch(result),
                "diverged": result.diverged,
                "final_test_accuracy": curves["test_accuracy"][-1],
                "seconds": round(result.seconds, 3),
                "train_loss": result.train_loss,
                **curves,
            }
        )
    return {"data": data_name, "replicas": values.replicas, "runs": runs}


def _updates_per_epoch(result: RunResult) -> int:
    return result.task_settings["train_size"] // result.options.batch_size


def _curve(result: RunResult, name: str) -> list[float]:
    return [row[name] for row in result.metrics]


def write_plot(path: Path, data_name: str, results: list[RunResult]) -> None:
    """Draws test accuracy and training loss over epochs and over updates as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, 2, figsize=(11, 7.5), sharex="col", sharey="row", layout="constrained"
    )
    looks = _looks(results)
    for result, (color, linestyle) in zip(results, looks, strict=True):
        epochs = list(range(1, len(result.train_loss) + 1))
        updates = [epoch * _updates_per_epoch(result) for epoch in epochs]
        style = {
            "label": label(result.options),
            "color": color,
            "linestyle": linestyle,
            "linewidth": 1.5,
            "marker": "o" if len(epochs) < 10 else None,
            "markersize": 4,
        }
        accuracy = [100 * value for value in _curve(result, "test_accuracy")]
        for column, x in enumerate((epochs, updates)):
            axes[0, column].plot(x, accuracy, **style)
            axes[1, column].plot(x, result.train_loss, **style)
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("training loss (epoch mean)")
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_xlabel("epoch")
    axes[1, 1].set_xlabel("weight updates (log scale)")
    axes[1, 1].set_xscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 4), handlelength=3
    )
    figure.suptitle(f"{title(data_name, results)}: same weights at the start")
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=130)
    finally:
        plt.close(figure)


def _looks(results: list[RunResult]) -> list[tuple[str, str]]:
    """Returns color and line style per run.

    A variance-reduced optimizer is dashed in the color of its base, the small batch dotted black.
    """
    largest_batch = max(result.options.batch_size for result in results)
    colors: dict[str, str] = {}
    looks = []
    for result in results:
        name = result.options.optimizer
        if result.options.batch_size < largest_batch:
            looks.append(("black", ":"))
            continue
        base = name.removeprefix(_VARIANCE_REDUCED)
        color = colors.setdefault(base, f"C{len(colors)}")
        looks.append((color, "-" if base == name else "--"))
    return looks
