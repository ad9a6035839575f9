"""What a rule is: an optimizer's arithmetic on one replica, without a word about distribution."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import tensorflow as tf

from tf_lbopt.rules.gsnr import SubBatchMoments
from tf_lbopt.rules.norms import Gradient, compute_dtype, norms
from tf_lbopt.rules.sharing import scalars

VARIANCE = "variance"
"""The statistic that `Layer.moments` gives."""

MEAN_NORM = "mean_norm"
"""The statistic that `Layer.mean_norm` gives."""

OWN_GRADIENT = "own_gradient"
"""The statistic that gives a replica its own gradients beside their mean."""


@dataclasses.dataclass
class Layer:
    """One trainable variable, as a rule sees it on one replica.

    Attributes:
        index: The number of the variable, as the optimizer counts them.
        variable: The weights; a rule writes the new ones into it.
        gradient: The mean gradient over the global batch, finite, clipped, of the compute dtype;
            dense, or ``tf.IndexedSlices`` without repeated indices.
        gradient_norm: Its Euclidean norm, or ``None`` where nobody has computed it.
        norm_bound: What its norm does not exceed; where the gradient has been weighted element by
            element, the norm before that.
        slots: The rule's state for this variable, by slot name.
        decayed: Whether weight decay applies.
        adapted: Whether layer-wise adaptation (a trust ratio) applies.
        moments: What the gradients were over the sub-batches, before any clipping; ``None`` if the
            rule does not declare the statistic `VARIANCE`.
        mean_norm: N, the mean over the sub-batches (or over the examples) of the norms of their
            unclipped gradients, a scalar of the compute dtype; ``None`` if the rule does not
            declare the statistic `MEAN_NORM`.
    """

    index: int
    variable: tf.Variable
    gradient: Gradient
    gradient_norm: tf.Tensor | None
    norm_bound: tf.Tensor
    slots: Mapping[str, tf.Variable]
    decayed: bool = True
    adapted: bool = True
    moments: SubBatchMoments | None = None
    mean_norm: tf.Tensor | None = None

    @property
    def dtype(self) -> tf.DType:
        """The dtype that arithmetic on this layer is done in."""
        return compute_dtype(self.variable.dtype)

    def weights(self) -> tf.Tensor:
        """The current weights, in the compute dtype."""
        return tf.cast(self.variable, self.dtype)


@dataclasses.dataclass(frozen=True)
class Step:
    """What is common to all layers of one update.

    Attributes:
        learning_rate: η, a float scalar.
        index: t, how many updates were made before this one; an integer scalar.
    """

    learning_rate: tf.Tensor
    index: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Update:
    """An update that a rule can make, of which nothing is written yet.

    Attributes:
        sound: Whether norms, rates and ratios are such that all that it writes is finite; a boolean
            scalar.
        write: Writes new weights and slots. Returns booleans, where single elements can still
            overflow: whether all were written, or some have kept their old value.
    """

    sound: tf.Tensor
    write: Callable[[], list[tf.Tensor]]


class Rule(abc.ABC):
    """An algorithm: hyper-parameters, the slots it keeps and the statistics it needs."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the variables that it keeps for each trainable variable."""

    statistics: ClassVar[tuple[str, ...]] = ()
    """What it must know of the sub-batches beyond their mean gradient."""

    @abc.abstractmethod
    def update(self, layers: Sequence[Layer], step: Step) -> Update:
        """Computes one update, up to what is decided from norms."""


def dense(gradient: Gradient) -> tf.Tensor:
    """The gradient as a dense tensor.

    Momentum and moments decay on every row of an embedding, looked up or not, so rules that keep
    them read and write the whole table, as Keras's do.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.scatter_nd(
        tf.expand_dims(gradient.indices, 1),
        gradient.values,
        tf.cast(gradient.dense_shape, gradient.indices.dtype),
    )


def decayed_gradients(layers: Sequence[Layer], weight_decay: float | None) -> list[Gradient]:
    """``g + λ w``, dense, for every layer that decays; for the others ``g`` as it is."""
    if not weight_decay:
        return [layer.gradient for layer in layers]
    decay = scalars(layers, weight_decay)
    return [
        dense(layer.gradient) + decay[layer.dtype] * layer.weights()
        if layer.decayed
        else layer.gradient
        for layer in layers
    ]


def coupled_weight_decay(
    layers: Sequence[Layer], weight_decay: float | None, also: Sequence[Gradient] = ()
) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
    """``g + λ w`` for every layer that decays (else ``g``), with its norm.

    Args:
        layers: The layers.
        weight_decay: λ, or ``None``.
        also: Tensors whose norms are wanted too; norms are computed in one go.

    Returns:
        The dense gradients, their norms, and the norms of ``also``.
    """
    gradients = [dense(gradient) for gradient in decayed_gradients(layers, weight_decay)]
    gradient_norms = [
        None if weight_decay and layer.decayed else layer.gradient_norm for layer in layers
    ]
    missing = [index for index, norm in enumerate(gradient_norms) if norm is None]
    found = norms([*(gradients[index] for index in missing), *also])
    for index, norm in zip(missing, found[: len(missing)], strict=True):
        gradient_norms[index] = norm
    return gradients, gradient_norms, found[len(missing) :]
