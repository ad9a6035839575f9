"""The plots. matplotlib is imported by nothing else of the package."""

from pathlib import Path
from typing import TYPE_CHECKING

from tf_lbopt.batch_size.files import replacing

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from tf_lbopt.batch_size.measuring import CriticalBatchSize
    from tf_lbopt.batch_size.planning import Recommendation


# Above the least loss: what a plot of losses shows.
_NEAR = 0.5


def plot_recommendation(recommendation: "Recommendation", path: Path) -> None:
    """Draws updates and examples at each batch, and one against the other, as a PNG."""
    figure = _new_figure()
    rows, noise = recommendation.rows, recommendation.noise_scale
    batches = [row.batch for row in rows]
    left, right = figure.subplots(1, 2)
    left.plot(
        batches,
        [1 + noise / batch for batch in batches],
        "o-",
        label="updates, $S/S_\\mathrm{min}$",
    )
    left.plot(
        batches, [1 / row.efficiency for row in rows], "s-", label="examples, $E/E_\\mathrm{min}$"
    )
    left.axvline(noise, color="gray", linestyle="--", label=f"noise scale {noise:,.0f}")
    error = recommendation.standard_error
    if error is not None:
        left.axvspan(max(noise - error, batches[0]), noise + error, color="gray", alpha=0.2)
    left.axvline(recommendation.batch, color="C2", linestyle=":", label="recommended")
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    _whole_numbers(left.xaxis)
    _whole_numbers(left.yaxis)
    left.set_xlabel("batch (log scale)")
    left.set_ylabel("multiple of the fewest (log scale)")
    left.legend(loc="upper center")
    right.plot([row.updates for row in rows], [row.examples for row in rows], "o-", color="C0")
    for row in rows:
        chosen = row.batch == recommendation.batch
        if chosen:
            right.plot([row.updates], [row.examples], "o", color="C2", markersize=10)
        right.annotate(
            f"{row.batch:,}", (row.updates, row.examples), xytext=(6, 4),
            textcoords="offset points", fontsize=8, weight="bold" if chosen else "normal",
        )  # fmt: skip
    right.set_xscale("log")
    right.set_yscale("log")
    unit = ", multiple of the fewest" if rows[0].hours is None else ""
    right.set_xlabel(f"updates{unit} (log scale)")
    right.set_ylabel(f"examples{unit} (log scale)")
    right.set_title("to the same loss, at each batch", fontsize=10)
    _save(figure, path)


def plot_branches(result: "CriticalBatchSize", path: Path, noise_scale: float | None) -> None:
    """Draws the branches' losses on the way and at their ends, as a PNG."""
    figure = _new_figure()  # which says so if there is no matplotlib
    from matplotlib import colormaps

    left, right = figure.subplots(1, 2)
    last = max(1, len(result.branches) - 1)
    # Where the best is drawn, which has no logarithm.
    lowest = (result.tolerance or 1e-3) / 30
    ends: list[tuple[int, float]] = []
    for number, branch in enumerate(result.branches):
        color = colormaps["viridis"](0.95 * number / last)
        if branch.curve:
            examples, losses = zip(*branch.curve, strict=True)
            label, marker = f"{branch.batch_size:,}", "o" if len(examples) < 4 else ""
            left.plot(examples, losses, color=color, label=label, marker=marker)
        if branch.loss is not None:
            above = max(branch.loss - result.best_loss, lowest)
            right.plot([branch.batch_size], [above], "o", color=color, zorder=3)
            ends.append((branch.batch_size, above))
    right.plot(*zip(*ends, strict=True), color="gray", linewidth=1)
    right.axhline(
        result.tolerance, color="C3", linestyle="--", label=f"tolerance {result.tolerance:g}"
    )
    sign = "≥ " if result.at_the_end else ""
    right.axvline(
        result.batch_size, color="C2", linestyle=":",
        label=f"critical batch size {sign}{result.batch_size:,}",
    )  # fmt: skip
    if noise_scale is not None:
        right.axvline(
            noise_scale, color="gray", linestyle="--", label=f"noise scale {noise_scale:,.0f}"
        )
    right.set_xscale("log", base=2)
    _whole_numbers(right.xaxis)
    right.set_xlabel("batch (log scale)")
    right.set_yscale("log")
    right.set_ylabel("loss at the end, above the least (log scale)")
    right.legend()
    left.set_xlabel("examples since the checkpoint")
    left.set_ylabel("smoothed training loss")
    left.legend(title="batch", ncols=2)
    # What comes first and is hardly averaged yet, and branches far off, would hide the rest.
    near = [b for b in result.branches if b.loss is not None and b.loss < result.best_loss + _NEAR]
    late = [loss for b in near for at, loss in b.curve if at >= b.curve[-1][0] / 4]
    if late:
        margin = 0.1 * (max(late) - min(late)) + 1e-9
        left.set_ylim(min(late) - margin, max(late) + 3 * margin)
    _save(figure, path)


def _new_figure() -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib: `pip install matplotlib`. Received: none"
        ) from error
    return Figure(figsize=(11, 4.2), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _whole_numbers(axis: "Axis") -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
