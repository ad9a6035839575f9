"""Schedules of Keras 3 under optimizers of tf_keras."""

from collections.abc import Callable

import keras
import tensorflow as tf
import tf_keras
from keras.optimizers.schedules import LearningRateSchedule


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
class KerasSchedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that is no schedule of tf_keras, as one.

    The optimizers of this package make one by themselves, so that the schedules of
    `tf_lbopt.schedules` can be given to them as they are.

    Args:
        schedule: A `keras.optimizers.schedules.LearningRateSchedule` (or its serialized form), or a
            callable without arguments.

    Example:
        >>> schedule = KerasSchedule(keras.optimizers.schedules.PolynomialDecay(1.0, 4, 0.0))
        >>> [round(float(schedule(t)), 4) for t in range(3)]
        [1.0, 0.75, 0.5]
    """

    def __init__(self, schedule: LearningRateSchedule | Callable[[], float] | dict[str, object]):
        super().__init__()
        self.schedule: LearningRateSchedule | Callable[[], float] = (
            keras.saving.deserialize_keras_object(schedule)
            if isinstance(schedule, dict)
            else schedule
        )

    def __call__(self, step: int | tf.Tensor) -> tf.Tensor:
        """The learning rate of the update with this number, counted from 0."""
        if isinstance(self.schedule, LearningRateSchedule):
            return tf.convert_to_tensor(self.schedule(tf.convert_to_tensor(step)))
        return tf.convert_to_tensor(self.schedule(), tf.float32)

    def get_config(self) -> dict[str, object]:
        """The argument that makes an equal schedule."""
        return {"schedule": keras.saving.serialize_keras_object(self.schedule)}
