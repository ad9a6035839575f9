"""The model whose training step computes the norms that CLARS asks for."""

import contextlib
import functools
from collections.abc import Mapping

import keras
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.optimizers.clars import CLARS
from tf_lbopt.per_example.losses import Structure, example_losses
from tf_lbopt.per_example.tape import PerExampleTape
from tf_lbopt.rules.clip import scale

# What the mean of the examples' losses and Keras's own loss may differ by.
_TOLERANCE = 1e-2

# In configurations; no argument of a constructor has this name.
_KEY = "tf_lbopt>norms_subset_size"


@keras.saving.register_keras_serializable(package="tf_lbopt")
class PerExampleNormsModel(keras.Model):
    """A Keras model whose `fit` feeds `tf_lbopt.CLARS(norm_estimator="per_example")`.

    With it `tf_lbopt.callbacks.GradientNoiseScale` measures from single examples, too.

    Use it wherever `keras.Model` stands: as the base of a subclassed model, called with inputs and
    outputs for a functional one, or beside Sequential:

        model = tf_lbopt.PerExampleNormsModel(inputs, outputs)
        class Net(tf_lbopt.PerExampleNormsModel): ...
        class Stack(tf_lbopt.PerExampleNormsModel, keras.Sequential): ...

    Its training step takes the norms from the same backward pass as the gradients, on each replica
    for the replica's own examples, and under accumulation for each micro-step's; see
    `tf_lbopt.per_example_gradient_norms` for what they are and what they cost. With any other
    optimizer it is Keras's own step.

    f_i, example i's loss, is defined so that the mean over the batch is the compiled loss;
    regularizers and `add_loss` are part of the gradients and not of the norms. Losses with other
    reductions than a mean or a sum, and overridden `compute_loss` methods, need `example_losses`
    to be overridden.

    A file of it needs this package to be loaded. One for inference without it has, of a functional
    or Sequential model, the plain model with the same layers; a subclassed one is exported:

        keras.Model(model.inputs, model.outputs).save("plain.keras")
        model.export("folder")       # loaded = tf.saved_model.load("folder"); loaded.serve(x)

    Args:
        *args: As for the class it stands for.
        **kwargs: Likewise.

    Attributes:
        norms_subset_size: Norms of only so many examples of each replica's batch, from the first
            (the paper takes 512 of the global batch); ``None``, the default, means of all. Saved
            with the model.

    Raises:
        TypeError, ValueError: `norms_subset_size` is set to neither an integer ≥ 1 nor ``None``.
        ValueError: In training: the losses of the examples can not be told from what was compiled.
        tf.errors.InvalidArgumentError: Likewise: their mean is not the loss that is trained.
            Compiled by XLA, which makes no assertions, the step discards the update, and the loss
            that `fit` shows is infinite.

    Example:
        >>> import tf_lbopt
        >>> inputs = keras.Input([3])
        >>> model = PerExampleNormsModel(inputs, keras.layers.Dense(1)(inputs))
        >>> optimizer = tf_lbopt.CLARS(0.1, norm_estimator="per_example")
        >>> model.compile(optimizer=optimizer, loss="mse")
        >>> history = model.fit(tf.ones([8, 3]), tf.ones([8, 1]), batch_size=4, verbose=0)
        >>> int(model.optimizer.iterations.numpy())
        2

    References:
        Huo, Gu, Huang 2021, "Large Batch Optimization for Deep Learning Using New Complete
        Layer-Wise Adaptive Rate Scaling" (AAAI), Algorithm 1, line 4.
    """

    _norms_subset_size: int | None = None

    def __init__(self, *args: object, **kwargs: object):
        # Left to itself, Keras makes a functional model out of one of a class by changing the bases
        # of that class, and of those above it: no model could be subclassed from them afterwards.
        if _has_symbolic_ends(*args, **kwargs) and not isinstance(self, _compat.Functional):
            self.__class__ = _functional(type(self))  # type: ignore[arg-type]  # hashable it is
        super().__init__(*args, **kwargs)

    @property
    def norms_subset_size(self) -> int | None:
        """Of how many examples norms are taken, or ``None`` for all."""
        return self._norms_subset_size

    @norms_subset_size.setter
    def norms_subset_size(self, size: int | None) -> None:
        size = _validation.integer("norms_subset_size", size, low=1, optional=True)
        self._norms_subset_size = size
        # Of a functional model `keras.models.clone_model` hands on nothing but the class.
        base = vars(type(self)).get("_without_graph")
        if base is not None:
            self.__class__ = _functional(base, size)

    # Marked as Keras marks its own: it would take this for a subclass's, and ask for nothing more.
    @functools.wraps(keras.Model.get_config, assigned=())
    def get_config(self) -> dict[str, object]:
        """The configuration as Keras makes it, with `norms_subset_size` if there is one."""
        config = super().get_config()
        size = self.norms_subset_size
        return config if size is None else {**config, _KEY: size}

    @classmethod
    def from_config(
        cls, config: dict[str, object], custom_objects: Mapping[str, object] | None = None
    ) -> "PerExampleNormsModel":
        """The model of a configuration that `get_config` returned.

        Args:
            config: The configuration.
            custom_objects: As for `keras.Model.from_config`.

        Returns:
            A model with new weights.
        """
        config = dict(config)
        size = config.pop(_KEY, None)
        model = super().from_config(config, custom_objects)
        if size is not None:
            model.norms_subset_size = size
        return model

    def example_losses(
        self, x: Structure, y: Structure, y_pred: Structure, sample_weight: Structure = None
    ) -> tf.Tensor:
        """f_i, the loss of every example, whose mean over the batch is the loss that is trained.

        Args:
            x: Inputs.
            y: Labels.
            y_pred: Predictions.
            sample_weight: Weights of the examples, or ``None``.

        Returns:
            [batch], without regularizers and `add_loss`.

        Raises:
            ValueError: The model was compiled without a loss, or with one whose reduction is
                neither a mean nor a sum.
        """
        del x
        losses = _compat.compiled_loss(self, y, y_pred, sample_weight, _with_reduction)
        if losses is None:
            raise ValueError(
                "PerExampleNormsModel needs a `loss` in `compile` to know the losses of the "
                "examples, which `add_loss` does not tell; override `example_losses` and "
                f"`compute_loss` to do without. Received: loss={_validation.shown(self.loss)}"
            )
        return losses

    def train_step(self, data: Structure) -> dict[str, tf.Tensor]:
        """One training step, with norms if the optimizer asks for them."""
        optimizer = self.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        for_clars = isinstance(optimizer, CLARS) and optimizer.norm_estimator == "per_example"
        for_noise = getattr(optimizer, "wants_norms_of_examples", False)
        if not (for_clars or for_noise):
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        _compat.build_by_shapes(self, x)
        variables = self.trainable_variables
        replicas = self.distribute_strategy.num_replicas_in_sync
        with PerExampleTape(variables, self.norms_subset_size) as tape:
            y_pred = _compat.call_in_training(self, x)
            losses = self.example_losses(x, y, y_pred, sample_weight)
            extra = tf.zeros([])
            if for_noise and self.losses:
                raise ValueError(
                    "GradientNoiseScale compares the gradients of single examples with their mean, "
                    "which must have nothing else in it: use no regularizers and no `add_loss`, or "
                    "a plain `keras.Model` and sub-batches. Received: a PerExampleNormsModel with "
                    f"{len(self.losses)} such losses"
                )
            for own in self.losses:
                extra += tf.cast(tf.reduce_sum(own), tf.float32)
            # Each replica's gradients are those of its share of the loss.
            share = tf.math.reciprocal_no_nan(tf.cast(replicas * tf.size(losses), losses.dtype))
            scaled_losses = self.optimizer.scale_loss(losses * share)
            scaled_extra = self.optimizer.scale_loss(extra / replicas)
        gradients, norms = tape.gradient(scaled_losses, scaled_extra)
        loss = _compat.trained_loss(self, x, y, y_pred, sample_weight)
        factor = _check_mean(loss, tf.reduce_mean(losses) + tf.cast(extra, losses.dtype))
        if factor is not None:
            loss *= tf.cast(factor, loss.dtype)
            gradients = [g if g is None else scale(g, tf.cast(factor, g.dtype)) for g in gradients]
        _compat.track_loss(self, x, loss)
        unscale = tf.math.reciprocal_no_nan(self.optimizer.scale_loss(tf.cast(share, tf.float32)))
        norms = [norm * tf.cast(unscale, norm.dtype) for norm in norms]
        with contextlib.ExitStack() as stack:
            if for_clars:
                stack.enter_context(optimizer.example_norms(norms, variables))
            if for_noise:
                stack.enter_context(optimizer.norms_of_examples(norms, variables))
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _has_symbolic_ends(
    *args: object, inputs: object = None, outputs: object = None, **_: object
) -> bool:
    ends = [end for end in (*args, inputs, outputs) if end is not None]
    symbolic = map(keras.utils.is_keras_tensor, keras.tree.flatten(ends))
    return len(ends) >= 2 and any(symbolic)


@functools.cache
def _functional(cls: type, norms_subset_size: int | None = None) -> type:
    attributes = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_without_graph": cls,
        "_norms_subset_size": norms_subset_size,
    }
    functional = type(cls.__name__, (cls, _compat.Functional), attributes)
    package, separator, name = keras.saving.get_registered_name(cls).partition(">")
    if separator:
        # The last one that is registered is the one that files are loaded as.
        loaded = functional if norms_subset_size is None else _functional(cls)
        for registered in (functional, loaded):
            keras.saving.register_keras_serializable(package=package, name=name)(registered)
    return functional


def _with_reduction(
    loss: keras.losses.Loss, y: Structure, y_pred: Structure, sample_weight: Structure
) -> tf.Tensor:
    reduction = loss.reduction
    if reduction in ("sum_over_batch_size", "mean"):
        return example_losses(loss, y, y_pred, sample_weight)
    if reduction == "sum":
        values = _compat.unreduced_loss(loss, y, y_pred, sample_weight, reduction)
        sums = tf.reduce_sum(values, axis=list(range(1, values.shape.rank)))
        # The mean over the batch is taken of it, and over the replicas, as of the others.
        examples = tf.shape(values)[0]
        if _compat.fit_divides_by_replicas():
            examples *= tf.distribute.get_strategy().num_replicas_in_sync
        return sums * tf.cast(examples, sums.dtype)
    raise ValueError(
        "PerExampleNormsModel knows the losses of the examples for the reductions "
        "'sum_over_batch_size', 'mean' and 'sum'; override `example_losses` for others. "
        f"Received: a loss with reduction={reduction!r}"
    )


def _check_mean(loss: tf.Tensor, mean: tf.Tensor) -> tf.Tensor | None:
    """`assert_or_discard` that the norms are of no other loss than the one that is trained."""
    loss, mean = tf.cast(loss, tf.float32), tf.cast(mean, tf.float32)
    near = tf.abs(loss - mean) <= _TOLERANCE * (tf.abs(loss) + tf.abs(mean)) + 1e-6
    return _compat.assert_or_discard(
        near | ~tf.math.is_finite(loss) | ~tf.math.is_finite(mean),
        [
            "PerExampleNormsModel: the mean of `example_losses` must be the loss that is compiled "
            "(without regularizers); override `example_losses` if `compute_loss` is overridden. "
            "Received the loss and that mean:",
            loss,
            mean,
        ],
    )
