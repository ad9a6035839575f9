"""A few updates of several optimizers on two replicas, each with data of its own.

The replicas are two workers where `TF_CONFIG` names them, else logical CPU devices of one process.
Called with the file for the weights and states that come out.
"""

import os
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
import tf_keras

from official_recipes.common.replicas import cpu_strategy
from tf_lbopt.tf_keras import CLARS, LARS, SNGM, VRLAMB, VRLARS, VRSGD

OPTIMIZERS = {
    "lars": lambda: LARS(0.5),
    "vr_lars": lambda: VRLARS(0.5),
    "vr_lars, accumulated": lambda: VRLARS(0.5, gradient_accumulation_steps=2),
    "clars": lambda: CLARS(0.5),
    "vr_lamb": lambda: VRLAMB(0.1),
    "vr_sgd": lambda: VRSGD(0.5),
    "sngm": lambda: SNGM(0.5),
}
STEPS = 4


def _strategy():
    if not os.environ.get("TF_CONFIG"):
        return cpu_strategy(2)
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    return tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=tf.distribute.experimental.CommunicationOptions(implementation=ring)
    )


def _train(strategy, make):
    with strategy.scope():
        tf_keras.utils.set_random_seed(7)
        model = tf_keras.Sequential(
            [
                tf_keras.layers.Embedding(10, 6, input_length=4),
                tf_keras.layers.Flatten(),
                tf_keras.layers.Dense(8, activation="tanh"),
                tf_keras.layers.Dense(3),
            ]
        )
        model.build((None, 4))
        optimizer = make()
    rng = np.random.default_rng(3)
    inputs = tf.constant(rng.integers(0, 10, (STEPS, 2, 8, 4)))
    labels = tf.constant(rng.integers(0, 3, (STEPS, 2, 8)))

    @tf.function
    def step(number):
        def on_replica():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            with tf.GradientTape() as tape:
                losses = tf_keras.losses.sparse_categorical_crossentropy(
                    labels[number, replica], model(inputs[number, replica]), from_logits=True
                )
                loss = tf.reduce_mean(losses) / 2
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        strategy.run(on_replica)

    for number in range(STEPS):
        step(tf.constant(number))
    return [v.numpy() for v in (*model.trainable_variables, *optimizer.variables)]


def main(file):
    strategy = _strategy()
    results = {name: _train(strategy, make) for name, make in OPTIMIZERS.items()}
    np.savez(
        file,
        **{
            f"{name}/{i}": value
            for name, values in results.items()
            for i, value in enumerate(values)
        },
    )


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)
