"""The gradient of a batch and the norms of its examples' gradients, from one backward pass."""

import contextlib
import logging
import threading
from collections.abc import Sequence

import keras
import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.aggregation.sparse import added
from tf_lbopt.per_example.axes import find_rows
from tf_lbopt.per_example.backward import Backward
from tf_lbopt.per_example.recording import Recording
from tf_lbopt.rules.norms import Gradient

_logger = logging.getLogger("tf_lbopt.per_example")
_logged: set[str] = set()
_logging = threading.Lock()


class PerExampleTape:
    """A gradient tape that also gives the norm of every example's gradient.

    For use in a custom ``train_step``. The losses must be computed within the context, on Keras
    layers, each example's loss from its own row of the inputs; the batch is the first axis of all
    that the layers pass on. In the context, the layers of this thread read copies of ``variables``;
    it may be entered in every replica's thread.

    Args:
        variables: Trainable Keras variables.
        subset_size: Norms of only so many examples, from the first; `None` means of all.

    Raises:
        TypeError: ``variables`` holds something else, or ``subset_size`` is no integer.
        ValueError: ``subset_size`` is below 1.

    Example:
        >>> import tensorflow as tf
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, use_bias=False)])
        >>> x = tf.constant([[3.0, 4.0], [0.0, 2.0]])
        >>> with PerExampleTape(model.trainable_variables) as tape:
        ...     losses = 0.5 * model(x, training=True)[:, 0]
        >>> gradients, norms = tape.gradient(losses)
        >>> gradients[0].numpy().tolist(), norms[0].numpy().tolist()
        ([[1.5], [3.0]], [2.5, 1.0])
    """

    def __init__(self, variables: Sequence[keras.Variable], subset_size: int | None = None):
        self._variables = list(variables)
        for variable in self._variables:
            if not isinstance(variable, keras.Variable):
                raise TypeError(
                    "`variables` must be Keras variables. "
                    f"Received an entry of type {type(variable).__name__}: "
                    f"{_validation.shown(variable)}"
                )
        self._subset = _validation.integer("subset_size", subset_size, low=1, optional=True)
        self._recording: Recording | None = None
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> "PerExampleTape":
        if self._recording is not None:
            raise RuntimeError("A PerExampleTape can be entered once.")
        self._recording = Recording(self._variables)
        self._contexts.enter_context(self._recording.active())
        return self

    def __exit__(self, *exception: object) -> None:
        self._contexts.close()

    @tf.autograph.experimental.do_not_convert
    def gradient(
        self, losses: tf.Tensor, extra_loss: tf.Tensor | None = None
    ) -> tuple[list[Gradient | None], list[tf.Tensor]]:
        """The gradient of the batch and the norms of the examples' gradients; once per tape.

        Args:
            losses: The examples' losses, [batch], with whatever factor is wanted in both results:
                a loss scale, or 1 / batch for the gradient of the mean.
            extra_loss: A scalar that is no sum over examples (regularizers, ``add_loss``): its
                gradient is added to the gradients and left out of the norms.

        Returns:
            For every variable, in the order given, the gradient of ``sum(losses) + extra_loss``
            (dense, ``tf.IndexedSlices`` where lookups have them, or `None` if there is none), and
            the Euclidean norms of the gradients of ``losses[i]``, [batch] or [subset], in float32
            (float64 for such variables), 0 for a variable that the losses do not depend on.

        Raises:
            ValueError: ``losses`` is not a vector, or ``extra_loss`` no scalar.
        """
        recording = self._recording
        if recording is None:
            raise RuntimeError("The losses must be computed inside `with tape:`.")
        if not (isinstance(losses, tf.Tensor) and losses.shape.rank == 1):
            raise ValueError(
                "`losses` must be a tensor with one loss per example, [batch]. "
                f"Received: losses={_validation.shown(losses)}"
            )
        if extra_loss is not None and tf.convert_to_tensor(extra_loss).shape.rank != 0:
            raise _validation.refusal(ValueError, "extra_loss", "a scalar", extra_loss)
        if losses.shape[0] is not None:
            find_rows(recording, losses.shape[0])
        backward = Backward(self._variables, recording, losses, self._subset)
        norms = backward.norms()
        gradients = backward.gradients
        if extra_loss is not None:
            extra = backward.gradients_of(extra_loss)
            gradients = [added(pair) for pair in zip(gradients, extra, strict=True)]
        _log(backward.without_rule)
        return gradients, norms


def _log(without_rule: Sequence[str]) -> None:
    with _logging:
        new = [name for name in without_rule if name not in _logged]
        _logged.update(new)
    if new:
        _logger.warning(
            "No rule covers the per-example gradients of %s: their norms are computed one example "
            "at a time, which is exact but slower (see tf_lbopt.per_example.register_layer).",
            ", ".join(new),
        )
