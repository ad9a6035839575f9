"""The rules for Keras's own layers."""

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt.per_example.contributions import (
    Computed,
    Contribution,
    OuterProducts,
    PerExample,
    Rows,
    batch_size,
    known_size,
)
from tf_lbopt.per_example.patches import shifts, unfold
from tf_lbopt.per_example.registry import LayerCall, register_layer
from tf_lbopt.per_example.view import with_attributes
from tf_lbopt.rules.norms import compute_dtype

Contributions = list[tuple[Any, tf.Tensor | Contribution]]


@register_layer(keras.layers.Dense, activation="activation")
def dense(call: LayerCall) -> Contributions:
    """Products over all axes between the first and the last."""
    kernel = call.layer.kernel
    if not isinstance(kernel, keras.Variable):  # LoRA
        return NotImplemented
    inputs, gradient = call.inputs, call.output_gradient
    rows, columns = inputs.shape[-1], gradient.shape[-1]
    positions = inputs.shape[1:-1].num_elements()

    def factors(*tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        left, right = tensors
        batch = batch_size(left)
        return tf.reshape(left, [batch, 1, -1, rows]), tf.reshape(right, [batch, 1, -1, columns])

    product = OuterProducts(
        (inputs, gradient),
        factors,
        lambda products: products[:, 0],
        groups=1,
        positions=positions,
        rows=rows,
        columns=columns,
    )
    return [(kernel, product), *_bias(call)]


@register_layer(keras.layers.EinsumDense, activation="activation")
def einsum_dense(call: LayerCall) -> Contributions:
    """Products over the axes that the kernel does not have."""
    kernel = call.layer.kernel
    inputs, gradient = call.inputs, call.output_gradient
    labels = _einsum_labels(call.layer.equation, inputs.shape.rank)
    if labels is None or not isinstance(kernel, keras.Variable):
        return NotImplemented
    of_input, of_kernel, of_output = labels
    batch = of_input[0]
    in_kernel, in_input, in_output = set(of_kernel), set(of_input), set(of_output)
    unusual = (
        any(len(set(axes)) < len(axes) for axes in labels)
        or of_output[0] != batch
        or batch in in_kernel
        or not in_kernel <= in_input | in_output
    )
    if unusual:
        return NotImplemented
    groups = [axis for axis in of_kernel if axis in in_input and axis in in_output]
    rows = [axis for axis in of_kernel if axis not in in_output]
    columns = [axis for axis in of_kernel if axis not in in_input]
    positions = [axis for axis in of_input[1:] if axis in in_output and axis not in in_kernel]
    summed = [i for i, axis in enumerate(of_input) if axis not in in_output | in_kernel]
    sizes = dict(zip(of_kernel, kernel.shape, strict=True))

    def size(axes: Sequence[str]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    def factors(*tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        left, right = tensors
        left_axes = of_input
        if summed:
            left = tf.reduce_sum(left, axis=summed)
            left_axes = [axis for i, axis in enumerate(of_input) if i not in summed]
        return (
            _folded(left, left_axes, [batch, *groups, *positions, *rows], size(groups), size(rows)),
            _folded(
                right,
                of_output,
                [batch, *groups, *positions, *columns],
                size(groups),
                size(columns),
            ),
        )

    made = [*groups, *rows, *columns]
    order = [0] + [1 + made.index(axis) for axis in of_kernel]

    def arrange(products: tf.Tensor) -> tf.Tensor:
        split = tf.reshape(products, [batch_size(products), *(sizes[axis] for axis in made)])
        return _transposed(split, order)

    static = [inputs.shape[of_input.index(axis)] for axis in positions]
    product = OuterProducts(
        (inputs, gradient),
        factors,
        arrange,
        groups=size(groups),
        positions=None if None in static else math.prod(static),
        rows=size(rows),
        columns=size(columns),
        made=known_size(inputs.shape[1:]) + known_size(gradient.shape[1:]),
    )
    return [(kernel, product), *_bias(call)]


def convolution(call: LayerCall) -> Contributions:
    """Products of patches with output gradients over the spatial positions."""
    layer = call.layer
    kernel = layer.kernel
    if not isinstance(kernel, keras.Variable):  # LoRA
        return NotImplemented
    inputs, gradient = _channels_last(call)
    channels, filters, groups = inputs.shape[-1], gradient.shape[-1], layer.groups
    outputs = _spatial(gradient)
    taps = math.prod(layer.kernel_size)
    positions = gradient.shape[1:-1].num_elements()
    pointwise = taps == 1 and math.prod(layer.strides) == 1

    def factors(*tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images, right = tensors
        batch = batch_size(images)
        if pointwise:
            left = images
        else:
            left = unfold(
                images,
                layer.kernel_size,
                layer.strides,
                layer.dilation_rate,
                layer.padding,
                outputs,
            )
        if groups == 1:
            return (
                tf.reshape(left, [batch, 1, -1, taps * channels]),
                tf.reshape(right, [batch, 1, -1, filters]),
            )
        left = tf.reshape(left, [batch, -1, taps, groups, channels // groups])
        left = tf.transpose(left, [0, 3, 1, 2, 4])
        right = tf.reshape(right, [batch, -1, groups, filters // groups])
        return (
            tf.reshape(left, [batch, groups, -1, taps * channels // groups]),
            tf.transpose(right, [0, 2, 1, 3]),
        )

    def arrange(products: tf.Tensor) -> tf.Tensor:
        products = _transposed(products, [0, 2, 1, 3]) if groups > 1 else products
        return tf.reshape(
            products, [batch_size(products), *layer.kernel_size, channels // groups, filters]
        )

    product = OuterProducts(
        (inputs, gradient),
        factors,
        arrange,
        groups=groups,
        positions=positions,
        rows=taps * channels // groups,
        columns=filters // groups,
        made=0 if pointwise else (positions or 1) * taps * channels,
    )
    return [(kernel, product), *_bias(call)]


def depthwise_convolution(call: LayerCall) -> Contributions:
    """One product per channel and element of the kernel."""
    layer = call.layer
    inputs, gradient = _channels_last(call)
    channels, multiplier = inputs.shape[-1], layer.depth_multiplier
    outputs = _spatial(gradient)
    axes = list(range(1, inputs.shape.rank - 1))

    def function(*tensors: tf.Tensor) -> tf.Tensor:
        images, right = (tf.cast(tensor, compute_dtype(tensor.dtype)) for tensor in tensors)
        right = tf.reshape(right, [batch_size(right), *outputs, channels, multiplier])
        taps = [
            tf.reduce_sum(shifted[..., None] * right, axis=axes)
            for shifted in shifts(
                images,
                layer.kernel_size,
                layer.strides,
                layer.dilation_rate,
                layer.padding,
                outputs,
            )
        ]
        return tf.reshape(
            tf.stack(taps, axis=1), [batch_size(right), *layer.kernel_size, channels, multiplier]
        )

    floats = known_size(inputs.shape[1:]) + known_size(gradient.shape[1:])
    return [(layer.kernel, Computed((inputs, gradient), function, floats)), *_bias(call)]


for _layer in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D):
    register_layer(_layer, activation="activation")(convolution)
for _layer in (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D):
    register_layer(_layer, activation="activation")(depthwise_convolution)


@register_layer(keras.layers.Embedding)
def embedding(call: LayerCall) -> Contributions:
    """The rows that were looked up."""
    table, indices = call.layer.embeddings, call.inputs
    if not (isinstance(table, keras.Variable) and isinstance(indices, tf.Tensor)):
        return NotImplemented
    if indices.dtype not in (tf.int32, tf.int64):
        indices = tf.cast(indices, tf.int32)
    # Keras counts negative indices from the end.
    indices = tf.where(indices < 0, indices + table.shape[0], indices)
    return [(table, Rows(indices, call.output_gradient, tuple(table.shape)))]


def _statistics(
    layer: keras.layers.BatchNormalization, args: Any, kwargs: Mapping[str, Any]
) -> tuple[tf.Tensor, tf.Tensor] | None:
    """Mean and variance that a batch normalization uses, or `None` where they are not simple.

    Those of the batch are computed as in the layer, so that a graph computes them once.
    """
    inputs = args[0] if args else kwargs["inputs"]
    inputs = tf.cast(inputs, compute_dtype(inputs.dtype))
    if not (kwargs.get("training") and layer.trainable):
        return tuple(
            tf.cast(tf.convert_to_tensor(statistic), inputs.dtype)
            for statistic in (layer.moving_mean, layer.moving_variance)
        )
    if kwargs.get("mask") is not None or layer.synchronized or layer.renorm:
        return None
    axes = [axis for axis in range(inputs.shape.rank) if axis != layer.axis % inputs.shape.rank]
    return keras.ops.moments(inputs, axes=axes)


@register_layer(keras.layers.BatchNormalization, prepare=_statistics)
@register_layer(keras.layers.LayerNormalization)
@register_layer(keras.layers.GroupNormalization)
def normalization(call: LayerCall) -> Contributions:
    """Scale and shift of normalized inputs.

    Under batch normalization in training form, where the loss of one example depends on all
    others through mean and variance, this is what an example contributes by way of its own row.
    """
    layer = call.layer
    if getattr(layer, "renorm", False) or getattr(layer, "rms_scaling", False):
        return NotImplemented
    rank = call.output.shape.rank
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    axes = sorted(axis % rank for axis in axes)
    if 0 in axes:
        return NotImplemented
    others = [axis for axis in range(1, rank) if axis not in axes]
    dtype = compute_dtype(call.output_gradient.dtype)
    gradient = tf.cast(call.output_gradient, dtype)
    contributions = []
    if layer.beta is not None:
        contributions.append((layer.beta, tf.reduce_sum(gradient, axis=others)))
    if layer.gamma is not None:
        if call.prepared is None:
            without = {"gamma": None, "beta": None, "scale": False, "center": False}
            normalized = _again(call, {**without, "compute_dtype": dtype.name}, dtype)
            scaled = tf.reduce_sum(gradient * normalized, axis=others)
        else:
            mean, variance = call.prepared
            shape = [1] * rank
            shape[axes[0]] = -1
            centered = tf.cast(call.inputs, dtype) - tf.reshape(mean, shape)
            scaled = tf.reduce_sum(gradient * centered, axis=others)
            scaled *= tf.math.rsqrt(variance + layer.epsilon)
        contributions.append((layer.gamma, scaled))
    return contributions


def rms_normalization(call: LayerCall) -> Contributions:
    """Scale of normalized inputs."""
    layer = call.layer
    rank = call.output.shape.rank
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if layer.scale is None or layer.scale.shape.rank != len(axes):
        return NotImplemented
    others = sorted(set(range(1, rank)) - {axis % rank for axis in axes})
    if len(others) + len(axes) != rank - 1 or list(axes) != sorted(axes):
        return NotImplemented
    dtype = compute_dtype(call.output_gradient.dtype)
    normalized = _again(call, {"scale": None}, dtype)
    gradient = tf.cast(call.output_gradient, dtype)
    return [(layer.scale, tf.reduce_sum(gradient * normalized, axis=others))]


if hasattr(keras.layers, "RMSNormalization"):  # Keras 3.9
    register_layer(keras.layers.RMSNormalization)(rms_normalization)


def _again(call: LayerCall, replaced: Mapping[str, Any], dtype: tf.DType) -> tf.Tensor:
    """What the call returns with some of the layer's attributes replaced; changes no state."""
    inputs = tf.cast(call.inputs, dtype)
    with keras.StatelessScope(initialize_variables=False):
        return with_attributes(call.layer, replaced).call(inputs, *call.args[1:], **call.kwargs)


def _bias(call: LayerCall) -> Contributions:
    """A bias added to the output by broadcasting, or, by convolutions, along the channels."""
    bias = call.layer.bias
    if bias is None:
        return []
    gradient = call.output_gradient
    dtype = compute_dtype(gradient.dtype)
    shape = bias.shape.as_list()
    if getattr(call.layer, "data_format", None) == "channels_first":
        axes = list(range(2, gradient.shape.rank))
    else:
        extra = gradient.shape.rank - len(shape)
        if extra < 1:
            return []
        axes = [*range(1, extra), *(extra + d for d, size in enumerate(shape) if size == 1)]
    summed = tf.reduce_sum(tf.cast(gradient, dtype), axis=axes)
    return [(bias, PerExample(tf.reshape(summed, [batch_size(gradient), *shape])))]


def _channels_last(call: LayerCall) -> tuple[tf.Tensor, tf.Tensor]:
    tensors = call.inputs, call.output_gradient
    if call.layer.data_format == "channels_last":
        return tensors
    rank = call.output.shape.rank
    first, last = (tf.transpose(tensor, [0, *range(2, rank), 1]) for tensor in tensors)
    return first, last


def _spatial(tensor: tf.Tensor) -> list[int | tf.Tensor]:
    """Sizes of all axes but the first and the last."""
    static = tensor.shape[1:-1].as_list()
    dynamic = tf.shape(tensor)
    return [dynamic[1 + d] if size is None else size for d, size in enumerate(static)]


def _einsum_labels(equation: str, rank: int) -> tuple[list[str], list[str], list[str]] | None:
    """The axes of input, kernel and output, an ellipsis written out."""
    operands, _, output = equation.replace(" ", "").partition("->")
    first, _, kernel = operands.partition(",")
    if "." in kernel or not output:
        return None
    missing = rank - len(first.replace("...", ""))
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    if "..." in first:
        rest = "".join(unused[:missing])
        first, output = first.replace("...", rest), output.replace("...", rest)
    if len(first) != rank or "." in output:
        return None
    return list(first), list(kernel), list(output)


def _folded(
    tensor: tf.Tensor, axes: Sequence[str], wanted: Sequence[str], groups: int, last: int
) -> tf.Tensor:
    """[batch, groups, positions, rows or columns] of a tensor with labelled axes."""
    tensor = _transposed(tensor, [axes.index(axis) for axis in wanted])
    return tf.reshape(tensor, [batch_size(tensor), groups, -1, last])


def _transposed(tensor: tf.Tensor, order: Sequence[int]) -> tf.Tensor:
    return tensor if list(order) == sorted(order) else tf.transpose(tensor, order)
