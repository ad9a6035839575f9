"""The losses of the examples, out of what Keras reduces to one number."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tf_lbopt import _compat, _validation

# A tensor, or nested lists, tuples and dicts of tensors.
Structure: TypeAlias = Any

# What ``compile`` takes, or a function of labels and predictions.
AnyLoss: TypeAlias = str | keras.losses.Loss | Callable[[Structure, Structure], tf.Tensor]


def example_losses(
    loss: AnyLoss, y_true: Structure, y_pred: Structure, sample_weight: Structure = None
) -> tf.Tensor:
    """The loss of every example of a batch.

    The loss of an example is the mean over its positions (all axes of the unreduced loss but the
    first) of the unreduced, weighted loss. So the mean over the batch is what Keras makes of the
    same loss with the reductions ``"sum_over_batch_size"`` and ``"mean"``, sample weights and masks
    included; the loss's own reduction is not looked at. As there, a mask of the predictions weighs
    the positions by (all positions / those that are valid), both counted over the whole batch.

    Args:
        loss: A Keras loss, or its name or a function as in ``compile``; or any callable that takes
            ``(y_true, y_pred)``, possibly nested structures, and returns a tensor [batch, ...].
        y_true: Labels.
        y_pred: Predictions.
        sample_weight: [batch], or with an axis for the positions too; `None` means 1.

    Returns:
        [batch].

    Raises:
        ValueError: ``loss`` returns something without a batch axis.

    Example:
        >>> y = tf.constant([[1.0, 2.0], [3.0, 4.0]])
        >>> example_losses("mse", y, tf.zeros_like(y), sample_weight=[1.0, 2.0]).numpy().tolist()
        [2.5, 25.0]
    """
    if isinstance(y_pred, tf.Tensor) or not callable(loss) or isinstance(loss, keras.losses.Loss):
        values = _compat.unreduced_loss(_compat.as_loss(loss), y_true, y_pred, sample_weight)
    else:
        values = tf.convert_to_tensor(loss(y_true, y_pred))
        if sample_weight is not None:
            weights = tf.cast(sample_weight, values.dtype)
            missing = values.shape.rank - weights.shape.rank
            values *= tf.reshape(weights, tf.concat([tf.shape(weights), [1] * missing], 0))
    if values.shape.rank == 0:
        raise ValueError(
            "`loss` must return one value per example, [batch, ...], not a mean or a sum. "
            f"Received: loss={_validation.shown(loss)}, which returned a scalar"
        )
    return tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))
