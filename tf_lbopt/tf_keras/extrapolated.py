"""The tf_keras side of extrapolated optimizers: `fit` and schedules."""

from collections.abc import Callable

import tensorflow as tf
import tf_keras

from tf_lbopt._compat import key_of
from tf_lbopt.optimizers.extrapolation import ExtrapolationAdapter
from tf_lbopt.tf_keras import _compat
from tf_lbopt.tf_keras.base import LargeBatchOptimizer

_DEPTHWISE = (tf_keras.layers.DepthwiseConv1D, tf_keras.layers.DepthwiseConv2D)
_SEPARABLE = (tf_keras.layers.SeparableConv1D, tf_keras.layers.SeparableConv2D)
_TRANSPOSED = tuple(getattr(tf_keras.layers, f"Conv{rank}DTranspose") for rank in (1, 2, 3))


class ExtrapolatedOptimizer(ExtrapolationAdapter, LargeBatchOptimizer):
    """Base of the tf_keras optimizers whose algorithm is an `Extrapolation`."""

    def _let_wrap_training(self) -> None:
        _compat.let_optimizers_wrap_training()

    def _build_model(self, model: tf_keras.Model, data: object) -> None:
        _compat.build_by_shapes(
            model, tf_keras.utils.unpack_x_y_sample_weight(data)[0], self._strategy
        )

    def _kinds_of_filters(self, model: tf_keras.Model) -> dict[str, str]:
        kinds = {}
        for layer in model.submodules:
            if isinstance(layer, tf_keras.layers.Embedding):
                kinds.update({key_of(v): "embedding" for v in layer.trainable_variables})
            elif isinstance(layer, (*_DEPTHWISE, *_SEPARABLE)) and layer.built:
                kinds[key_of(layer.depthwise_kernel)] = "depthwise"
            elif isinstance(layer, _TRANSPOSED) and layer.built:
                kinds[key_of(layer.kernel)] = "transposed"
            elif isinstance(layer, tf_keras.layers.SpectralNormalization):
                self.refuse_layer(layer)
        return kinds

    def _serialized(self, schedule: Callable[..., tf.Tensor]) -> object:
        return tf_keras.optimizers.schedules.serialize(schedule)
