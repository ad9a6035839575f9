"""What a batch costs in updates and in examples, from the noise scale."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tf_lbopt import _validation, schedules
from tf_lbopt.batch_size.history import History, read_history
from tf_lbopt.batch_size.plots import plot_recommendation

# A table goes from a 32nd of the noise scale to 32 times it.
_DOUBLINGS = 5


def steps_and_examples(noise_scale: float, batch: float) -> tuple[float, float]:
    """How many updates and examples training to a loss takes at a batch, against the fewest.

    ``S/S_min = 1 + B_noise/B`` and ``E/E_min = 1 + B/B_noise``. S_min is what an endless batch
    takes, E_min what a tiny one does; ``E_min = B_noise S_min``.

    Args:
        noise_scale: B_noise > 0, in examples.
        batch: B > 0, in examples.

    Returns:
        ``(S/S_min, E/E_min)``, both > 1.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.

    Example:
        >>> steps_and_examples(noise_scale=1000, batch=250)
        (5.0, 1.25)

    References:
        McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162),
        section 2.3 (equation 2.11).
    """
    noise = _validation.positive("noise_scale", noise_scale)
    size = _validation.positive("batch", batch)
    return 1 + noise / size, 1 + size / noise


def scale_learning_rate(
    rule: str,
    learning_rate: float,
    base_batch_size: int,
    batch_size: int,
    noise_scale: float | None = None,
) -> float:
    """The learning rate for a batch, from one that works at another batch.

    - ``"linear"``: times k = batch_size / base_batch_size (`schedules.linear_scaling`), for SGD
      and momentum;
    - ``"sqrt"``: times √k (`schedules.sqrt_scaling`), for Adam and its like;
    - ``"adascale"``: times AdaScale's gain r = (σ² + μ²)/(σ²/k + μ²), for SGD. At the base batch
      b the variance is σ² = tr Σ/b and μ² = ‖G‖², so that
      ``r = (1 + B_noise/b)/(1 + B_noise/batch_size)``: the ratio of the updates that the two
      batches need (`steps_and_examples`). It is between 1 and k, and near k while both batches are
      small against the noise scale.

    Args:
        rule: `"linear"`, `"sqrt"` or `"adascale"`.
        learning_rate: A rate ≥ 0 that works at `base_batch_size`.
        base_batch_size: In examples, ≥ 1.
        batch_size: In examples, ≥ 1.
        noise_scale: B_noise > 0, in examples; for `"adascale"` only.

    Returns:
        The rate.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range, or
            `noise_scale` is not given for `"adascale"`, or for another rule.

    Example:
        >>> scale_learning_rate("linear", 0.1, 256, 1024)
        0.4
        >>> scale_learning_rate("sqrt", 0.1, 256, 1024)
        0.2
        >>> round(scale_learning_rate("adascale", 0.1, 256, 1024, noise_scale=1792), 4)
        0.2909

    References:
        Goyal et al. 2017 (arXiv:1706.02677), You et al. 2020 (arXiv:1904.00962), Johnson et al.
        2020, "AdaScale SGD" (arXiv:2007.05105).
    """
    rule = _validation.choice("rule", rule, ("linear", "sqrt", "adascale"))
    if (rule == "adascale") != (noise_scale is not None):
        raise ValueError(
            "`noise_scale` must be a number > 0 with rule='adascale', and None with another. "
            f"Received: noise_scale={_validation.shown(noise_scale)} with rule={rule!r}"
        )
    if rule == "linear":
        return schedules.linear_scaling(learning_rate, base_batch_size, batch_size)
    if rule == "sqrt":
        return schedules.sqrt_scaling(learning_rate, base_batch_size, batch_size)
    rate = _validation.real("learning_rate", learning_rate, low=0.0)
    base = _validation.integer("base_batch_size", base_batch_size, low=1)
    size = _validation.integer("batch_size", batch_size, low=1)
    assert noise_scale is not None
    return (
        rate * steps_and_examples(noise_scale, base)[0] / steps_and_examples(noise_scale, size)[0]
    )


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """A row of a `Recommendation`.

    Attributes:
        batch: Examples of an update.
        updates: To the loss that the run has reached; without `examples`, in multiples of the
            fewest possible.
        examples: The same, of examples.
        hours: That takes; `None` without `examples`.
        efficiency: E_min/E, the share of the examples that a tiny batch would need.
    """

    batch: int
    updates: float
    examples: float
    hours: float | None
    efficiency: float


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What `recommend` returns; `print` it for the table.

    Attributes:
        batch: The batch that is recommended.
        noise_scale: B_noise of the whole run, in examples.
        standard_error: Of `noise_scale`, as if values were independent, or `None` where the history
            has none. It is too small for values that are averages over the same updates.
        last_noise_scale: The last value in the history.
        values: How many there are, one for each epoch or each time that it was logged.
        missing: How many more are not positive and finite, and left out.
        rows: The table, by rising batch.
    """

    batch: int
    noise_scale: float
    standard_error: float | None
    last_noise_scale: float
    values: int
    missing: int
    rows: tuple[BatchSize, ...]

    def __str__(self) -> str:
        """The table."""
        absolute = self.rows[0].hours is not None
        error = "" if self.standard_error is None else f" ± {self.standard_error:,.0f}"
        missing = f" ({self.missing} left out)" if self.missing else ""
        lines = [
            f"noise scale {self.noise_scale:,.0f}{error} examples over the run, "
            f"{self.last_noise_scale:,.0f} at its end, from {self.values} "
            f"value{'s' if self.values > 1 else ''}{missing}"
        ]
        shown: Callable[[float], str] = "{:,.0f}".format if absolute else "{:.2f}".format
        names = ("updates", "examples") if absolute else ("updates/fewest", "examples/fewest")
        table = [("batch", *names, *(["hours"] if absolute else []), "efficiency", "")]
        for row in self.rows:
            table.append(
                (
                    f"{row.batch:,}",
                    shown(row.updates),
                    shown(row.examples),
                    *([] if row.hours is None else [f"{row.hours:.3g}"]),
                    f"{100 * row.efficiency:.0f} %",
                    "recommended" if row.batch == self.batch else "",
                )
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for *numbers, mark in table:
            aligned = [cell.rjust(width) for cell, width in zip(numbers, widths, strict=False)]
            lines.append("  ".join([*aligned, mark]).rstrip())
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws updates and examples at each batch, and one against the other, as a PNG.

        Args:
            path: The file; its folder must exist.

        Raises:
            ImportError: There is no matplotlib.
        """
        plot_recommendation(self, Path(path))


def recommend(
    history: History,
    devices: int,
    examples_per_second: float,
    *,
    examples: int | None = None,
    examples_per_device: int | None = None,
    batch_sizes: Sequence[int] | None = None,
) -> Recommendation:
    """What each batch costs, and the largest that is worth using, from a run's noise scale.

    The noise scale grows in a run. With n_i that of part i of the run (an epoch) and B_i the batch
    there, the same progress takes ``S_min = Σ e/(B_i + n_i)`` updates at an endless batch and
    ``E_min = Σ e n_i/(B_i + n_i)`` examples at a tiny one, for e examples in each part.
    ``B_noise = E_min/S_min``, and a constant batch B takes ``S_min (1 + B_noise/B)`` updates. Where
    the history lacks the run's batch, B_noise is the plain mean of the n_i. All of that is for the
    loss that the run has reached, with a learning rate that is tuned at each batch.

    A step of n examples on a device takes ``max(n, examples_per_device) / examples_per_second``
    seconds, by accumulation or at once. Reductions between devices are not counted. Recommended is
    the largest batch of the table that is neither above B_noise, where examples are twice the
    fewest, nor above what the devices take at once, from where on training becomes slower again.

    Args:
        history: A `keras.callbacks.History` (what `fit` returns), its dictionary, or the path of
            such a dictionary as JSON or of a TensorBoard folder. It must have ``noise_scale``,
            which `callbacks.GradientNoiseScale` logs, and may have ``noise_scale_standard_error``
            and ``examples_per_update``, of each epoch or at other equal distances. Values that are
            not positive and finite are left out.
        devices: How many there are, ≥ 1.
        examples_per_second: What one of them trains on.
        examples: That the run has seen: its epochs times the size of its training data. Without it,
            or without ``examples_per_update`` in the history, updates and examples are in multiples
            of the fewest possible, and there are no hours.
        examples_per_device: That a device takes at once to be that fast, ≥ 1; `None`: it is that
            fast with any number of them.
        batch_sizes: Of the table, positive integers. Defaults to `devices` times powers of 2,
            from a 32nd of the noise scale to 32 times it.

    Returns:
        A table with a recommended batch; `print` shows it, `Recommendation.plot` draws it.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range, or the history
            has no noise scale.

    Example:
        >>> history = {"noise_scale": [40.0, 160.0], "examples_per_update": [64, 64]}
        >>> table = recommend(history, devices=1, examples_per_second=1000, examples=100_000,
        ...     batch_sizes=[32, 64, 128])
        >>> print(table)
        noise scale 78 examples over the run, 160 at its end, from 2 values
        batch  updates  examples   hours  efficiency
           32    2,421    77,473  0.0215        71 %
           64    1,562   100,000  0.0278        55 %  recommended
          128    1,133   145,055  0.0403        38 %

    References:
        McCandlish et al. 2018 (arXiv:1812.06162), section 2.3 and appendix D.
    """
    devices = _validation.integer("devices", devices, low=1)
    speed = _validation.positive("examples_per_second", examples_per_second)
    examples = _validation.integer("examples", examples, low=1, optional=True)
    share = _validation.integer("examples_per_device", examples_per_device, low=1, optional=True)
    noise, errors, run = read_history(history)
    measured = [i for i, value in enumerate(noise) if math.isfinite(value) and value > 0]
    if not measured:
        raise ValueError(
            "`history` must have a positive noise scale. Received: "
            f"noise_scale={_validation.shown(noise)}"
        )
    known = all(math.isfinite(run[i]) and run[i] > 0 for i in measured)
    # Updates of an endless batch for an example of each epoch.
    weights = {i: 1 / (run[i] + noise[i]) if known else 1.0 for i in measured}
    total = math.fsum(weights.values())
    noise_scale = math.fsum(noise[i] * weight for i, weight in weights.items()) / total
    error = math.hypot(*(errors[i] * weight for i, weight in weights.items())) / total
    fewest = None if examples is None or not known else examples * (total / len(weights))
    sizes = _sizes(batch_sizes, noise_scale, devices)
    limit = min(noise_scale, math.inf if share is None else share * devices)
    return Recommendation(
        batch=max([size for size in sizes if size <= limit], default=sizes[0]),
        noise_scale=noise_scale,
        standard_error=error if math.isfinite(error) else None,
        last_noise_scale=noise[measured[-1]],
        values=len(measured),
        missing=len(noise) - len(measured),
        rows=tuple(
            _row(size, noise_scale, fewest, max(size / devices, share or 0) / speed)
            for size in sizes
        ),
    )


def _row(size: int, noise_scale: float, fewest: float | None, seconds: float) -> BatchSize:
    """What a batch costs, where an update of it takes so many seconds."""
    steps, examples = steps_and_examples(noise_scale, size)
    if fewest is None:
        return BatchSize(size, steps, examples, None, 1 / examples)
    updates = fewest * steps
    return BatchSize(size, updates, updates * size, updates * seconds / 3600, 1 / examples)


def _sizes(batch_sizes: Sequence[int] | None, noise_scale: float, devices: int) -> list[int]:
    if batch_sizes is None:
        middle = round(math.log2(noise_scale / devices))
        powers = range(max(0, middle - _DOUBLINGS), max(0, middle + _DOUBLINGS) + 1)
        return [devices * 2**power for power in powers]
    return checked_batch_sizes(batch_sizes)


def checked_batch_sizes(batch_sizes: object) -> list[int]:
    """Checks batch sizes, and returns them by size, each once.

    Raises:
        TypeError, ValueError: They are no sequence of positive integers, or none.
    """
    if isinstance(batch_sizes, str) or not isinstance(batch_sizes, Sequence):
        expected = "a sequence of integers >= 1"
        raise _validation.refusal(TypeError, "batch_sizes", expected, batch_sizes)
    sizes = sorted({_validation.integer("batch_sizes", size, low=1) for size in batch_sizes})
    if not sizes:
        raise ValueError("`batch_sizes` must have one or more. Received: batch_sizes=[]")
    return sizes
