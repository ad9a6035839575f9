"""A layer as it is, but for some attributes."""

import types
from collections.abc import Mapping

import keras


def with_attributes(
    layer: keras.layers.Layer, replaced: Mapping[str, object]
) -> keras.layers.Layer:
    """An object for the ``self`` of a layer's methods, with some attributes of another value.

    A layer belongs to all replicas' threads at once, so its attributes can not be changed for the
    time of one call. All other attributes are the layer's own: what a method writes stays with it.

    Args:
        layer: The layer.
        replaced: Attributes that the object has instead of the layer's.

    Returns:
        An object of a subclass of the layer's class.
    """
    cls: type = type(layer)

    def constant(value: object) -> property:
        return property(lambda _: value)

    # Properties come before what is in an object's dictionary, which the two share.
    properties = {name: constant(value) for name, value in replaced.items()}
    view: keras.layers.Layer = object.__new__(
        types.new_class(cls.__name__, (cls,), {}, lambda n: n.update(properties))
    )
    object.__setattr__(view, "__dict__", vars(layer))
    return view
