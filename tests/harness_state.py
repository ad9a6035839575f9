"""Ways to save a run's state and to set it back, of Keras and of tf_keras."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from harness import Run, assert_states_equal, sub_batch_gradients

from tf_lbopt.optimizers.trained import tensorflow_variable

# -- into a fresh run ------------------------------------------------------------------------------


def checkpoint_of(run):
    return tf.train.Checkpoint(
        variables=[tensorflow_variable(v) for v in run.variables], optimizer=run.optimizer
    )


def by_checkpoint(run, folder):
    path = checkpoint_of(run).save(str(folder / "checkpoint"))
    return lambda fresh: checkpoint_of(fresh).restore(path).assert_consumed()


def by_own_variables(run, folder):
    weights = run.weights()
    for number, optimizer in enumerate(_optimizers(run)):
        store: dict[str, Any] = {}
        optimizer.save_own_variables(store)
        np.savez(folder / f"{number}.npz", **store)

    def load(fresh):
        for variable, value in zip(fresh.variables, weights, strict=True):
            variable.assign(value)
        for number, optimizer in enumerate(_optimizers(fresh)):
            optimizer.load_own_variables(dict(np.load(folder / f"{number}.npz")))

    return load


def _optimizers(run):
    return [run.optimizer] if run.optimizer is run.inner else [run.optimizer, run.inner]


# -- back into the same run, without the weights ---------------------------------------------------


def by_set_weights(run, folder):
    # A wrapper of tf_keras can not.
    ours = isinstance(run.optimizer, keras.optimizers.Optimizer)
    optimizer = run.optimizer if ours else run.inner
    weights = [v.numpy() for v in optimizer.variables]
    return lambda: optimizer.set_weights(weights)


def by_assignment(run, folder):
    weights = [v.numpy() for v in run.optimizer.variables]

    def set_back():
        for variable, weight in zip(run.optimizer.variables, weights, strict=True):
            variable.assign(weight)

    return set_back


def by_loading(run, folder):
    store: dict[str, Any] = {}
    run.optimizer.save_own_variables(store)
    return lambda: run.optimizer.load_own_variables(store)


def by_restoring(run, folder):
    checkpoint = tf.train.Checkpoint(optimizer=run.optimizer)
    path = checkpoint.save(str(folder / "checkpoint"))
    return lambda: checkpoint.restore(path).assert_consumed()


# -- tests of both ---------------------------------------------------------------------------------


def assert_checkpoint_without_accumulation_begins(make_run: type[Run], case, folder):
    """Restored after one micro-step of two, at the same number of updates."""
    gradients = sub_batch_gradients(3, sub_batches=2)
    path = checkpoint_of(make_run(case, 1, 1).update(gradients[0])).save(str(folder / "checkpoint"))
    run, never = make_run(case, 1, 2).update(gradients[0]), make_run(case, 1, 2)
    run.micro_step([[tf.constant(g) for g in gradients[1][0]]])
    for one in (run, never):
        checkpoint_of(one).restore(path).expect_partial()
        one.update(gradients[2])
    assert_states_equal(never.state(), run.state())
