"""The model, the optimizers by name, and one training run with plain ``compile`` and ``fit``."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

import tf_lbopt
from official_recipes.common.image_data import ImageData
from official_recipes.common.input_pipeline import without_autotuning
from official_recipes.quickstart import settings
from tf_lbopt.schedules import Warmup

_STOCK_OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "momentum": lambda learning_rate: keras.optimizers.SGD(learning_rate, momentum=0.9),
    "adam": keras.optimizers.Adam,
}
_TEST_BATCH = 1000


@dataclass(frozen=True)
class RunSettings:
    """What tells one run from another.

    Attributes:
        optimizer: The optimizer's name.
        batch_size: The global batch.
        epochs: Passes over the training split.
        learning_rate: The peak of the schedule.
        seed: Seed of the initial weights and of the shuffling.
        warmup_fraction: Share of the updates in which the rate rises to its peak.
        trust_coefficient: τ of an optimizer with a trust ratio, or ``None`` for its default.
    """

    optimizer: str
    batch_size: int
    epochs: int
    learning_rate: float
    seed: int
    warmup_fraction: float = settings.WARMUP_FRACTION
    trust_coefficient: float | None = None

    @property
    def label(self) -> str:
        """The run's name in tables and plots."""
        return f"{self.optimizer}, batch {self.batch_size}"


@dataclass(frozen=True)
class RunResult:
    """One finished run; the lists hold one value per epoch.

    Attributes:
        settings: What was run.
        updates: Weight updates made.
        updates_per_epoch: Weight updates in one epoch.
        train_loss: Mean loss over the epoch's batches.
        test_loss: Loss on the test split after the epoch (after the last one only, if so asked).
        test_accuracy: Accuracy on the test split, from 0 to 1, likewise.
        seconds: Wall time of ``fit``, building the graph included.
    """

    settings: RunSettings
    updates: int
    updates_per_epoch: int
    train_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the training loss became infinite or NaN, which ends a run early."""
        return not all(map(math.isfinite, self.train_loss))


def known_optimizers() -> tuple[str, ...]:
    """Returns every name that ``--optimizers`` takes."""
    return (*_STOCK_OPTIMIZERS, *(row.name for row in tf_lbopt.list_optimizers()))


def optimizers_of_sub_batches() -> frozenset[str]:
    """Returns the names of the optimizers that compare the gradients of sub-batches."""
    return frozenset(row.name for row in tf_lbopt.list_optimizers() if row.needs_sub_batches)


def default_learning_rate(name: str) -> float:
    """Returns the tuned rate of an optimizer, or else its constructor's default."""
    if name in settings.LEARNING_RATES:
        return settings.LEARNING_RATES[name]
    parameter = inspect.signature(_factory(name)).parameters.get("learning_rate")
    if parameter is not None and isinstance(parameter.default, float):
        return parameter.default
    return settings.FALLBACK_LEARNING_RATE


def build_model(data: ImageData) -> keras.Model:
    """Returns a multilayer perceptron for tiny images and a small conv net for larger ones.

    Pixels are scaled inside the model: the arrays stay uint8, a quarter of the memory.
    """
    height, width, channels = data.train_images.shape[1:]
    inputs = keras.Input((height, width, channels), dtype="uint8")
    x = keras.layers.Rescaling(2.0 / data.max_value, offset=-1.0)(inputs)
    if height * width <= 256:
        x = keras.layers.Flatten()(x)
        x = keras.layers.Dense(128, activation="relu")(x)
    else:
        for filters in (16, 32) if channels == 1 else (32, 64, 64):
            x = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
            x = keras.layers.MaxPooling2D()(x)
        x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(128, activation="relu")(x)
    return keras.Model(inputs, keras.layers.Dense(data.classes)(x))


def updates_per_epoch(data: ImageData, batch_size: int) -> int:
    """Returns the number of whole batches in the training split."""
    return len(data.train_labels) // batch_size


class Trainer:
    """Trains the same model from the same initial weights, run after run.

    Args:
        strategy: The process's distribution strategy.
        data: Images and labels.
        seed: Seed of the initial weights.
    """

    def __init__(
        self, strategy: tf.distribute.MirroredStrategy, data: ImageData, seed: int
    ) -> None:
        self._strategy = strategy
        self.data = data
        keras.utils.set_random_seed(seed)
        self._initial_weights = build_model(data).get_weights()

    def run(
        self,
        run: RunSettings,
        on_batch: Callable[[int], None] | None = None,
        *,
        only_final_test: bool = False,
    ) -> RunResult:
        """Trains once.

        Args:
            run: Optimizer, batch, epochs, learning rate and seed.
            on_batch: Called after every update with the number of updates made.
            only_final_test: Whether to test after the last epoch only, which is faster.

        Returns:
            The curves of the run.
        """
        data = self.data
        per_epoch = updates_per_epoch(data, run.batch_size)
        total = per_epoch * run.epochs
        compares = run.optimizer in optimizers_of_sub_batches()
        steps = settings.micro_steps(self._strategy.num_replicas_in_sync) if compares else 1
        keras.utils.clear_session()  # Frees the last run's graphs and gives the same names again.
        keras.utils.set_random_seed(run.seed)
        warmup = round(total * run.warmup_fraction)
        decay = keras.optimizers.schedules.PolynomialDecay(
            run.learning_rate, total - warmup, end_learning_rate=0.0, power=settings.DECAY_POWER
        )
        schedule = Warmup(decay, warmup)
        with self._strategy.scope():
            model = build_model(data)
            model.set_weights(self._initial_weights)
            model.compile(
                optimizer=_factory(run.optimizer)(
                    learning_rate=schedule,
                    **_coefficient(run.optimizer, run.trust_coefficient),
                    **({"gradient_accumulation_steps": steps} if steps > 1 else {}),
                ),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
        test = _TestCurve(data, final_epoch=run.epochs if only_final_test else None)
        callbacks: list[keras.callbacks.Callback] = [keras.callbacks.TerminateOnNaN(), test]
        if on_batch is not None:
            callbacks.append(_BatchCounter(lambda batches: on_batch(batches // steps)))
        started = time.perf_counter()
        # The dataset repeats and its steps are counted: fit then keeps its iterator, which takes
        # longer to make, epoch after epoch, than a short epoch takes to run.
        history = model.fit(
            self._training_batches(run, steps),
            epochs=run.epochs,
            steps_per_epoch=per_epoch * steps,
            callbacks=callbacks,
            shuffle=False,  # The dataset shuffles.
            verbose=0,
        ).history
        return RunResult(
            settings=run,
            updates=int(model.optimizer.iterations.numpy()),
            updates_per_epoch=per_epoch,
            train_loss=_floats(history["loss"]),
            test_loss=test.loss,
            test_accuracy=test.accuracy,
            seconds=time.perf_counter() - started,
        )

    def _training_batches(self, run: RunSettings, steps: int) -> tf.data.Dataset:
        # Shuffling indices, not images, keeps the shuffle buffer small. A batch is gathered whole.
        images = tf.constant(self.data.train_images)
        labels = tf.constant(self.data.train_labels)
        count = len(self.data.train_labels)
        return without_autotuning(
            tf.data.Dataset.range(count)
            .shuffle(count, seed=run.seed, reshuffle_each_iteration=True)
            .batch(run.batch_size, drop_remainder=True)
            .unbatch()
            .batch(run.batch_size // steps, drop_remainder=True)
            .map(lambda index: (tf.gather(images, index), tf.gather(labels, index)))
            .repeat()
            .prefetch(2)
        )


class _TestCurve(keras.callbacks.Callback):
    """Tests after epochs, on one device with the first replica's weights.

    All replicas hold the same weights. The validation of ``fit`` would make a distributed
    iterator after every epoch, which takes longer than an epoch on the digits.
    """

    def __init__(self, data: ImageData, final_epoch: int | None) -> None:
        super().__init__()
        self.loss: list[float] = []
        self.accuracy: list[float] = []
        self._images = data.test_images
        self._labels = data.test_labels
        self._final_epoch = final_epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        # A run that diverges stops before its final epoch; it is tested where it stops.
        if self._final_epoch not in (None, epoch + 1) and not self.model.stop_training:
            return
        logits = np.concatenate(
            [self._logits(start) for start in range(0, len(self._images), _TEST_BATCH)]
        )
        loss = keras.losses.sparse_categorical_crossentropy(self._labels, logits, from_logits=True)
        self.loss.append(float(np.mean(loss)))
        self.accuracy.append(float(np.mean(logits.argmax(axis=-1) == self._labels)))

    def _logits(self, start: int) -> np.ndarray:
        images = self._images[start : start + _TEST_BATCH]
        return keras.ops.convert_to_numpy(self.model(images, training=False))


class _BatchCounter(keras.callbacks.Callback):
    def __init__(self, on_batch: Callable[[int], None]) -> None:
        super().__init__()
        self._on_batch = on_batch
        self._count = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._count += 1
        self._on_batch(self._count)


def _factory(name: str) -> Callable[..., keras.optimizers.Optimizer]:
    if name in _STOCK_OPTIMIZERS:
        return _STOCK_OPTIMIZERS[name]
    return {row.name: row.cls for row in tf_lbopt.list_optimizers()}[name]


def _coefficient(name: str, value: float | None) -> dict[str, float]:
    """The argument for the coefficient of the trust ratio, where there is one."""
    parameters = inspect.signature(_factory(name)).parameters
    argument = next((name for name in ("trust_coefficient", "eta") if name in parameters), None)
    # ExtrapSGD has a trust ratio only if it is asked for.
    if value is None or argument is None or parameters[argument].default is None:
        return {}
    return {argument: value}


def _floats(values: list) -> list[float]:
    return [float(np.asarray(value)) for value in values]
