"""The one place that touches private names of TensorFlow and Keras.

Each function says what it needs the private name for, and on which version it was checked.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer
from tensorflow.python.distribute import distribute_utils
from tensorflow.python.eager import context
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_util


def per_replica(values: Sequence[Any]) -> Any:
    """Bundles one tensor per local replica into a value that ``tf.distribute`` can reduce.

    The public ``experimental_distribute_values_from_function`` refuses some strategies inside a
    ``tf.function``; ``regroup`` is what it calls. Checked on TensorFlow 2.20.0.
    """
    return distribute_utils.regroup(tuple(values), always_wrap=True)


def in_xla_context() -> bool:
    """Whether the ops built now are going to be compiled by XLA. Checked on TensorFlow 2.20.0."""
    return control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph())


def anonymous_variable(shape: tf.TensorShape, dtype: tf.DType) -> tf.Tensor:
    """The handle of a variable that lives as long as the handle does (one execution).

    A resource variable of that name is reference counted by the run time instead of being kept in
    the resource manager, so it serves as scratch memory for kernels that write only into
    variables. Checked on TensorFlow 2.20.0.
    """
    return tf.raw_ops.VarHandleOp(
        dtype=dtype, shape=shape, shared_name=context.anonymous_name(), debug_name="scratch"
    )


_patching = threading.RLock()


@contextlib.contextmanager
def _without_distribution() -> Iterator[None]:
    """Makes Keras's optimizers use their plain update loops instead of the distributed ones."""
    names = ("_apply_weight_decay", "_backend_update_step")
    with _patching:
        distributed = {name: TFOptimizer.__dict__[name] for name in names}
        try:
            for name in names:
                setattr(TFOptimizer, name, getattr(BaseOptimizer, name))
            yield
        finally:
            for name, method in distributed.items():
                setattr(TFOptimizer, name, method)


def keras_update(
    optimizer: keras.optimizers.Optimizer, gradients: Sequence[Any], variables: Sequence[Any]
) -> None:
    """One update by a stock Keras optimizer, on the replica whose update context this is.

    Its own road (`apply`) reduces over replicas and enters contexts, which has been done already.
    Checked on Keras 3.15.1, where Nadam overrides ``_backend_update_step`` and Muon
    ``_apply_weight_decay``.
    """
    raw = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    with _without_distribution():
        optimizer._apply_weight_decay(variables)
        optimizer._backend_update_step(list(gradients), raw, optimizer.learning_rate)
