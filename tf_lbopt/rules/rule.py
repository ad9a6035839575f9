"""What a rule is: an optimizer's arithmetic on one replica, without a word about distribution."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.gsnr import SubBatchStatistics
from tf_lbopt.rules.norms import Gradient, norms, widest
from tf_lbopt.rules.writer import Writer

VARIANCE = "variance"
"""The statistic that `Parameters.statistics` gives."""

MEAN_NORM = "mean_norm"
"""The statistic that `Parameters.mean_norms` gives."""

MEAN_SQUARED_NORM = "mean_squared_norm"
"""The statistic that gives an optimizer the squared norms of sub-batches' gradients."""

OWN_GRADIENT = "own_gradient"
"""The statistic that gives a replica its own gradients beside their mean."""


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The trainable variables of one update, as a rule sees them on one replica.

    Every list has an entry, every vector an element for each variable. Vectors are of the widest
    dtype that arithmetic on the variables is done in.

    Attributes:
        indices: The numbers of the variables, as the optimizer counts them.
        variables: The weights; a rule writes the new ones into them.
        gradients: The mean gradients over the global batch, clipped, each of the compute dtype of
            its variable; dense, or ``tf.IndexedSlices`` without repeated indices.
        gradient_norms: [n], their norms, or ``None`` where nobody has computed them.
        norm_bounds: [n], what their norms do not exceed; of a gradient that has been weighted
            element by element, the norm before that.
        slots: The rule's state, by slot name.
        decayed: Whether weight decay applies.
        adapted: Whether layer-wise adaptation (a trust ratio) applies.
        statistics: What the gradients were over the sub-batches, before any clipping; ``None`` if
            the rule does not declare `VARIANCE`.
        norms_of_adapted: The norms of the weights of adapted variables, of these alone, or ``None``
            where nobody has computed them.
        with_decay: `decayed_gradients` of these gradients, and the norms of those that decay, of
            these alone; or ``None``, likewise.
        mean_norms: [n], N, the mean over the sub-batches (or over the examples) of the norms of
            their unclipped gradients; ``None`` if the rule does not declare `MEAN_NORM`.
    """

    indices: Sequence[int]
    variables: Sequence[tf.Variable]
    gradients: Sequence[Gradient]
    gradient_norms: tf.Tensor | None
    norm_bounds: tf.Tensor
    slots: Mapping[str, Sequence[tf.Variable]]
    decayed: Sequence[bool]
    adapted: Sequence[bool]
    statistics: SubBatchStatistics | None = None
    norms_of_adapted: tf.Tensor | None = None
    with_decay: tuple[list[Gradient], tf.Tensor] | None = None
    mean_norms: tf.Tensor | None = None

    @functools.cached_property
    def dtypes(self) -> list[tf.DType]:
        """The dtypes that arithmetic on the variables is done in."""
        return [gradient.dtype for gradient in self.gradients]

    @functools.cached_property
    def dtype(self) -> tf.DType:
        """The widest of them."""
        return widest(self.dtypes)

    def constants(self, value: float) -> dict[tf.DType, tf.Tensor]:
        """A number, as one tensor for each of the dtypes."""
        return {dtype: tf.constant(value, dtype) for dtype in dict.fromkeys(self.dtypes)}

    def split(self, numbers: tf.Tensor) -> list[tf.Tensor]:
        """One scalar for each variable, in its dtype, of a vector or of a scalar for all."""
        if numbers.shape.rank == 0:
            shared = {dtype: tf.cast(numbers, dtype) for dtype in dict.fromkeys(self.dtypes)}
            return [shared[dtype] for dtype in self.dtypes]
        scalars = tf.unstack(numbers, num=len(self.dtypes))
        return [tf.cast(s, dtype) for s, dtype in zip(scalars, self.dtypes, strict=True)]

    def weights(self) -> list[tf.Tensor]:
        """The current weights, in the compute dtypes."""
        return [tf.cast(v, dtype) for v, dtype in zip(self.variables, self.dtypes, strict=True)]

    def norms_of(self, chosen: Sequence[bool], *lists: Sequence[Gradient]) -> list[tf.Tensor]:
        """For each list [n], the norms of those that are chosen, 0 for the others."""
        if len(lists) > 1 and _compat.in_xla_context():  # without conditions, nothing to share
            return [self.norms_of(chosen, tensors)[0] for tensors in lists]
        found = norms([t for of in lists for t, wanted in zip(of, chosen, strict=True) if wanted])
        found = tf.cast(found, self.dtype)  # that of all, of which these may be few
        parts = [found] if len(lists) == 1 else tf.split(found, len(lists))
        return [part if all(chosen) else _scattered(part, chosen) for part in parts]

    def weight_norms(self) -> tf.Tensor:
        """[n], the norms of the weights of adapted variables, 0 for the others."""
        known = self.norms_of_adapted
        if known is None:
            return self.norms_of(self.adapted, self.variables)[0]
        return known if all(self.adapted) else _scattered(known, self.adapted)

    def own_norms(self) -> tf.Tensor:
        """[n], the norms of the gradients."""
        return norms(self.gradients) if self.gradient_norms is None else self.gradient_norms

    def norms_with_decay(self, decayed: Sequence[Gradient]) -> tf.Tensor:
        """[n], the norms of `decayed_gradients`; those that do not decay are known, or may be."""
        if self.gradient_norms is None:
            return norms(decayed)
        if self.with_decay is None:
            (found,) = self.norms_of(self.decayed, decayed)
        else:
            _, known = self.with_decay
            found = known if all(self.decayed) else _scattered(known, self.decayed)
        return tf.where(self.decayed, found, self.gradient_norms)


@dataclasses.dataclass(frozen=True)
class Step:
    """What is common to all variables of one update.

    Attributes:
        learning_rate: η, a float scalar.
        index: t, how many updates were made before this one; an integer scalar.
    """

    learning_rate: tf.Tensor
    index: tf.Tensor

    def numbers(self, parameters: Parameters) -> dict[tf.DType, tf.Tensor]:
        """The number of this update, from 1, in each of the dtypes."""
        return {dtype: tf.cast(self.index + 1, dtype) for dtype in dict.fromkeys(parameters.dtypes)}

    def rates(self, ratios: tf.Tensor) -> tf.Tensor:
        """[n], η times the trust ratios."""
        rates = tf.cast(self.learning_rate, ratios.dtype) * ratios
        return tf.minimum(rates, rates.dtype.max)  # ∞ · 0 is NaN


@dataclasses.dataclass(frozen=True)
class Update:
    """An update that a rule can make, of which nothing is written yet.

    Attributes:
        sound: Whether norms, rates and ratios are such that all that it writes is finite; a boolean
            scalar.
        write: Writes new weights and slots by a `Writer`.
    """

    sound: tf.Tensor
    write: Callable[[Writer], None]


class Rule(abc.ABC):
    """An algorithm: hyper-parameters, the slots it keeps and the statistics it needs."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the variables that it keeps for each trainable variable."""

    statistics: ClassVar[tuple[str, ...]] = ()
    """What it must know of the sub-batches beyond their mean gradient."""

    @abc.abstractmethod
    def update(self, parameters: Parameters, step: Step) -> Update:
        """Computes one update, up to what is decided from norms."""

    @property
    def separable(self) -> bool:
        """Whether an update of all variables may be made in several parts, in any order."""
        return True

    @property
    def takes_weight_norms(self) -> bool:
        """Whether it asks for `Parameters.weight_norms`, which then come with the gradients'."""
        return False

    @property
    def takes_norms_with_decay(self) -> bool:
        """Whether it asks for `Parameters.norms_with_decay` of the gradients that it is given."""
        return False

    def slot_names(self) -> tuple[str, ...]:
        """The slots that it keeps with its hyper-parameters: no momentum where that is 0."""
        return () if getattr(self, "momentum", None) == 0.0 else self.slots


def _scattered(numbers: tf.Tensor, chosen: Sequence[bool]) -> tf.Tensor:
    return tf.scatter_nd(np.flatnonzero(chosen)[:, None], numbers, [len(chosen)])


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


def decayed_gradients(parameters: Parameters, weight_decay: float | None) -> list[Gradient]:
    """``g + λ w``, dense, for every variable that decays; for the others ``g`` as it is."""
    if not weight_decay:
        return list(parameters.gradients)
    if parameters.with_decay is not None:
        return parameters.with_decay[0]
    return add_decay(parameters.gradients, parameters.variables, parameters.decayed, weight_decay)


def add_decay(
    gradients: Sequence[Gradient],
    variables: Sequence[tf.Variable],
    decayed: Sequence[bool],
    weight_decay: float,
) -> list[Gradient]:
    """`decayed_gradients` of gradients in the dtypes of the arithmetic."""
    decay = {dtype: tf.constant(weight_decay, dtype) for dtype in {g.dtype for g in gradients}}
    return [
        dense(g) + decay[g.dtype] * tf.cast(variable, g.dtype) if decays else g
        for g, variable, decays in zip(gradients, variables, decayed, strict=True)
    ]
