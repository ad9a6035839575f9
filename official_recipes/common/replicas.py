"""Logical CPU devices, one per replica, under a single ``MirroredStrategy``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorflow as tf

_strategy: tf.distribute.MirroredStrategy | None = None


def quiet_tensorflow() -> None:
    """Hides TensorFlow's C++ log lines and selects it as the Keras backend.

    Takes effect only before the first import of TensorFlow and Keras. Values that the user has
    set in the environment stay, except a Keras backend other than TensorFlow.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"


def cpu_strategy(replicas: int) -> tf.distribute.MirroredStrategy:
    """Returns the process's only strategy, with ``replicas`` logical CPU devices.

    Several ``MirroredStrategy`` objects over the same devices share collective keys and break
    each other, so a second call returns the same object.

    Args:
        replicas: The number of logical CPU devices.

    Returns:
        A ``MirroredStrategy`` over ``CPU:0`` to ``CPU:<replicas - 1>``.

    Raises:
        RuntimeError: TensorFlow has started with fewer logical devices, or an earlier call
            asked for another number of replicas.
    """
    global _strategy
    import tensorflow as tf

    if _strategy is not None:
        if _strategy.num_replicas_in_sync != replicas:
            raise RuntimeError(
                f"this process already trains on {_strategy.num_replicas_in_sync} CPU replicas; "
                f"expected one number of replicas per process, received {replicas}"
            )
        return _strategy
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    _strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(replicas)])
    return _strategy


def training_strategy(replicas: int, device: str = "auto") -> tf.distribute.Strategy:
    """Returns a strategy for a recipe's replicas.

    Args:
        replicas: How many.
        device: ``cpu``, or ``auto`` for GPUs where there are as many as replicas.

    Returns:
        The default strategy for a single replica, which lets Keras accumulate gradients as on any
        one device, and a ``MirroredStrategy`` for more.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if device == "auto" and len(gpus) >= replicas:
        if replicas == 1:
            return tf.distribute.get_strategy()
        return tf.distribute.MirroredStrategy([f"GPU:{index}" for index in range(replicas)])
    if replicas == 1:
        tf.config.set_visible_devices([], "GPU")
        return tf.distribute.get_strategy()
    return cpu_strategy(replicas)
