"""The table, the plot and the JSON file of a comparison."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from official_recipes.common.files import atomic_write
from official_recipes.quickstart.training import RunResult

_VARIANCE_REDUCED = "vr_"


def result_table(data_name: str, replicas: int, results: list[RunResult]) -> Table:
    """Returns one row per run: optimizer, batch, rate, updates, test accuracy, seconds."""
    table = Table(title=f"{data_name}, {replicas} CPU replicas")
    table.add_column("optimizer")
    for heading in ("batch", "learning rate", "updates", "test accuracy", "seconds"):
        table.add_column(heading, justify="right")
    for result in results:
        accuracy = f"{result.test_accuracy[-1]:.2%}"
        table.add_row(
            result.settings.optimizer,
            str(result.settings.batch_size),
            f"{result.settings.learning_rate:g}",
            str(result.updates),
            f"{accuracy} (diverged)" if result.diverged else accuracy,
            f"{result.seconds:.1f}",
        )
    return table


def comparison_record(data_name: str, replicas: int, results: list[RunResult]) -> dict:
    """Returns a comparison as plain data."""
    return {
        "data": data_name,
        "replicas": replicas,
        "runs": [
            {
                **asdict(result.settings),
                "updates": result.updates,
                "updates_per_epoch": result.updates_per_epoch,
                "diverged": result.diverged,
                "final_test_accuracy": result.test_accuracy[-1],
                "seconds": round(result.seconds, 3),
                "train_loss": result.train_loss,
                "test_loss": result.test_loss,
                "test_accuracy": result.test_accuracy,
            }
            for result in results
        ],
    }


def write_plot(path: Path, data_name: str, replicas: int, results: list[RunResult]) -> None:
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
        updates = [epoch * result.updates_per_epoch for epoch in epochs]
        style = {
            "label": result.settings.label,
            "color": color,
            "linestyle": linestyle,
            "linewidth": 1.5,
            "marker": "o" if len(epochs) < 10 else None,
            "markersize": 4,
        }
        for column, x in enumerate((epochs, updates)):
            axes[0, column].plot(x, [100 * value for value in result.test_accuracy], **style)
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
    figure.suptitle(f"{data_name}, {replicas} CPU replicas: same weights at the start")
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=130)
    finally:
        plt.close(figure)


def _looks(results: list[RunResult]) -> list[tuple[str, str]]:
    """Returns color and line style per run.

    A variance-reduced optimizer is dashed in the color of its base, the small batch dotted black.
    """
    largest_batch = max(result.settings.batch_size for result in results)
    colors: dict[str, str] = {}
    looks = []
    for result in results:
        name = result.settings.optimizer
        if result.settings.batch_size < largest_batch:
            looks.append(("black", ":"))
            continue
        base = name.removeprefix(_VARIANCE_REDUCED)
        color = colors.setdefault(base, f"C{len(colors)}")
        looks.append((color, "-" if base == name else "--"))
    return looks
