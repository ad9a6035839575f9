"""The Keras 3 side of extrapolated optimizers: `fit`, schedules and loss scaling."""

from collections.abc import Callable

import keras
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.optimizers.base import LargeBatchOptimizer
from tf_lbopt.optimizers.extrapolation import ExtrapolationAdapter

_TRANSPOSED = tuple(getattr(keras.layers, f"Conv{rank}DTranspose") for rank in (1, 2, 3))


class ExtrapolatedOptimizer(ExtrapolationAdapter, LargeBatchOptimizer):
    """Base of the Keras 3 optimizers whose algorithm is an `Extrapolation`."""

    steps_of_its_own = True

    def _let_wrap_training(self) -> None:
        _compat.let_optimizers_wrap_training()

    def _build_model(self, model: keras.Model, data: object) -> None:
        _compat.build_by_shapes(model, keras.utils.unpack_x_y_sample_weight(data)[0])

    def _kinds_of_filters(self, model: keras.Model) -> dict[str, str]:
        kinds = {}
        for layer in _compat.all_layers(model):
            if isinstance(layer, keras.layers.Embedding):
                kinds.update({_compat.key_of(v): "embedding" for v in layer.trainable_variables})
            elif isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
                kinds[_compat.key_of(layer.kernel)] = "depthwise"
            elif isinstance(layer, (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)):
                kinds[_compat.key_of(layer.depthwise_kernel)] = "depthwise"
            elif isinstance(layer, _TRANSPOSED):
                kinds[_compat.key_of(layer.kernel)] = "transposed"
            elif isinstance(layer, keras.layers.SpectralNormalization):
                self.refuse_layer(layer)
        return kinds

    def _serialized(self, schedule: Callable[..., tf.Tensor]) -> object:
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            return keras.saving.serialize_keras_object(schedule)
        return schedule

    def _check_foreign_loss_scaling(self) -> None:
        raise ValueError(
            f"{type(self).__name__} can not be used under Keras's LossScaleOptimizer (which "
            "`compile` adds for mixed_float16): it leaves out the update, and with it that "
            "the weights are put back. Use tf_lbopt.LossScaleOptimizer("
            f"{type(self).__name__}(...)). Received: gradients from Keras's LossScaleOptimizer"
        )
