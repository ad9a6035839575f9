"""What the optimizers around another Keras optimizer have in common."""

from typing import Any, Self

import keras

from tf_lbopt.optimizers.base import LargeBatchOptimizer


class AroundOptimizer(LargeBatchOptimizer):
    """Has the learning rate and the weight decay of its ``inner_optimizer``, its first argument."""

    inner_optimizer: keras.optimizers.Optimizer

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's current learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Excludes variables from the inner optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """The optimizer that `get_config` describes."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)
