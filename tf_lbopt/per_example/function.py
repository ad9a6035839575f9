"""Per-example gradient norms of a model on a batch, as a function."""

import functools
import inspect

import keras
import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.aggregation.sparse import added, divide
from tf_lbopt.per_example.losses import AnyLoss, Structure, example_losses
from tf_lbopt.per_example.tape import PerExampleTape
from tf_lbopt.rules.norms import Gradient


@tf.autograph.experimental.do_not_convert
def per_example_gradient_norms(
    model: keras.Model,
    x: Structure,
    y: Structure,
    loss: AnyLoss,
    sample_weight: Structure = None,
    training: bool = True,
    micro_batch_size: int | None = None,
    subset_size: int | None = None,
) -> tuple[list[tf.Tensor], list[Gradient | None]]:
    """The norms of the gradients of every example of a batch, and the gradient of the batch.

    With f_i the loss of example i (see below), this returns ‖∇_k f_i‖ for all examples i and
    trainable variables k, and (1/B) Σ_i ∇_k f_i, exactly and from the same backward pass: the
    ingredients of CLARS, whose N_k is the mean of the norms. Layers that have a rule, most of
    Keras's, cost little more than the gradient alone, with never more than 16 MiB (or one example)
    of per-example gradients at a time. Other layers, and variables that are read outside their
    layer, take a backward pass of the batch for each example, which is exact too, but slow
    (``micro_batch_size`` and ``subset_size`` bound it); they are named once in a warning of the
    logger ``tf_lbopt.per_example``.
    Variables that are used several times get the norm of the sum.

    What f_i is:

    - the mean over the example's positions of the unreduced loss, times its weight; not divided by
      the batch. The mean over the batch is Keras's loss for the reduction
      ``"sum_over_batch_size"``, whatever the reduction of ``loss``;
    - without weight regularizers, activity regularizers and ``add_loss``: they are neither in the
      norms nor in the gradients here (`PerExampleTape.gradient` has ``extra_loss`` for them);
    - where examples are coupled, as by batch normalization in training form, ∇f_i would also count
      what example i does to the others' normalization. The norms are then those of g_i, what
      example i contributes to the gradient of the whole batch by way of its own rows of what the
      layers that read the variable return. Σ_i g_i = B · (the gradient returned), always; without
      coupling g_i = ∇f_i. A variable that is read outside any layer, or by one whose outputs do
      not have one row per example, gets ‖∇f_i‖ in any case.

    Dropout uses the same mask for norms and gradient. As in any call with ``training=True``, the
    states of dropout and batch normalization move on; with ``micro_batch_size`` each slice is
    normalized by its own statistics.

    It works eagerly, in a ``tf.function`` (also with ``jit_compile=True``) and in a replica's
    function, where the batch is the replica's. Half-precision layers get norms in float32.

    Args:
        model: Built; Sequential, Functional or subclassed. All layers must keep the batch on the
            first axis.
        x: The model's inputs, a tensor, an array or a structure of them, with the batch first.
        y: Labels, likewise.
        loss: A Keras loss, a name or a function as in ``compile``, or any callable that takes
            ``(y, predictions)`` and returns a tensor [batch, ...]; for a model with several outputs
            such a callable.
        sample_weight: [batch], or with an axis for positions too. Defaults to `None`, all 1.
        training: Passed on to the model. Defaults to `True`.
        micro_batch_size: Examples at a time, which bounds memory; the last slice may be smaller.
            Needs a batch size that is known when a function is traced. Defaults to `None`, all.
        subset_size: Norms of only so many examples, from the first (the paper takes 512), which
            bounds their cost; the gradients are those of the whole batch. Defaults to `None`, all.

    Returns:
        ``(norms, gradients)``, each a list in the order of ``model.trainable_variables``: norms of
        shape [batch], or [subset_size] if that is less, in float32 (float64 for float64 variables);
        gradients as a tape gives them (``tf.IndexedSlices`` for embeddings, `None` where the loss
        does not depend on a variable, whose norms are 0).

    Raises:
        TypeError: ``model`` is no Keras model, or an argument has the wrong type.
        ValueError: The model is not built, sizes are out of range or differ, ``loss`` returns a
            scalar, or ``micro_batch_size`` is given while the batch size is not known.

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, use_bias=False)])
        >>> x = np.array([[3.0, 4.0], [0.0, 2.0]], "float32")
        >>> norms, gradients = per_example_gradient_norms(
        ...     model, x, np.zeros([2, 1], "float32"), lambda y, y_pred: 0.5 * y_pred
        ... )
        >>> norms[0].numpy().tolist(), gradients[0].numpy().tolist()
        ([2.5, 1.0], [[0.75], [1.5]])

    References:
        Huo, Gu, Huang 2021, "Large Batch Optimization for Deep Learning Using New Complete
        Layer-Wise Adaptive Rate Scaling" (AAAI), Algorithm 1, line 4, and equation 5.
    """
    if not isinstance(model, keras.Model):
        raise _validation.refusal(TypeError, "model", "a keras.Model, of Keras 3", model)
    if not model.built:
        raise ValueError(
            "`model` must be built, for example by calling it on a batch once. "
            f"Received: the model {model.name}, which is not built"
        )
    training = _validation.boolean("training", training)
    micro = _validation.integer("micro_batch_size", micro_batch_size, low=1, optional=True)
    subset = _validation.integer("subset_size", subset_size, low=1, optional=True)
    data = [
        keras.tree.map_structure(functools.partial(_dense, name), structure)
        for name, structure in (("x", x), ("y", y), ("sample_weight", sample_weight))
    ]
    size = _common_batch(*data)
    if micro is not None and size is None:
        raise ValueError(
            "`micro_batch_size` needs a batch size that is known when the function is traced. "
            f"Received: micro_batch_size={micro} and inputs of an unknown batch size"
        )
    count = tf.shape(keras.tree.flatten(data)[0])[0] if size is None else size
    in_float16 = _computes_in_float16(model)
    # The mean of the losses saves a pass over all weights, which divides their sum; but in float16
    # what is small already would vanish.
    weight = 1.0 if in_float16 else 1.0 / tf.cast(count, tf.float32)
    arguments = {"training": training} if _takes_training(model) else {}

    def losses_of(x: Structure, y: Structure, sample_weight: Structure) -> tf.Tensor:
        losses = example_losses(loss, y, model(x, **arguments), sample_weight)
        return losses * tf.cast(weight, losses.dtype)

    variables = model.trainable_variables
    norms: list[list[tf.Tensor]] = []
    gradients: list[Gradient | None] = [None] * len(variables)
    for start in [0] if micro is None else range(0, count, micro):
        rows = slice(start, None if micro is None else start + micro)
        left = None if subset is None else subset - start
        # In a graph nothing else would keep the slices from being run, and held, at once.
        before = [leaf for leaf in keras.tree.flatten((norms[-1:], gradients)) if leaf is not None]
        with tf.control_dependencies(before):
            own_data = keras.tree.map_structure(
                lambda leaf, rows=rows: None if leaf is None else leaf[rows], data
            )
            if left is None or left > 0:
                with PerExampleTape(variables, left) as tape:
                    losses = losses_of(*own_data)
                own, own_norms = tape.gradient(losses)
                norms.append(own_norms)
            else:
                with tf.GradientTape() as plain:
                    losses = losses_of(*own_data)
                own = plain.gradient(losses, [variable.value for variable in variables])
            gradients = [added(pair) for pair in zip(gradients, own, strict=True)]
    total = [tf.concat(own, axis=0) for own in zip(*norms, strict=True)]
    if in_float16:
        return total, [g if g is None else divide(g, tf.cast(count, g.dtype)) for g in gradients]
    return [tf.cast(count, own.dtype) * own for own in total], gradients


def _dense(name: str, leaf: object) -> tf.Tensor | None:
    if isinstance(leaf, tf.SparseTensor | tf.RaggedTensor):
        raise TypeError(
            f"`{name}` must be dense tensors or arrays (`PerExampleTape`, and `fit` of a "
            f"`PerExampleNormsModel`, take a sparse `x`). Received: a {type(leaf).__name__}"
        )
    return None if leaf is None else tf.convert_to_tensor(leaf)


def _takes_training(model: keras.Model) -> bool:
    parameters = inspect.signature(model.call).parameters.values()
    return any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters)


def _computes_in_float16(layer: keras.layers.Layer) -> bool:
    return layer.compute_dtype == "float16" or any(
        _computes_in_float16(inner) for inner in getattr(layer, "layers", ())
    )


def _common_batch(x: Structure, y: Structure, sample_weight: Structure) -> int | None:
    """The static batch size, `None` if it is known only at run time."""
    sizes: dict[str, int | None] = {}
    for name, structure in {"x": x, "y": y, "sample_weight": sample_weight}.items():
        for tensor in keras.tree.flatten(structure):
            if tensor is None:
                continue
            if not tensor.shape.rank:
                raise ValueError(
                    f"`{name}` must have the batch as its first axis. Received: a scalar"
                )
            sizes[name] = tensor.shape[0]
            if None not in sizes.values() and len(set(sizes.values())) > 1:
                listed = ", ".join(f"{key} with {value}" for key, value in sizes.items())
                raise ValueError(f"The inputs must have the same batch size. Received: {listed}")
    return sizes["x"]
