"""Image classification on arrays that fit in memory, as a task of the Keras 3 recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from official_recipes.cifar.models import build_model
from official_recipes.common.image_data import ImageData, evenly_spaced
from official_recipes.common.keras_training import Metrics, Predictions, Serving

_PADDING = 4
_TEST_BATCH = 1000


class ImageTask:
    """Classifies images.

    Args:
        data: Images and labels; where a validation split was held out, it is in the place of the
            test split.
        network: A key of `official_recipes.cifar.models.NETWORKS`.
        augmentation: Whether training images are shifted by up to 4 pixels and mirrored.
        held_out: Whether ``data``'s test split is a validation split.
        label_smoothing: In [0, 1).
        evaluated_training_images: How many training images are evaluated on too, as they are.
    """

    name = "cifar"
    metric = "accuracy"

    def __init__(
        self,
        data: ImageData,
        network: str,
        *,
        augmentation: bool = True,
        held_out: bool = False,
        label_smoothing: float = 0.0,
        evaluated_training_images: int = 0,
    ) -> None:
        self._data = data
        # Eager tensors are captured by tf.data; arrays would become constants of its graph.
        self._train = (tf.constant(data.train_images), tf.constant(data.train_labels))
        self._network = network
        self._augmentation = augmentation
        self._split = "validation" if held_out else "test"
        self._evaluated = {self._split: (data.test_images, data.test_labels)}
        if evaluated_training_images:
            some = evenly_spaced(len(data.train_labels), evaluated_training_images)
            self._evaluated["train"] = (data.train_images[some], data.train_labels[some])
        self._label_smoothing = label_smoothing
        self._forward: tuple[keras.Model, Callable[[np.ndarray], tf.Tensor]] | None = None
        pixels = data.train_images.reshape(-1, data.train_images.shape[-1])
        # Exact integer sums; an array of floats would take four times the images' memory.
        count = len(pixels)
        mean = np.array([int(c.sum(dtype=np.int64)) for c in pixels.T]) / count
        squares = np.array([int(np.square(c, dtype=np.int64).sum()) for c in pixels.T]) / count
        self._mean = mean
        self._deviation = np.maximum(np.sqrt(np.maximum(squares - mean**2, 0.0)), 1e-3)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Data, network and what is done to the images."""
        return {
            "data": self._data.name,
            "model": self._network,
            "augmentation": self._augmentation,
            "label_smoothing": self._label_smoothing,
            "split": self._split,
            "train_size": self.train_size,
        }

    @property
    def train_size(self) -> int:
        """The number of training images."""
        return len(self._data.train_labels)

    def splits(self) -> tuple[str, ...]:
        """The one that is not trained on, and ``train`` if some of it is evaluated on."""
        return tuple(self._evaluated)

    def build_model(self) -> keras.Model:
        """Returns the network, which takes uint8 images and gives logits."""
        return build_model(
            self._network,
            self._data.train_images.shape[1:],
            self._data.classes,
            self._mean.tolist(),
            self._deviation.tolist(),
        )

    def loss(self) -> keras.losses.Loss:
        """Cross-entropy of logits."""
        if self._label_smoothing:
            return keras.losses.CategoricalCrossentropy(
                from_logits=True, label_smoothing=self._label_smoothing
            )
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def batch(self, indices: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Gathers images and labels, and shifts and mirrors the images."""
        images, labels = (tf.gather(array, indices) for array in self._train)
        if self._augmentation:
            images = shifted_and_mirrored(images, seed)
        if self._label_smoothing:
            labels = tf.one_hot(labels, self._data.classes)
        return images, labels

    def evaluate(self, model: keras.Model, split: str, *, final: bool) -> Metrics:
        """Accuracy and cross-entropy, on one device with the weights that all replicas share."""
        del final
        images, labels = self._evaluated[split]
        logits = self._logits(model, images)
        loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        return {
            "accuracy": float(np.mean(logits.argmax(axis=-1) == labels)),
            "loss": float(np.mean(loss)),
        }

    def files(self) -> Mapping[str, bytes]:
        """None."""
        return {}

    def plain_model(self, model: keras.Model) -> keras.Model:
        """Returns the same layers as a model of Keras's own class."""
        return keras.Model(model.inputs, model.outputs)

    def serving(self, model: keras.Model) -> Serving:
        """Probabilities of uint8 images, or of encoded ones, which are resized to the model's."""
        height, width, channels = self._data.train_images.shape[1:]

        def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
            logits = model(images, training=False)
            return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

        def decoded(encoded: tf.Tensor) -> tf.Tensor:
            image = tf.io.decode_image(encoded, channels, expand_animations=False)
            image = tf.image.resize(image, [height, width])
            return tf.cast(tf.round(image), tf.uint8)

        def encoded(images: tf.Tensor) -> dict[str, tf.Tensor]:
            spec = tf.TensorSpec([height, width, channels], tf.uint8)
            return serve(tf.map_fn(decoded, images, fn_output_signature=spec))

        arrays = tf.TensorSpec([None, height, width, channels], tf.uint8, name="images")
        files = tf.TensorSpec([None], tf.string, name="images")
        return Serving({"serve": (serve, [arrays]), "encoded": (encoded, [files])})

    def predictions(self, model: keras.Model) -> Predictions:
        """A line of each test image: label, likeliest class and the probability of each class."""
        probabilities = keras.ops.convert_to_numpy(
            keras.ops.softmax(self._logits(model, self._data.test_images))
        )
        lines = ["\t".join(["label", "prediction", *(f"p{i}" for i in range(self._data.classes))])]
        for label, row in zip(self._data.test_labels, probabilities, strict=True):
            lines.append("\t".join([str(label), str(row.argmax()), *(f"{p:.6g}" for p in row)]))
        return Predictions(lines)

    def _logits(self, model: keras.Model, images: np.ndarray) -> np.ndarray:
        if self._forward is None or self._forward[0] is not model:
            self._forward = (
                model,
                tf.function(lambda batch: model(batch, training=False), reduce_retracing=True),
            )
        forward = self._forward[1]
        return np.concatenate(
            [
                keras.ops.convert_to_numpy(forward(images[at : at + _TEST_BATCH]))
                for at in range(0, len(images), _TEST_BATCH)
            ]
        )


def shifted_and_mirrored(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Pads by 4 black pixels, crops at random and mirrors half of the images.

    The whole batch is one gather on the flattened images, a fraction of what the same costs image
    by image.

    Args:
        images: [batch, height, width, channels] of any type.
        seed: [2] integers.

    Returns:
        Images of the same shape and type.
    """
    count, height, width, channels = images.shape
    shifts = tf.random.stateless_uniform(
        [count, 2, 1], seed, maxval=2 * _PADDING + 1, dtype=tf.int32
    )
    mirror = tf.random.stateless_uniform([count, 1], seed + 1, maxval=2, dtype=tf.int32)
    rows = tf.range(height)[None] + shifts[:, 0] - _PADDING
    columns = tf.range(width)[None]
    columns = tf.where(mirror > 0, width - 1 - columns, columns) + shifts[:, 1] - _PADDING
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    # All pixels in one list, with a black one at its end for what lies outside.
    pixels = tf.concat(
        [tf.reshape(images, [-1, channels]), tf.zeros([1, channels], images.dtype)], axis=0
    )
    first = tf.range(count)[:, None, None] * (height * width)
    at = first + rows[:, :, None] * width + columns[:, None, :]
    return tf.gather(pixels, tf.where(inside, at, count * height * width))
