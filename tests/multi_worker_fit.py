"""Keras's `fit` on two worker processes, and on as many replicas of one.

Called with a folder, the number of replicas of each worker, the number of the epoch in which worker
1 is to kill itself (or -1), and names of `RUNS` and `GROWING`.
"""

import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

import tf_lbopt

RUNS = {
    "keras_sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "lars": lambda: tf_lbopt.LARS(0.5),
    "vr_lamb": lambda: tf_lbopt.VRLAMB(0.05),
    "vr_lamb_accumulated": lambda: tf_lbopt.VRLAMB(0.05, gradient_accumulation_steps=3),
    "extrap_sgd": lambda: tf_lbopt.ExtrapSGD(0.1),
    "extrap_sgd_sub_batches": lambda: tf_lbopt.ExtrapSGD(
        0.1, sub_batches=2, gradient_accumulation_steps=3
    ),
}


def noise_scale_and_warmup():
    measured = tf_lbopt.callbacks.GradientNoiseScale(every=1)
    # The second decision is against, the third for a batch that grows.
    warmup = tf_lbopt.callbacks.BatchSizeWarmup(measured, 3, every=2, fraction=6.0)
    return [measured, warmup]


# An optimizer, and callbacks that have its batch grow.
GROWING = {
    "growing_by_schedule": (
        lambda: tf_lbopt.VRLAMB(0.05, gradient_accumulation_steps=1),
        lambda: [tf_lbopt.callbacks.BatchSizeSchedule({2: 2, 4: 3}, "sqrt")],
    ),
    "growing_by_noise_scale": (
        lambda: tf_lbopt.SGD(0.05, 0.9, gradient_accumulation_steps=1),
        noise_scale_and_warmup,
    ),
}
EPOCHS = 3
BATCH = 16
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None  # TensorFlow 2.21 comes without


def data():
    """72 examples: four batches, and one that is short."""
    x = np.random.default_rng(0).normal(size=(4 * BATCH + 8, 3)).astype("float32")
    return x, np.sin(x.sum(1, keepdims=True))


def model_of(strategy, make):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        layers = [
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.BatchNormalization(synchronized=True),
            keras.layers.Dense(1),
        ]
        model = keras.Sequential([keras.Input([3]), *layers])
        model.compile(make(), "mse", metrics=["mae"])
    return model


def state_of(model):
    """Weights and what the optimizer keeps."""
    variables = [*model.weights, *model.optimizer.variables]
    return {f"{index} {v.path}": np.asarray(v.value) for index, v in enumerate(variables)}


def train(strategy, make, callbacks=(), epochs=EPOCHS):
    """What comes out of `fit`, `evaluate` and `predict`."""
    model = model_of(strategy, make)
    x, y = data()
    history = model.fit(
        *(x, y, BATCH, epochs, 0, list(callbacks)),
        validation_data=(x[:24], y[:24]),
        shuffle=False,
    ).history
    return {
        **{name: np.asarray(values) for name, values in history.items()},
        "evaluated": np.asarray(model.evaluate(x, y, BATCH, verbose=0)),
        "predicted": model.predict(x[:36], BATCH, verbose=0),
        **state_of(model),
    }


class Seen(keras.callbacks.Callback):
    """Notes after every batch the number of updates, and how many micro-steps the next one has."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        self.rows.append([int(optimizer.iterations.numpy()), optimizer.accumulation_steps])


def train_growing(strategy, name):
    """What comes out of `fit`, and what was seen of the growth."""
    make, callbacks = GROWING[name]
    model, seen = model_of(strategy, make), Seen()
    callbacks = [*callbacks(), seen]
    history = model.fit(*data(), BATCH, EPOCHS, 0, callbacks, shuffle=False).history
    history = {name: np.asarray(values) for name, values in history.items()}
    return {**history, "seen": np.array(seen.rows), **state_of(model)}


def callbacks_of(folder):
    """All that write, to folders that the workers share, and one that ends early."""
    callbacks = [
        keras.callbacks.BackupAndRestore(folder / "backup"),
        keras.callbacks.ModelCheckpoint(folder / "best.keras", save_best_only=True),
        keras.callbacks.ModelCheckpoint(folder / "{epoch}.weights.h5", save_weights_only=True),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        keras.callbacks.EarlyStopping("loss", min_delta=100),  # after 2 epochs
    ]
    if TENSORBOARD:
        callbacks.append(keras.callbacks.TensorBoard(folder / "board"))
    return callbacks


class Dies(keras.callbacks.Callback):
    """Kills the process in the middle of an epoch."""

    def __init__(self, at):
        super().__init__()
        self.at = at
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == (self.at, 2):
            os.kill(os.getpid(), signal.SIGKILL)


def multi_worker_strategy(replicas):
    """With several replicas in a worker, which without GPUs TensorFlow does not make."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
    )
    CollectiveAllReduceExtended._initialize_local_devices = lambda self, resolver, worker: (
        tuple(f"{worker}/device:CPU:{index}" for index in range(replicas)),
        "CPU",
    )
    return tf.distribute.MultiWorkerMirroredStrategy()


def main(folder, replicas, killed_in, *names):
    folder = Path(folder)
    tf_lbopt.distribution.enable_multi_worker_fit()
    strategy = multi_worker_strategy(int(replicas))
    index = strategy.cluster_resolver.task_id
    tempfile.tempdir = str(folder / f"temporary-{index}")
    os.makedirs(tempfile.tempdir, exist_ok=True)
    for name in names:
        if name in GROWING:
            np.savez(folder / f"{name}-{index}.npz", **train_growing(strategy, name))
            continue
        callbacks = callbacks_of(folder / name)
        if index == 1:
            callbacks.append(Dies(int(killed_in)))
        np.savez(folder / f"{name}-{index}.npz", **train(strategy, RUNS[name], callbacks))
    model = model_of(strategy, RUNS["keras_sgd"])
    model.steps_per_execution = 2
    for method in (model.fit, model.evaluate):
        try:
            method(*data(), BATCH)
        except ValueError as error:
            print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
