"""The optimizers of `tf_lbopt` for tf_keras (Keras 2), which tf-models-official is written in.

The classes have the names and arguments of those for Keras 3 and are made of the same algorithms;
`loss_scale_factor` is missing, as in tf_keras, and so are `PostLocalSGD`, `Accumulated`, `Adasum`,
`VarianceReduced`, `AdaScale` and `LossScaleOptimizer`. They are new-style optimizers
(`tf_keras.optimizers.Optimizer`, not `tf_keras.optimizers.legacy`), work with `compile` and `fit`,
in custom loops (those of `ExtrapSGD` and `ExtrapAdam` wrap their step in `extrapolated`), under
`tf.distribute` strategies and in a `tf_keras.mixed_precision.LossScaleOptimizer`. Schedules of
`tf_lbopt.schedules` are taken too.

Example:
    >>> import tensorflow as tf
    >>> import tf_keras
    >>> from tf_lbopt.tf_keras import VRLAMB
    >>> model = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=(3,))])
    >>> model.compile(VRLAMB(0.01, gradient_accumulation_steps=2), loss="mse")
    >>> history = model.fit(tf.ones([8, 3]), tf.ones([8, 1]), batch_size=2, verbose=0)
    >>> int(model.optimizer.iterations.numpy())
    2
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("tf_keras") is None:
    raise ImportError(
        "tf_lbopt.tf_keras needs tf_keras: pip install 'tf-lbopt[tf-keras]'. Received: none"
    )

from tf_lbopt.tf_keras.optimizers import CLASSES
from tf_lbopt.tf_keras.schedules import KerasSchedule

__all__ = ["KerasSchedule"]
__all__.extend(CLASSES)

globals().update(CLASSES)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
