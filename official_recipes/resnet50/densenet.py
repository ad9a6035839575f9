"""DenseNet of Keras, as a backbone of tf-models' image classification."""

from __future__ import annotations

import dataclasses
from typing import Any

import tf_keras
from official.modeling import hyperparams
from official.vision.configs import backbones, image_classification
from official.vision.modeling.backbones import factory

from official_recipes.common.flag_parsing import FlagValueError

_KEY = "densenet"
_NETWORKS = {
    121: tf_keras.applications.DenseNet121,
    169: tf_keras.applications.DenseNet169,
    201: tf_keras.applications.DenseNet201,
}
_SMALLEST = 32


@dataclasses.dataclass
class DenseNet(hyperparams.Config):
    """A network of `tf_keras.applications`.

    Attributes:
        model_id: Its number of layers: 121, 169 or 201.
    """

    model_id: int = 121


@dataclasses.dataclass
class Backbone(backbones.Backbone):
    """tf-models' backbones, and `densenet`."""

    densenet: DenseNet = dataclasses.field(default_factory=DenseNet)


@dataclasses.dataclass
class ImageClassificationModel(image_classification.ImageClassificationModel):
    """tf-models' model, on one of these backbones."""

    backbone: Backbone = dataclasses.field(default_factory=lambda: Backbone(type="resnet"))


@factory.register_backbone_builder(_KEY)
def build_densenet(
    input_specs: Any,
    backbone_config: Any,
    norm_activation_config: Any,
    l2_regularizer: Any = None,
) -> tf_keras.Model:
    """Builds the network with new weights, without its last layer.

    Args:
        input_specs: Of the images.
        backbone_config: A `Backbone`.
        norm_activation_config: Of its batch normalization; the activation is always ReLU.
        l2_regularizer: Of its kernels.

    Raises:
        FlagValueError: There is no such network, or not for such images.
    """
    layers = backbone_config.get().model_id
    if layers not in _NETWORKS:
        raise FlagValueError(
            "params_override",
            f"task.model.backbone.{_KEY}.model_id: one of {', '.join(map(str, _NETWORKS))}",
            layers,
        )
    shape = tuple(input_specs.shape[1:])
    if min(shape[:2]) < _SMALLEST:
        raise FlagValueError(
            "params_override",
            f"task.model.input_size: at least {_SMALLEST}x{_SMALLEST} for {_KEY}",
            list(shape),
        )

    def adapted(layer: Any) -> Any:
        config = layer.get_config()
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            config["momentum"] = norm_activation_config.norm_momentum
            config["epsilon"] = norm_activation_config.norm_epsilon
            config["synchronized"] = norm_activation_config.use_sync_bn
        elif "kernel_regularizer" in config:
            config["kernel_regularizer"] = l2_regularizer
        return type(layer).from_config(config)

    whole = _NETWORKS[layers](include_top=False, weights=None, input_shape=shape)
    network = tf_keras.models.clone_model(whole, clone_function=adapted)
    # tf-models takes the features of the highest level, 1/2^5 of the image.
    return tf_keras.Model(network.inputs, {"5": network.output}, name=f"{_KEY}{layers}")
