"""Averaging the replicas' weights while training goes on."""

import keras

from tf_lbopt.callbacks.common import Logs


class EndPeriod(keras.callbacks.Callback):
    """Averages the replicas' weights before validation and at the end of each epoch.

    For `tf_lbopt.PostLocalSGD`, whose model variables hold the last average until a period ends:
    with this callback validation, and callbacks after it in the list that save or evaluate at the
    end of an epoch, see all local steps. Each average begins a new period. Outside of `fit`,
    `evaluate` and `predict` average first if they are given it.

    Args:
        None.

    Raises:
        ValueError: When it begins, if the model's optimizer is no `tf_lbopt.PostLocalSGD`.

    Example:
        >>> import tf_lbopt
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> optimizer = tf_lbopt.PostLocalSGD(keras.optimizers.SGD(0.1), start=10, period=8)
        >>> model.compile(optimizer=optimizer, loss="mse")
        >>> x, y = keras.ops.ones([4, 2]), keras.ops.ones([4, 1])
        >>> callbacks = [EndPeriod(), keras.callbacks.EarlyStopping()]  # in this order
        >>> history = model.fit(x, y, validation_data=(x, y), callbacks=callbacks, verbose=0)
        >>> sorted(history.history)
        ['loss', 'val_loss']
    """

    def set_model(self, model: keras.Model) -> None:
        """Called by Keras when it begins."""
        super().set_model(model)
        if not hasattr(model.optimizer, "end_period"):
            raise ValueError(
                "EndPeriod needs a model whose optimizer is a tf_lbopt.PostLocalSGD. "
                f"Received: {type(model.optimizer).__name__}"
            )

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Averages."""
        self.model.optimizer.end_period()

    def on_test_begin(self, logs: Logs = None) -> None:
        """Averages."""
        self.model.optimizer.end_period()

    on_predict_begin = on_test_begin
