"""A layer as it is, but for some attributes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras


class View:
    """Stands in for ``self`` in a layer's methods, with some attributes replaced.

    A layer belongs to all replicas' threads at once, so its attributes can not be changed for the
    time of one call. Methods and properties that are reached through the view see the view.

    Args:
        layer: The layer.
        replaced: Attributes that the view has instead of the layer's.
        read: Applied to every variable found among the layer's attributes.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        replaced: Mapping[str, Any],
        read: Callable[[keras.Variable], Any] = lambda variable: variable,
    ):
        object.__setattr__(self, "_viewed", (layer, dict(replaced), read))

    def __getattr__(self, name: str) -> Any:
        layer, replaced, read = object.__getattribute__(self, "_viewed")
        if name in replaced:
            return replaced[name]
        attribute = inspect.getattr_static(type(layer), name, None)
        if name not in vars(layer) and hasattr(attribute, "__get__"):
            return attribute.__get__(self, type(layer))
        value = getattr(layer, name)
        return read(value) if isinstance(value, keras.Variable) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._viewed[0], name, value)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's ``call``, of the view."""
        layer = self._viewed[0]
        return type(layer).call(self, *args, **kwargs)
