"""The tf_keras classes: each an algorithm with the adapter of this package."""

import tensorflow as tf  # noqa: F401  # for the examples
import tf_keras

from tf_lbopt.optimizers.clars import CLARSAlgorithm
from tf_lbopt.optimizers.extrap_sgd import ExtrapSGDAlgorithm
from tf_lbopt.optimizers.lamb import LAMBAlgorithm
from tf_lbopt.optimizers.lars import LARSAlgorithm
from tf_lbopt.optimizers.sngm import SNGMAlgorithm
from tf_lbopt.optimizers.vr_adam import VRAdamAlgorithm
from tf_lbopt.optimizers.vr_layerwise import VRLAMBAlgorithm, VRLARSAlgorithm
from tf_lbopt.optimizers.vr_sgd import VRMomentumAlgorithm, VRSGDAlgorithm
from tf_lbopt.tf_keras.base import LargeBatchOptimizer, with_common_arguments
from tf_lbopt.tf_keras.extrapolated import ExtrapolatedOptimizer


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class SNGM(SNGMAlgorithm, LargeBatchOptimizer):
    """SNGM for tf_keras.

    Example:
        >>> w = tf.Variable([3.0, 4.0])
        >>> optimizer = SNGM(learning_rate=0.5, momentum=0.9)
        >>> _ = optimizer.apply_gradients([(tf.constant([30.0, 40.0]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.7, 3.6]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class LARS(LARSAlgorithm, LargeBatchOptimizer):
    """LARS for tf_keras.

    Example:
        >>> w = tf.Variable([3.0, 4.0])
        >>> optimizer = LARS(learning_rate=1.0, trust_coefficient=0.1)
        >>> _ = optimizer.apply_gradients([(tf.constant([0.6, 0.8]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.7, 3.6]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class LAMB(LAMBAlgorithm, LargeBatchOptimizer):
    """LAMB for tf_keras.

    Example:
        >>> w = tf.Variable([3.0, 4.0])
        >>> optimizer = LAMB(learning_rate=0.1)
        >>> _ = optimizer.apply_gradients([(tf.constant([0.5, 0.5]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.6464, 3.6464]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRSGD(VRSGDAlgorithm, LargeBatchOptimizer):
    """VRSGD for tf_keras.

    Example:
        >>> w = tf.Variable([0.0, 0.0])
        >>> optimizer = VRSGD(learning_rate=1.0, gradient_accumulation_steps=2)
        >>> _ = optimizer.apply_gradients([(tf.constant([1.0, 3.0]), w)])
        >>> _ = optimizer.apply_gradients([(tf.constant([3.0, -1.0]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]     # r = 4 and 1/4, normalized 1.88 and 0.12
        [-2.0, -0.1176]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRMomentum(VRMomentumAlgorithm, LargeBatchOptimizer):
    """VRMomentum for tf_keras.

    Example:
        >>> w = tf.Variable([0.0, 0.0])
        >>> optimizer = VRMomentum(learning_rate=1.0, gradient_accumulation_steps=2)
        >>> _ = optimizer.apply_gradients([(tf.constant([1.0, 3.0]), w)])
        >>> _ = optimizer.apply_gradients([(tf.constant([3.0, -1.0]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]
        [-2.0, -0.1176]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRAdam(VRAdamAlgorithm, LargeBatchOptimizer):
    """VRAdam for tf_keras.

    Example:
        >>> w = tf.Variable([0.0, 0.0])
        >>> optimizer = VRAdam(learning_rate=0.1, gradient_accumulation_steps=2)
        >>> _ = optimizer.apply_gradients([(tf.constant([1.0, 3.0]), w)])
        >>> _ = optimizer.apply_gradients([(tf.constant([3.0, -1.0]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]
        [-0.1, -0.1]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRLARS(VRLARSAlgorithm, LARS):
    """VRLARS for tf_keras.

    Example:
        >>> w = tf.Variable([3.0, 4.0])
        >>> optimizer = VRLARS(1.0, trust_coefficient=0.1, gradient_accumulation_steps=2)
        >>> _ = optimizer.apply_gradients([(tf.constant([1.0, 3.0]), w)])
        >>> _ = optimizer.apply_gradients([(tf.constant([3.0, -1.0]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.5009, 3.9706]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class VRLAMB(VRLAMBAlgorithm, LAMB):
    """VRLAMB for tf_keras.

    Example:
        >>> w = tf.Variable([3.0, 4.0])
        >>> optimizer = VRLAMB(learning_rate=0.1, gradient_accumulation_steps=2)
        >>> _ = optimizer.apply_gradients([(tf.constant([1.0, 3.0]), w)])
        >>> _ = optimizer.apply_gradients([(tf.constant([3.0, -1.0]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]
        [2.6464, 3.6464]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class CLARS(CLARSAlgorithm, LargeBatchOptimizer):
    """CLARS for tf_keras.

    Example:
        >>> w = tf.Variable([3.0, 4.0])
        >>> optimizer = CLARS(1.0, trust_coefficient=0.1, gradient_accumulation_steps=2)
        >>> _ = optimizer.apply_gradients([(tf.constant([3.0, 4.0]), w)])
        >>> _ = optimizer.apply_gradients([(tf.constant([-3.0, 4.0]), w)])
        >>> [round(float(x), 4) for x in w.numpy()]       # ρ = 0.1 · 5 / 5, ḡ = [0, 4]
        [3.0, 3.24]
    """


@tf_keras.utils.register_keras_serializable(package="tf_lbopt")
@with_common_arguments
class ExtrapSGD(ExtrapSGDAlgorithm, ExtrapolatedOptimizer):
    """Extrapolated SGD for tf_keras.

    Example:
        >>> w = tf.Variable([1.0])
        >>> optimizer = ExtrapSGD(learning_rate=0.1, momentum=0.5, extrapolation_rate=0.2)
        >>> for _ in range(2):
        ...     with optimizer.extrapolated([w]):
        ...         point = float(w.numpy()[0])
        ...         _ = optimizer.apply_gradients([(w.read_value(), w)])  # gradient of w²/2
        ...     print(round(point, 4), round(float(w.numpy()[0]), 4))
        1.0 0.9
        0.65 0.785
    """
