"""A layer as it is, but for some attributes."""

import types
from collections.abc import Callable, Mapping

import keras


def with_attributes(
    layer: keras.layers.Layer, replaced: Mapping[str, Callable[[], object]]
) -> keras.layers.Layer:
    """An object for the ``self`` of a layer's methods, with other values of some attributes.

    A layer belongs to all replicas' threads at once, so its attributes can not be changed for the
    time of one call. All others are the layer's own: what a method writes stays with it. Those
    that are ``replaced`` are what the function given for each returns when it is read.
    """
    cls: type = type(layer)

    def attribute(value: Callable[[], object]) -> property:
        return property(lambda _: value())

    # Properties come before what is in an object's dictionary, which the two share.
    properties = {name: attribute(value) for name, value in replaced.items()}
    view: keras.layers.Layer = object.__new__(
        types.new_class(cls.__name__, (cls,), {}, lambda namespace: namespace.update(properties))
    )
    object.__setattr__(view, "__dict__", vars(layer))
    return view
