"""The critical batch size, measured: branches of one training run at several batches."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.batch_size.files import replacing
from tf_lbopt.batch_size.planning import checked_batch_sizes, scale_learning_rate
from tf_lbopt.batch_size.plots import plot_branches

_CHECKPOINT = "checkpoint.weights.h5"
_BRANCHES = "branches.jsonl"
# Points of a curve that are kept.
_POINTS = 60


@dataclasses.dataclass(frozen=True)
class Branch:
    """Training from the checkpoint at one batch.

    Attributes:
        batch_size: In examples.
        learning_rate: At this batch.
        updates: That it made.
        loss: The smoothed training loss at its end; `None` if the loss became infinite or NaN.
        curve: ``(examples, smoothed loss)`` on the way there, about 60 points.
        logs: What callbacks have logged at its end, by name.
        seconds: Wall time.
    """

    batch_size: int
    learning_rate: float
    updates: int
    loss: float | None
    curve: tuple[tuple[int, float], ...]
    logs: dict[str, float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class CriticalBatchSize:
    """What `measure_critical_batch_size` returns; `print` it for a table.

    Attributes:
        batch_size: The critical batch size: the largest whose loss is within the tolerance, as are
            those of all batches between it and the best.
        at_the_end: Whether it is the largest that was tried, so that it may be larger still.
        best_loss: The least of the branches' losses.
        tolerance: How much more a loss may be.
        branches: By rising batch.
    """

    batch_size: int
    at_the_end: bool
    best_loss: float
    tolerance: float
    branches: tuple[Branch, ...]

    def __str__(self) -> str:
        """The table."""
        lines = [
            f"critical batch size {'>= ' if self.at_the_end else ''}{self.batch_size:,}: the "
            f"largest with a loss up to {self.best_loss:.4f} + {self.tolerance:g}",
            f"{'batch':>9}  {'updates':>8}  {'rate':>9}  {'loss':>8}  {'above best':>10}",
        ]
        for branch in self.branches:
            loss, above = "diverged", ""
            if branch.loss is not None:
                loss, above = f"{branch.loss:.4f}", f"{branch.loss - self.best_loss:+.4f}"
            lines.append(
                f"{branch.batch_size:>9,}  {branch.updates:>8,}  {branch.learning_rate:>9.4g}  "
                f"{loss:>8}  {above:>10}".rstrip()
            )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str], noise_scale: float | None = None) -> None:
        """Draws the branches' losses on the way and at their ends, as a PNG.

        Args:
            path: The file; its folder must exist.
            noise_scale: Of the run at the checkpoint, to be drawn beside, or `None`.

        Raises:
            ImportError: There is no matplotlib.
        """
        plot_branches(self, Path(path), noise_scale)


def measure_critical_batch_size(
    make_model: Callable[[], keras.Model],
    dataset: tf.data.Dataset | Callable[[int], tf.data.Dataset],
    batch_sizes: Sequence[int],
    *,
    examples: int,
    scaling: str,
    base_batch_size: int | None = None,
    noise_scale: float | None = None,
    tolerance: float = 0.01,
    smoothing: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    callbacks: Callable[[], Sequence[keras.callbacks.Callback]] | None = None,
    verbose: int = 1,
) -> CriticalBatchSize:
    """The largest batch that does not cost progress, found by training on from one checkpoint.

    Every batch size is a branch: training with `fit` on the same number of examples from the same
    weights and optimizer state, at the batch's own constant learning rate. The training losses L_i
    of its updates, the last after E examples, are averaged exponentially over the examples, with
    window w. At batch B, from s = 0 and after n updates,

        ``s ← a s + (1 − a) L_i``, ``a = exp(−B/w)``, ``loss = s/(1 − aⁿ)``.

    An example so weighs the same in every branch. The critical batch size is the largest, going up
    from the batch of the least loss, whose loss is at most `tolerance` above that.

    It differs from checkpoint to checkpoint, and mostly grows with training. Losses also differ by
    the order of the data: differences below those between two orders say nothing.

    Args:
        make_model: Returns the model as it is at the checkpoint: built, compiled with a constant
            learning rate, with weights and optimizer state loaded. It is called for each branch;
            all begin with the weights and the optimizer state that the first one had.
        dataset: A finite `tf.data.Dataset` of single examples as `fit` takes them, in the same
            order each time, which is begun again at its end; or a function that makes one of
            batches, of the batch size that it is given (that of a micro-step), with at least
            `examples` examples in it. All branches should see the same examples in the same
            order.
        batch_sizes: In examples of an update, over all replicas and micro-steps; two or more.
        examples: That each branch is trained on, a multiple of each batch size.
        scaling: The rule of `scale_learning_rate`: `"linear"` for SGD and momentum, `"sqrt"` for
            Adam and its like, `"adascale"` with `noise_scale`.
        base_batch_size: The batch that the model's learning rate is for. Defaults to the smallest
            of `batch_sizes`.
        noise_scale: For `scaling="adascale"`.
        tolerance: By how much a loss may be above the least, ≥ 0. Defaults to 0.01.
        smoothing: w ≥ 1, in examples. Defaults to an eighth of `examples`.
        folder: Where the checkpoint and the finished branches are kept, made if missing: called
            again with it, the function goes on after the last finished branch. A folder belongs to
            one checkpoint. `None` keeps nothing.
        callbacks: Returns callbacks for a branch, such as `callbacks.GradientNoiseScale`; what they
            have logged at the end is in `Branch.logs`.
        verbose: 1 shows how far each branch is, on a terminal, and its end; 0 shows nothing.

    Returns:
        The critical batch size, and all branches.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range, the model is
            not compiled or has a schedule, its micro-steps do not divide a batch, the data end
            early, the folder has another measurement, or no branch has a finite loss.

    Example:
        >>> import tensorflow as tf
        >>> x = keras.random.normal([64, 4], seed=0)
        >>> examples = tf.data.Dataset.from_tensor_slices((x, keras.ops.sum(x, axis=1)))
        >>> def make_model():
        ...     model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
        ...     model.compile(keras.optimizers.SGD(0.001), loss="mse")
        ...     return model
        >>> result = measure_critical_batch_size(make_model, examples, [4, 8, 64], examples=256,
        ...     scaling="linear", tolerance=0.5, verbose=0)
        >>> [branch.updates for branch in result.branches]
        [64, 32, 4]

    References:
        Merrill et al. 2025, "Critical Batch Size Revisited" (arXiv:2505.23971).
    """
    sizes = checked_batch_sizes(batch_sizes)
    if len(sizes) < 2:
        raise ValueError(f"`batch_sizes` must have two or more. Received: batch_sizes={sizes}")
    examples = _validation.integer("examples", examples, low=1)
    folder = _validation.path("folder", folder)
    if uneven := [size for size in sizes if examples % size]:
        raise ValueError(
            "`examples` must be a multiple of each batch size. Received: "
            f"examples={examples}, with batch_sizes={_validation.listed(uneven)}"
        )
    base = _validation.integer("base_batch_size", base_batch_size, low=1, optional=True)
    base = base or sizes[0]
    scale_learning_rate(scaling, 1.0, base, base, noise_scale)
    tolerance = _validation.real("tolerance", tolerance, low=0.0)
    window = _validation.integer("smoothing", smoothing, low=1, optional=True) or examples / 8
    verbose = _validation.integer("verbose", verbose, low=0)
    # A model can be called, too.
    if isinstance(make_model, keras.Model) or not callable(make_model):
        expected = "a function that returns a compiled model"
        raise _validation.refusal(TypeError, "make_model", expected, make_model)
    if not callable(dataset) and not isinstance(dataset, tf.data.Dataset):
        expected = (
            "a tf.data.Dataset of examples, or a function of the batch size that returns one of "
            "batches"
        )
        raise _validation.refusal(TypeError, "dataset", expected, dataset)
    settings = {
        "examples": examples,
        "scaling": scaling,
        "base_batch_size": base,
        "noise_scale": noise_scale,
        "smoothing": window,
    }
    with _kept(folder) as kept:
        branches = _read(kept / _BRANCHES, settings)
        for number, size in enumerate(sizes):
            if size in branches:
                continue
            model = _at_checkpoint(make_model, kept / _CHECKPOINT)
            rate = scale_learning_rate(scaling, _rate(model.optimizer), base, size, noise_scale)
            model.optimizer.learning_rate = rate
            extra = list(callbacks()) if callbacks is not None else []
            branches[size] = _branch(model, dataset, size, examples, window, extra, verbose)
            _write(kept / _BRANCHES, settings, branches)
            if verbose:
                print(_line(branches[size], f"{number + 1} of {len(sizes)}"), flush=True)
    return _result(tuple(branches[size] for size in sizes), tolerance)


def _line(branch: Branch, place: str) -> str:
    end = "the loss diverged" if branch.loss is None else f"smoothed loss {branch.loss:.4f}"
    return (
        f"batch {branch.batch_size:,} ({place}), learning rate {branch.learning_rate:.4g}: {end} "
        f"after {branch.updates:,} updates, {branch.seconds:.0f} s"
    )


def _result(branches: tuple[Branch, ...], tolerance: float) -> CriticalBatchSize:
    losses = [math.inf if branch.loss is None else branch.loss for branch in branches]
    best = min(losses)
    if math.isinf(best):
        raise ValueError(
            "`make_model` must return a model that trains: no branch has a finite loss. Received: "
            f"learning rates {_validation.listed(branch.learning_rate for branch in branches)}"
        )
    last = losses.index(best)
    while last + 1 < len(losses) and losses[last + 1] <= best + tolerance:
        last += 1
    return CriticalBatchSize(
        batch_size=branches[last].batch_size,
        at_the_end=last + 1 == len(losses),
        best_loss=best,
        tolerance=tolerance,
        branches=branches,
    )


def _at_checkpoint(make_model: Callable[[], keras.Model], checkpoint: Path) -> keras.Model:
    model = make_model()
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not model.built:
        raise ValueError(
            "`make_model` must return a model that is built and compiled. Received: "
            f"{_validation.shown(model)}"
        )
    if not optimizer.built:
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)
    if checkpoint.exists():
        model.load_weights(checkpoint)
    else:
        with replacing(checkpoint) as temporary:
            model.save_weights(temporary)
    try:
        optimizer.learning_rate = _rate(optimizer)
    except TypeError as error:
        raise ValueError(
            "`make_model` must return a model with a constant learning rate: the one in force at "
            f"the checkpoint. Received: a schedule ({error})"
        ) from error
    return model


def _branch(
    model: keras.Model,
    dataset: tf.data.Dataset | Callable[[int], tf.data.Dataset],
    size: int,
    examples: int,
    window: float,
    callbacks: list[keras.callbacks.Callback],
    verbose: int,
) -> Branch:
    micro_steps = _micro_steps(model.optimizer)
    if size % micro_steps:
        raise ValueError(
            f"`batch_sizes` must be multiples of the optimizer's {micro_steps} micro-steps. "
            f"Received: {size}"
        )
    micro_batch, steps = size // micro_steps, examples // size * micro_steps
    if callable(dataset):
        batches = dataset(micro_batch)
    else:
        batches = dataset.repeat().batch(micro_batch, drop_remainder=True)
    losses = _Losses(steps, verbose)
    started = time.perf_counter()
    history = model.fit(
        batches.take(steps),
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=[losses, keras.callbacks.TerminateOnNaN(), *callbacks],
    )
    values = losses.values
    diverged = not all(map(math.isfinite, values))
    # With `steps_per_execution` there is a loss for so many steps.
    done = min(steps, len(values) * model.steps_per_execution)
    if not diverged and done < steps:
        raise ValueError(
            f"`dataset` must have at least {examples} examples. Received: {done} batches of "
            f"{micro_batch} in the place of {steps}"
        )
    updates = examples // size
    if len(values) % updates == 0:
        # The loss of an update is the mean over its micro-steps.
        parts = len(values) // updates
        values = [math.fsum(values[i : i + parts]) / parts for i in range(0, len(values), parts)]
    curve = [] if diverged else smoothed(values, examples / len(values), window)
    every = max(1, len(curve) // _POINTS)
    points = range((len(curve) - 1) % every, len(curve), every)  # the last one among them
    return Branch(
        batch_size=size,
        learning_rate=_rate(model.optimizer),
        updates=done // micro_steps,
        loss=None if diverged else curve[-1],
        curve=tuple((round((i + 1) * examples / len(curve)), curve[i]) for i in points),
        logs={
            name: float(values[-1])
            for name, values in history.history.items()
            if name != "loss" and math.isfinite(values[-1])
        },
        seconds=round(time.perf_counter() - started, 2),
    )


def smoothed(losses: Sequence[float], examples: float, window: float) -> list[float]:
    """The exponential average, after each batch of so many examples; the window is in examples.

    Example:
        >>> [round(value, 3) for value in smoothed([4.0, 2.0], examples=10, window=1e9)]
        [4.0, 3.0]
    """
    decay = math.exp(-examples / window)
    total = weight = 0.0
    averages = []
    for loss in losses:
        total = decay * total + loss
        weight = decay * weight + 1.0
        averages.append(total / weight)
    return averages


class _Losses(keras.callbacks.Callback):
    """Keeps the loss of every batch by itself; logs have the mean since the metrics were reset."""

    def __init__(self, steps: int, verbose: int):
        super().__init__()
        self.values: list[float] = []
        self._bar: keras.utils.Progbar | None = None
        if verbose and sys.stdout.isatty():
            self._bar = keras.utils.Progbar(steps, unit_name="step")

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.values.append(float(logs["loss"]))
        if self._bar is not None:
            self._bar.add(self.model.steps_per_execution, [("loss", self.values[-1])])


def _rate(optimizer: keras.optimizers.Optimizer) -> float:
    # Under a strategy it is one of its variables.
    return float(keras.ops.convert_to_numpy(tf.convert_to_tensor(optimizer.learning_rate)))


def _micro_steps(optimizer: keras.optimizers.Optimizer) -> int:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(optimizer, "gradient_accumulation_steps", None) or 1


@contextlib.contextmanager
def _kept(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`folder` must be a folder that can be made. Received: folder={str(folder)!r}"
        ) from error
    yield path


def _read(path: Path, settings: Mapping[str, object]) -> dict[int, Branch]:
    if not path.exists():
        return {}
    branches = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.pop("settings") != settings:
            raise ValueError(
                "`folder` must be empty or of this measurement. Received: "
                f"folder={str(path.parent)!r}, with branches of other settings"
            )
        curve = tuple((count, loss) for count, loss in row.pop("curve"))
        branches[row["batch_size"]] = Branch(curve=curve, **row)
    return branches


def _write(path: Path, settings: Mapping[str, object], branches: dict[int, Branch]) -> None:
    rows = [{"settings": settings, **dataclasses.asdict(branch)} for branch in branches.values()]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
