"""What a convolution reads for each of its outputs."""

import itertools
from collections.abc import Sequence

import tensorflow as tf


def unfold(
    images: tf.Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    padding: str,
    outputs: Sequence[int | tf.Tensor],
) -> tf.Tensor:
    """All patches of a batch of images, in any number of spatial dimensions.

    Args:
        images: [batch, *spatial, channels].
        sizes: Of the kernel, one per spatial dimension.
        strides: As ``sizes``.
        dilations: As ``sizes``.
        padding: ``"valid"``, ``"same"`` or ``"causal"``, as Keras's layers have it.
        outputs: The spatial sizes of the convolution's output.

    Returns:
        [batch, *outputs, product of ``sizes``, channels].
    """
    return tf.stack(list(shifts(images, sizes, strides, dilations, padding, outputs)), axis=-2)


def shifts(
    images: tf.Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    padding: str,
    outputs: Sequence[int | tf.Tensor],
) -> list[tf.Tensor]:
    """For each element of the kernel, in order, what it is multiplied with.

    Args:
        images: As in `unfold`.
        sizes: As in `unfold`.
        strides: As in `unfold`.
        dilations: As in `unfold`.
        padding: As in `unfold`.
        outputs: As in `unfold`.

    Returns:
        Tensors [batch, *outputs, channels].
    """
    if padding != "valid":
        margins = [
            _margins(
                padding, images.shape[1 + d], tf.shape(images)[1 + d], size, stride, dilation, out
            )
            for d, (size, stride, dilation, out) in enumerate(
                zip(sizes, strides, dilations, outputs, strict=True)
            )
        ]
        images = tf.pad(images, [[0, 0], *margins, [0, 0]])
    shifted = []
    for offsets in itertools.product(*(range(size) for size in sizes)):
        window = [slice(None)]
        for offset, dilation, stride, out in zip(offsets, dilations, strides, outputs, strict=True):
            begin = offset * dilation
            window.append(slice(begin, begin + (out - 1) * stride + 1, stride))
        shifted.append(images[tuple(window)])
    return shifted


def _margins(
    padding: str,
    static: int | None,
    dynamic: tf.Tensor,
    size: int,
    stride: int,
    dilation: int,
    outputs: int | tf.Tensor,
) -> list[int | tf.Tensor]:
    reach = (size - 1) * dilation
    if padding == "causal":
        return [reach, 0]
    length = dynamic if static is None else static
    missing = (outputs - 1) * stride + reach + 1 - length
    missing = max(missing, 0) if isinstance(missing, int) else tf.maximum(missing, 0)
    return [missing // 2, missing - missing // 2]
