"""Which layers have a rule for their per-example gradients, and what a rule is given."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.per_example.contributions import Contribution


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer within the forward pass, as a rule sees it after the backward pass.

    Attributes:
        layer: The layer.
        args: The positional arguments of ``layer.call``, converted as Keras does.
        kwargs: Its keyword arguments, with ``training`` and masks filled in.
        output: What the call returned, or, for layers registered with the name of an activation,
            what that was applied to. Its first axis is the batch.
        output_gradient: The gradient of the sum of all examples' losses with respect to it.
        prepared: What the layer's ``prepare`` returned, if it has one.
    """

    layer: keras.layers.Layer
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: tf.Tensor
    output_gradient: tf.Tensor
    prepared: Any = None

    @property
    def inputs(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


# Keras's variables are not hashable, hence pairs.
LayerRule: TypeAlias = Callable[
    [LayerCall], Iterable[tuple[keras.Variable, tf.Tensor | Contribution]]
]


@dataclasses.dataclass(frozen=True)
class Registration:
    """A rule and its options, as `register_layer` takes them."""

    rule: LayerRule
    activation: str | None
    prepare: Callable[..., object] | None


_registrations: dict[type, Registration] = {}


def register_layer(
    layer_class: type[keras.layers.Layer],
    activation: str | None = None,
    prepare: Callable[..., object] | None = None,
) -> Callable[[LayerRule], LayerRule]:
    """Decorator: gives a layer class a rule for its per-example gradients.

    Layers of exactly this class (a subclass may compute something else) then no longer take the
    general way. A rule is a function of a `LayerCall` that returns pairs: each trainable variable
    that the call read, those of sublayers included, with what this call adds to the gradient of
    each example's loss, a tensor [batch, *shape of the variable]. The layer must treat the examples
    of a batch, its first axis, independently and return a single tensor. A variable that is missing
    from the result takes the general way; a rule that returns `NotImplemented` declines the
    call.

    Args:
        layer_class: A subclass of ``keras.layers.Layer``.
        activation: Name of an attribute with an element-wise activation that ``call`` applies last,
            if it applies one. The rule is then given the gradient before the activation.
        prepare: Called as ``prepare(layer, args, kwargs)`` right after ``layer.call``, for what
            depends on state that may have changed when the rule runs; the rule finds the result in
            ``LayerCall.prepared``.

    Returns:
        The decorator, which returns the rule as it is.

    Raises:
        TypeError: ``layer_class`` is no layer class, ``activation`` no name, or ``prepare`` not
            callable.

    Example:
        >>> from tf_lbopt.per_example import per_example_gradient_norms
        >>> class Scale(keras.layers.Layer):
        ...     def build(self, shape):
        ...         self.factors = self.add_weight(shape=shape[-1:], initializer="ones")
        ...     def call(self, inputs):
        ...         return inputs * self.factors
        >>> @register_layer(Scale)
        ... def scale(call):
        ...     return [(call.layer.factors, call.inputs * call.output_gradient)]
        >>> model = keras.Sequential([keras.Input([3]), Scale()])
        >>> x = tf.constant([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
        >>> norms, _ = per_example_gradient_norms(
        ...     model, x, x, lambda y, y_pred: tf.reduce_sum(y_pred, axis=-1)
        ... )
        >>> norms[0].numpy().tolist()
        [5.0, 1.0]
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise TypeError(
            f"`layer_class` must be a subclass of keras.layers.Layer. "
            f"Received: {_validation.shown(layer_class)}"
        )
    if activation is not None and not isinstance(activation, str):
        raise TypeError(
            f"`activation` must be the name of an attribute or None. "
            f"Received: {_validation.shown(activation)}"
        )

    if prepare is not None and not callable(prepare):
        raise TypeError(
            f"`prepare` must be callable or None. Received: {_validation.shown(prepare)}"
        )

    def decorator(rule: LayerRule) -> LayerRule:
        _registrations[layer_class] = Registration(rule, activation, prepare)
        return rule

    return decorator


def registration_of(layer: keras.layers.Layer) -> Registration | None:
    """The rule for exactly this class of layer, if there is one."""
    return _registrations.get(type(layer))
