"""The networks that the papers train on CIFAR: two convolutions, ResNets, VGG-11."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras

import tf_lbopt

# Filters of each convolution, and "pool" for a 2x2 maximum, of configuration A.
_VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


def residual_network(
    inputs: keras.KerasTensor, channels: Sequence[int], blocks: int, classes: int
) -> keras.KerasTensor:
    """The residual network of He et al. 2016, section 4.2, with parameter-free shortcuts.

    Args:
        inputs: Normalized images.
        channels: Of each stage; all but the first stage halve height and width.
        blocks: Basic blocks per stage; n gives 6 n + 2 layers with three stages.
        classes: The number of logits.

    Returns:
        The logits.
    """

    def normalized(x: keras.KerasTensor, filters: int, strides: int = 1) -> keras.KerasTensor:
        x = keras.layers.Conv2D(
            filters,
            3,
            strides,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
        )(x)
        return keras.layers.BatchNormalization(momentum=0.9)(x)

    x = keras.ops.relu(normalized(inputs, channels[0]))
    for stage, filters in enumerate(channels):
        for block in range(blocks):
            strides = 2 if stage and not block else 1
            shortcut = x
            if strides > 1:
                added = filters - x.shape[-1]
                padding = [[0, 0], [0, 0], [0, 0], [added // 2, added - added // 2]]
                shortcut = keras.ops.pad(x[:, ::strides, ::strides, :], padding)
            x = keras.ops.relu(normalized(x, filters, strides))
            x = keras.ops.relu(normalized(x, filters) + shortcut)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.layers.Dense(classes)(x)


def two_convolutions(inputs: keras.KerasTensor, classes: int) -> keras.KerasTensor:
    """Two 5x5 convolutions of stride 2 and a dense layer of 64: the SNGM paper's Figure 1.

    The paper gives no sizes; these are this package's.
    """
    x = inputs
    for filters in (16, 32):
        x = keras.layers.Conv2D(
            filters,
            5,
            strides=2,
            padding="same",
            activation="relu",
            kernel_initializer="he_normal",
        )(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(64, activation="relu", kernel_initializer="he_normal")(x)
    return keras.layers.Dense(classes)(x)


def vgg11(
    inputs: keras.KerasTensor, classes: int, *, batch_normalization: bool
) -> keras.KerasTensor:
    """VGG configuration A (Simonyan & Zisserman 2014) with one dense layer at the end.

    Small images leave 1x1x512 after five pools, so the two dense layers of 4,096 are left out, as
    usual on CIFAR.
    """
    x = inputs
    for entry in _VGG11:
        if entry == "pool":
            x = keras.layers.MaxPooling2D()(x)
            continue
        x = keras.layers.Conv2D(
            entry,
            3,
            padding="same",
            use_bias=not batch_normalization,
            kernel_initializer="he_normal",
        )(x)
        if batch_normalization:
            x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.ops.relu(x)
    x = keras.layers.Flatten()(x)
    return keras.layers.Dense(classes)(x)


def sigmoid_cnn(inputs: keras.KerasTensor, classes: int) -> keras.KerasTensor:
    """Five layers with sigmoid activations, as in the CLARS paper's Figure 2 (MNIST).

    The paper gives neither widths nor kernel sizes. These are this package's: its studies were run
    with them. The authors' code (slowbull/largebatch) has five convolutions without padding, of 20
    channels and the last of as many as classes, with kernels 4 (stride 2), 5, 5, 3 and 3.
    """
    x = inputs
    for number, filters in enumerate((8, 16, 32)):
        x = keras.layers.Conv2D(
            filters, 3, strides=2, padding="same", activation="sigmoid", name=f"layer_{number + 1}"
        )(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(64, activation="sigmoid", name="layer_4")(x)
    return keras.layers.Dense(classes, name="layer_5")(x)


@dataclass(frozen=True)
class Network:
    """A row of the table of networks.

    Attributes:
        build: Makes logits of normalized images and the number of classes.
        paper: Where it is from.
    """

    build: Callable[[keras.KerasTensor, int], keras.KerasTensor]
    paper: str


_RESNET = "He et al. 2016, section 4.2"
_VGG = "Simonyan & Zisserman 2014, configuration A"
NETWORKS = {
    "two_conv": Network(two_convolutions, "SNGM, Figure 1"),
    "sigmoid_cnn": Network(sigmoid_cnn, "CLARS, Figure 2"),
    "resnet8": Network(lambda x, n: residual_network(x, (16, 32, 64), 1, n), _RESNET),
    "resnet20": Network(lambda x, n: residual_network(x, (16, 32, 64), 3, n), _RESNET),
    "resnet56": Network(lambda x, n: residual_network(x, (16, 32, 64), 9, n), _RESNET),
    "vgg11": Network(lambda x, n: vgg11(x, n, batch_normalization=False), _VGG),
    "vgg11_bn": Network(lambda x, n: vgg11(x, n, batch_normalization=True), _VGG),
}


def build_model(
    network: str,
    shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float],
    deviation: Sequence[float],
) -> keras.Model:
    """Returns a classifier of uint8 images that gives float32 logits.

    Args:
        network: A key of `NETWORKS`.
        shape: Height, width and channels.
        classes: The number of logits.
        mean: Of each channel over the training split.
        deviation: Standard deviation, likewise.
    """
    inputs = keras.Input(shape, dtype="uint8")
    variance = [value**2 for value in deviation]
    x = keras.layers.Normalization(mean=list(mean), variance=variance)(inputs)
    logits = NETWORKS[network].build(x, classes)
    outputs = keras.layers.Activation("linear", dtype="float32")(logits)
    return tf_lbopt.PerExampleNormsModel(inputs, outputs)
