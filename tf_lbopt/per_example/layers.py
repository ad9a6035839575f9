"""The rules for Keras's own layers."""

import itertools
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from tf_lbopt.per_example.contributions import (
    Contribution,
    OuterProducts,
    Rows,
    known_size,
    wide,
)
from tf_lbopt.per_example.registry import LayerCall, register_layer
from tf_lbopt.per_example.view import with_attributes

Contributions: TypeAlias = list[tuple[keras.Variable, tf.Tensor | Contribution]]


@register_layer(keras.layers.Dense, activation="activation")
@register_layer(keras.layers.EinsumDense, activation="activation")
def dense(call: LayerCall) -> Contributions:
    """Products over the axes that the kernel does not have."""
    kernel, inputs = call.layer.kernel, call.inputs
    if not (isinstance(kernel, keras.Variable) and isinstance(inputs, tf.Tensor)):  # LoRA, sparse
        return NotImplemented
    equation = getattr(call.layer, "equation", "...x,xy->...y")
    labels = _einsum_labels(equation, inputs.shape.rank)
    if labels is None:
        return NotImplemented
    of_input, of_kernel, of_output = labels
    unusual = (
        any(len(set(axes)) < len(axes) for axes in labels)
        or of_output[0] != of_input[0]
        or of_input[0] in of_kernel
        or not set(of_kernel) <= set(of_input + of_output)
    )
    if unusual:
        return NotImplemented
    sizes = dict(zip(of_kernel, kernel.shape, strict=True))
    product = _product(kernel, (inputs, call.output_gradient), of_input, of_output, sizes)
    return [(kernel, product), *_bias(call)]


def _einsum_labels(equation: str, rank: int) -> tuple[str, str, str] | None:
    """The axes of input, kernel and output, an ellipsis written out."""
    operands, _, output = equation.replace(" ", "").partition("->")
    first, _, kernel = operands.partition(",")
    unused = "".join(letter for letter in string.ascii_letters if letter not in equation)
    rest = unused[: rank - len(first.replace("...", ""))]
    first, output = first.replace("...", rest), output.replace("...", rest)
    if not output or len(first) != rank or "." in first + kernel + output:
        return None
    return first, kernel, output


def _product(
    kernel: keras.Variable,
    tensors: Sequence[tf.Tensor],
    left: str,
    right: str,
    sizes: Mapping[str, int],
    factors: Callable[..., Sequence[tf.Tensor]] = lambda *tensors: tensors,
    made: int = 0,
) -> OuterProducts:
    """The einsum ``left,right->kernel`` of each example, the batch being the first axis of both.

    ``sizes`` are those of the kernel's axes, in their order. ``factors`` makes the factors of
    slices of the tensors, which they are by default; they have ``made`` numbers more.
    """
    batch = left[0]
    groups = [axis for axis in sizes if axis in left and axis in right]
    rows = [axis for axis in sizes if axis not in right]
    columns = [axis for axis in sizes if axis not in left]
    positions = [axis for axis in left[1:] if axis in right and axis not in sizes]
    orders = ["".join([batch, *groups, *positions, *last]) for last in (rows, columns)]
    written, wanted = "".join([batch, *groups, *rows, *columns]), "".join([batch, *sizes])

    def size(axes: Sequence[str]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    def folded(*given: tf.Tensor) -> list[tf.Tensor]:
        # What the kernel and the other factor lack is summed, the rest transposed.
        first, second = factors(*given)
        return [
            tf.reshape(
                tf.einsum(f"{axes}->{order}", wide(factor)),
                [keras.ops.shape(factor)[0], size(groups), -1, size(last)],
            )
            for factor, axes, order, last in (
                (first, left, orders[0], rows),
                (second, right, orders[1], columns),
            )
        ]

    def arrange(products: tf.Tensor) -> tf.Tensor:
        split = tf.reshape(products, [-1, *(sizes[axis] for axis in written[1:])])
        return tf.reshape(tf.einsum(f"{written}->{wanted}", split), [-1, *kernel.shape])

    for tensor, axes, order in zip(tensors, (left, right), orders, strict=True):
        made += 0 if axes == order else known_size(tensor.shape[1:])
    static = [tensors[1].shape[right.index(axis)] for axis in positions]
    return OuterProducts(
        tensors,
        folded,
        arrange,
        groups=size(groups),
        positions=None if None in static else math.prod(static),
        rows=size(rows),
        columns=size(columns),
        made=made,
    )


def convolution(call: LayerCall) -> Contributions:
    """Products of patches with output gradients over the spatial positions."""
    layer = call.layer
    kernel = layer.kernel
    if not isinstance(kernel, keras.Variable):  # LoRA
        return NotImplemented
    images, gradient = _channels_last(call)
    taps, groups = math.prod(layer.kernel_size), layer.groups
    pointwise = taps == 1 and math.prod(layer.strides) == 1
    left, right, of_kernel = ("tc", "f", "tcf") if groups == 1 else ("tgc", "gf", "tcgf")
    each = {"t": taps, "g": groups, "c": images.shape[-1] // groups}
    each["f"] = gradient.shape[-1] // groups

    def factors(images: tf.Tensor, gradient: tf.Tensor) -> list[tf.Tensor]:
        examples, *outputs, _ = keras.ops.shape(gradient)
        patches = images if pointwise else tf.stack(_shifts(layer, images, outputs), axis=-2)
        return [
            tf.reshape(tensor, [examples, *outputs, *(each[axis] for axis in axes)])
            for tensor, axes in ((patches, left), (gradient, right))
        ]

    positions = "xyz"[: len(layer.kernel_size)]
    product = _product(
        kernel,
        (images, gradient),
        f"b{positions}{left}",
        f"b{positions}{right}",
        {axis: each[axis] for axis in of_kernel},
        factors,
        made=0 if pointwise else known_size(gradient.shape[1:-1]) * taps * images.shape[-1],
    )
    return [(kernel, product), *_bias(call)]


def depthwise_convolution(call: LayerCall) -> Contributions:
    """One product per channel and element of the kernel."""
    layer = call.layer
    images, gradient = _channels_last(call)

    def function(images: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        examples, *outputs, _ = keras.ops.shape(gradient)
        shape = [examples, *outputs, images.shape[-1], layer.depth_multiplier]
        gradient = tf.reshape(wide(gradient), shape)
        axes = list(range(1, images.shape.rank - 1))
        taps = [
            tf.reduce_sum(shifted[..., None] * gradient, axis=axes)
            for shifted in _shifts(layer, wide(images), outputs)
        ]
        return tf.reshape(tf.stack(taps, axis=1), [-1, *layer.kernel.shape])

    numbers = known_size(images.shape[1:]) + known_size(gradient.shape[1:])
    return [(layer.kernel, Contribution((images, gradient), function, numbers)), *_bias(call)]


for _layer in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D):
    register_layer(_layer, activation="activation")(convolution)
for _layer in (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D):
    register_layer(_layer, activation="activation")(depthwise_convolution)


def _channels_last(call: LayerCall) -> list[tf.Tensor]:
    tensors = [call.inputs, call.output_gradient]
    if call.layer.data_format == "channels_last":
        return tensors
    rank = call.output.shape.rank
    return [tf.transpose(tensor, [0, *range(2, rank), 1]) for tensor in tensors]


def _shifts(
    layer: keras.layers.Layer, images: tf.Tensor, outputs: Sequence[int | tf.Tensor]
) -> list[tf.Tensor]:
    """For each element of a kernel what it is multiplied with, [batch, *outputs, channels]."""
    margins, windows = [], []
    of_layer = layer.kernel_size, layer.dilation_rate, layer.strides
    for length, out, size, dilation, stride in zip(
        keras.ops.shape(images)[1:-1], outputs, *of_layer, strict=True
    ):
        span, reach = (size - 1) * dilation, (out - 1) * stride + 1
        if layer.padding == "causal":
            margins.append([span, 0])
        elif layer.padding == "same":
            missing = reach + span - length
            missing = max(missing, 0) if isinstance(missing, int) else tf.maximum(missing, 0)
            margins.append([missing // 2, missing - missing // 2])
        windows.append([slice(i * dilation, i * dilation + reach, stride) for i in range(size)])
    if margins:
        images = tf.pad(images, [[0, 0], *margins, [0, 0]])
    return [images[(slice(None), *window)] for window in itertools.product(*windows)]


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


@register_layer(keras.layers.PReLU)
def prelu(call: LayerCall) -> Contributions:
    """The inputs where they are negative, summed over shared axes."""
    alpha = call.layer.alpha
    negative = tf.minimum(wide(call.inputs), 0.0)
    shared = [1 + axis for axis, size in enumerate(alpha.shape) if size == 1]
    scaled = wide(call.output_gradient) * negative
    return [(alpha, tf.reduce_sum(scaled, axis=shared, keepdims=True))]


def _statistics(
    layer: keras.layers.BatchNormalization,
    args: Sequence[tf.Tensor],
    kwargs: Mapping[str, tf.Tensor | bool | None],
) -> tuple[tf.Tensor, tf.Tensor] | None:
    """Mean and variance that a batch normalization uses, or `None` where they are not simple.

    Those of the batch are computed as in the layer, so that a graph computes them once.
    """
    inputs = wide(args[0] if args else kwargs["inputs"])
    if not (kwargs.get("training") and layer.trainable):
        moving = (layer.moving_mean, layer.moving_variance)
        mean, variance = (tf.cast(tf.convert_to_tensor(v), inputs.dtype) for v in moving)
        return mean, variance
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
    layer, rank = call.layer, call.output.shape.rank
    shift, scale = getattr(layer, "beta", None), getattr(layer, "gamma", layer.scale)
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    axes = [axis % rank for axis in axes]
    unusual = getattr(layer, "renorm", False) or getattr(layer, "rms_scaling", False)
    if unusual or 0 in axes or axes != sorted(set(axes)):
        return NotImplemented
    others = [axis for axis in range(1, rank) if axis not in axes]
    gradient = wide(call.output_gradient)
    inputs = tf.cast(call.inputs, gradient.dtype)
    contributions: Contributions = []
    if shift is not None:
        contributions.append((shift, tf.reduce_sum(gradient, axis=others)))
    if scale is None:
        return contributions
    if call.prepared is not None:
        mean, variance = call.prepared
        shape = [1] * rank
        shape[axes[0]] = -1
        centered = inputs - tf.reshape(mean, shape)
        scaled = tf.reduce_sum(gradient * centered, axis=others)
        scaled *= tf.math.rsqrt(variance + layer.epsilon)
    else:
        plain = with_attributes(
            layer,
            {
                **dict.fromkeys(["gamma", "beta", "scale", "center"], lambda: None),
                "compute_dtype": lambda: gradient.dtype.name,
            },
        )
        with keras.StatelessScope(initialize_variables=False):  # changes no state
            normalized = plain.call(inputs, *call.args[1:], **call.kwargs)
        scaled = tf.reduce_sum(gradient * normalized, axis=others)
    return [*contributions, (scale, scaled)]


if hasattr(keras.layers, "RMSNormalization"):  # Keras 3.9
    register_layer(keras.layers.RMSNormalization)(normalization)


def _bias(call: LayerCall) -> Contributions:
    """A bias added to the output by broadcasting, or, by convolutions, along the channels."""
    bias = call.layer.bias
    if bias is None:
        return []
    gradient = wide(call.output_gradient)
    shape = bias.shape.as_list()
    if getattr(call.layer, "data_format", None) == "channels_first":
        axes = list(range(2, gradient.shape.rank))
    else:
        extra = gradient.shape.rank - len(shape)
        if extra < 1:
            return []
        axes = [*range(1, extra), *(extra + d for d, size in enumerate(shape) if size == 1)]
    summed = tf.reduce_sum(gradient, axis=axes)
    return [(bias, tf.reshape(summed, [-1, *shape]))]
