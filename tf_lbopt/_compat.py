"""The one place that touches private names of TensorFlow and Keras.

Each function says what it needs the private name for, and on which version it was checked.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import keras
import tensorflow as tf
from keras.src import backend as keras_backend
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.tensorflow import trainer as keras_trainer
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.losses import loss as keras_loss
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.models.functional import Functional as Functional  # not exported; 3.15.1
from keras.src.optimizers.base_optimizer import BaseOptimizer
from tensorflow.python.distribute import distribute_utils, tpu_util
from tensorflow.python.eager import context, record
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph
from tensorflow.python.trackable.base import Trackable
from tensorflow.python.trackable.python_state import PYTHON_STATE

_Value = TypeVar("_Value")


def per_replica(values: Sequence[object]) -> tf.distribute.DistributedValues:
    """Bundles one tensor per local replica into a value that ``tf.distribute`` can reduce.

    The public ``experimental_distribute_values_from_function`` refuses some strategies inside a
    ``tf.function``; ``regroup`` is what it calls. Checked on TensorFlow 2.20.0.
    """
    return distribute_utils.regroup(tuple(values), always_wrap=True)


def in_xla_context() -> bool:
    """Whether the ops built now are going to be compiled by XLA. Checked on TensorFlow 2.20.0."""
    return control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph())


def assert_or_discard(condition: tf.Tensor, data: list[object]) -> tf.Tensor | None:
    """Asserts a condition of an update; XLA, which makes no assertions, is given a factor instead.

    Args:
        condition: A boolean scalar.
        data: What the error says.

    Returns:
        What to multiply a gradient by, if XLA compiles the step: infinity, by which the update is
        discarded, where the condition does not hold, else 1. Else ``None``.

    Raises:
        tf.errors.InvalidArgumentError: When it runs: the condition does not hold.
    """
    tf.debugging.Assert(condition, data)
    return 1.0 / tf.cast(condition, tf.float32) if in_xla_context() else None


def in_tpu_replica() -> bool:
    """Whether a replica function of ``TPUStrategy.run`` is being traced.

    Its ``merge_call`` stays in there: on a TPU all replicas run one program, collectives included.
    Checked on TensorFlow 2.20.0.
    """
    return tpu_util.enclosing_tpu_context() is not None


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
def outside_of_functions() -> Iterator[None]:
    """What `tf.init_scope` does, and variables created in it are none of a traced function's.

    `init_scope` alone leaves the function's graph the default one, whose creator makes of each new
    variable one that the function is to initialize; for that it is traced a second time. With a
    graph of its own as the default, execution is just eager. Variable creators of the surroundings
    (a strategy's scope) are not seen either, so they must be entered inside. Checked on TensorFlow
    2.20.
    """
    with tf.init_scope(), tf.Graph().as_default(), context.eager_mode():
        yield


def keras_update(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    variables: Sequence[keras.Variable | tf.Variable],
) -> None:
    """One update by a stock Keras optimizer, on the replica whose update context this is.

    Its own way (`apply`) reduces over replicas and enters contexts, which has been done already:
    the plain update loops of Keras take the place of the distributed ones. Checked on Keras 3.15.1,
    where Nadam overrides ``_backend_update_step`` and Muon ``_apply_weight_decay``.
    """
    raw = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    names = ("_apply_weight_decay", "_backend_update_step")
    with _patching:
        distributed = {name: vars(TFOptimizer)[name] for name in names}
        try:
            for name in names:
                setattr(TFOptimizer, name, getattr(BaseOptimizer, name))
            optimizer._apply_weight_decay(variables)
            optimizer._backend_update_step(list(gradients), raw, optimizer.learning_rate)
        finally:
            for name, method in distributed.items():
                setattr(TFOptimizer, name, method)


# -- per-example gradients -------------------------------------------------------------------------


class _Hooks(threading.local):
    """The functions of each thread, those of the innermost context last."""

    def __init__(self) -> None:
        self.stack: list[tuple[Callable[..., object], Callable[..., tf.Tensor | None]]] = []


_hooks = _Hooks()
_hooking = threading.RLock()
_hook_users = 0
_original_call = keras.Operation.__call__
_original_value = keras.Variable.value


def _hooked_call(operation: keras.Operation, /, *args: Any, **kwargs: Any) -> object:
    if not _hooks.stack:
        return _original_call(operation, *args, **kwargs)
    on_call, _ = _hooks.stack[-1]
    return on_call(_original_call, operation, *args, **kwargs)


def _hooked_value(variable: keras.Variable) -> tf.Tensor | tf.Variable:
    if _hooks.stack:
        _, on_read = _hooks.stack[-1]
        substitute = on_read(variable)
        if substitute is not None:
            return variable._maybe_autocast(substitute)
    return _original_value.fget(variable)


@contextlib.contextmanager
def layer_hooks(
    on_call: Callable[..., object], on_read: Callable[[keras.Variable], tf.Tensor | None]
) -> Iterator[None]:
    """Puts two functions, for this thread, between Keras and its layers and variables.

    Args:
        on_call: Called as ``on_call(original, layer, *args, **kwargs)`` in the place of the call of
            any layer (and of any operation of a functional model); ``original(layer, *args,
            **kwargs)`` is what would have been called. The arguments are those of ``layer.call``,
            converted, with masks and ``training`` filled in.
        on_read: Called with every variable whose value is read; returns a tensor to be read in its
            place (autocast is applied to it), or `None`.

    Contexts nest; the innermost one's functions are called. Other threads see nothing. The names
    patched, ``keras.Operation.__call__`` and ``keras.Variable.value``, are public, but that a
    layer's ``__call__`` ends in the first and that all reads pass through the second is not
    promised anywhere. Checked on Keras 3.15.1.
    """
    global _hook_users
    with _hooking:
        if _hook_users == 0:
            keras.Operation.__call__ = _hooked_call
            keras.Variable.value = property(_hooked_value)
        _hook_users += 1
    _hooks.stack.append((on_call, on_read))
    try:
        yield
    finally:
        _hooks.stack.pop()
        with _hooking:
            _hook_users -= 1
            if _hook_users == 0:
                keras.Operation.__call__ = _original_call
                del keras.Variable.value  # inherited


def stored_value(variable: keras.Variable) -> tf.Variable:
    """The TensorFlow variable behind a Keras variable, not cast. Checked on Keras 3.15.1."""
    return variable._value


def calls_its_call(layer: keras.layers.Layer) -> bool:
    """Whether calling a layer comes down to the ``call`` of its class, once.

    Not so for quantized and rematerialized layers. Checked on Keras 3.15.1.
    """
    return (
        not getattr(layer, "_remat_mode", None)
        and getattr(layer, "quantization_mode", None) is None
        and "call" not in vars(layer)
    )


def is_recorded(tensor: tf.Tensor) -> bool:
    """Whether a tape that watches a tensor would record an operation on it now.

    ``tf.recompute_grad`` and others stop all tapes for a while. Checked on TensorFlow 2.20.0.
    """
    return record.should_record_backprop([tensor])


def inside_control_flow_of(graph: tf.Graph) -> bool:
    """Whether the graph being built is that of branches or loop bodies within ``graph``.

    A branch or body runs as part of the graph around it and may use its tensors, whereas a
    ``tf.function`` outlives it. Checked on TensorFlow 2.20.0.
    """
    current = ops.get_default_graph()
    while current is not graph and isinstance(current, ControlFlowFuncGraph):
        current = current.outer_graph
    return current is graph


def copies(tensor: tf.Tensor, with_logits: bool) -> list[tf.Tensor]:
    """A copy of what a layer returned, with what Keras attached to it, and one of its logits.

    Keras attaches masks, and to the result of a softmax or sigmoid the logits, from which the
    crossentropies then take the loss and its gradient. If the copy is not to have any, it is alone.
    Checked on Keras 3.15.1.
    """
    copy = tf.identity(tensor)
    set_keras_mask(copy, get_keras_mask(tensor))
    logits = getattr(tensor, "_keras_logits", None)
    if logits is None or not with_logits:
        return [copy]
    copy._keras_logits = tf.identity(logits)
    return [copy, copy._keras_logits]


def as_loss(
    identifier: str | keras.losses.Loss | Callable[..., tf.Tensor],
) -> keras.losses.Loss:
    """A Keras loss from what ``compile`` accepts: a loss, a name or a function.

    ``compile`` wraps functions in a class that is not exported. Checked on Keras 3.15.1.
    """
    loss = keras.losses.get(identifier)
    return loss if isinstance(loss, keras.losses.Loss) else LossFunctionWrapper(loss)


def unreduced_loss(
    loss: keras.losses.Loss,
    y_true: object,
    y_pred: object,
    sample_weight: object = None,
    reduction: str = "sum_over_batch_size",
) -> tf.Tensor:
    """The values that ``loss(y_true, y_pred, sample_weight)`` reduces, weighted and masked.

    What ``keras.losses.Loss.__call__`` does before such a reduction, on which the weights of a mask
    depend. Checked on Keras 3.15.1.
    """
    mask = get_keras_mask(y_pred)
    y_pred, y_true = keras.tree.map_structure(
        lambda x: keras.ops.convert_to_tensor(x, dtype=loss.dtype), (y_pred, y_true)
    )
    values = keras.ops.convert_to_tensor(loss.call(y_true, y_pred), dtype=loss.dtype)
    own_mask = get_keras_mask(values)
    if mask is not None and own_mask is not None:
        mask = mask & own_mask
    elif mask is None:
        mask = own_mask
    if sample_weight is not None:
        sample_weight = keras.ops.convert_to_tensor(sample_weight, dtype=loss.dtype)
    weights = keras_loss.apply_mask(sample_weight, mask, values.dtype, reduction)
    if weights is None:
        return values
    weights = keras.ops.cast(weights, values.dtype)
    values, weights = keras_loss.squeeze_or_expand_to_same_rank(values, weights)
    return values * weights


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers directly inside a layer.

    Only models have a public list of them (``layers``); a block's or a wrapper's can not be reached
    otherwise. Checked on Keras 3.15.1.
    """
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """A layer and all inside it; a shared one comes again after everything that it is in."""
    yield layer
    for sublayer in sublayers(layer):
        yield from all_layers(sublayer)


def caller_of_caller() -> object:
    """The object whose method called the method that asks, or ``None``.

    LossScaleOptimizer and MultiOptimizer set `loss_scale_factor` of the optimizers that they are
    given, as others do. Checked on Keras 3.15.1.
    """
    return sys._getframe(2).f_locals.get("self")


def is_multi_optimizer(optimizer: object) -> bool:
    """Whether an optimizer is made of several; Keras 3.15 has a class for that."""
    cls = getattr(keras.optimizers, "MultiOptimizer", None)
    return cls is not None and isinstance(optimizer, cls)


def fit_divides_by_replicas() -> bool:
    """Whether Keras's `fit` divides the loss by the number of replicas, as from 3.8 on.

    Checked on Keras 3.7.0, 3.8.0 and 3.15.1.
    """
    return hasattr(keras_loss, "scale_loss_for_distribution")


def saved_name(store: object) -> str | None:
    """The name of the object whose state a file has at this place, if the file says so.

    Keras writes it beside the variables. Checked on Keras 3.15.1.
    """
    return getattr(getattr(store, "_h5_entry_group", None), "attrs", {}).get("name")


class CheckedBeforeRestoring:
    """Mix-in of an optimizer: told what a checkpoint has for it before any of it is restored.

    TensorFlow asks every object for an adapter, when it has found the object's place in the
    checkpoint and before it reads values. Where it does not ask, nothing is checked. Checked on
    TensorFlow 2.20.0.
    """

    def check_checkpoint(self, children: set[str]) -> None:
        """Raises if it can not be restored.

        Args:
            children: The names of what the saved optimizer had.
        """
        raise NotImplementedError

    def _checkpoint_adapter(self, path: str) -> object:
        position = sys._getframe(1).f_locals.get("checkpoint_position")
        if position is not None:
            self.check_checkpoint({child.local_name for child in position.object_proto.children})
        return super()._checkpoint_adapter(path)  # type: ignore[misc]  # the framework's

    def _trackable_children(
        self, save_type: str = "checkpoint", **kwargs: Any
    ) -> dict[str, Trackable]:
        children = super()._trackable_children(save_type, **kwargs)  # type: ignore[misc]
        if save_type != "savedmodel":
            return children
        return {
            name: _Written(child) if isinstance(child, tf.train.experimental.PythonState) else child
            for name, child in children.items()
        }


class _Written(Trackable):
    """Python state in a SavedModel: it is written, and whoever loads the model has no use for it.

    Of the state itself TensorFlow would warn that it is not restored. Checked on TensorFlow 2.20.0.
    """

    def __init__(self, state: tf.train.experimental.PythonState):
        self._state = state

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        # Not by its own method: a constant from outside of a traced function is one more object.
        return {PYTHON_STATE: tf.constant(self._state.serialize(), tf.string)}

    def _restore_from_tensors(self, restored_tensors: dict[str, tf.Tensor]) -> tf.Operation:
        del restored_tensors
        return tf.no_op()


# -- optimizers ------------------------------------------------------------------------------------


def key_of(variable: keras.Variable | tf.Variable) -> str:
    """The same for a Keras variable, the variable in it, and the copy of it on any replica.

    Checked on TensorFlow 2.20.0, Keras 3.15.1 and tf_keras 2.20.1.
    """
    value = variable._value if isinstance(variable, keras.Variable) else variable
    distributed = getattr(value, "_distributed_container", None)
    return (value if distributed is None else distributed())._unique_id


def trained_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built with.

    There is no public list of them. Checked on Keras 3.15.1.
    """
    return list(optimizer._trainable_variables)


def averages(optimizer: Any) -> list[keras.Variable | tf.Variable]:
    """The moving averages of the variables that an optimizer, of either framework, was built with.

    Checked on Keras 3.15.1 and tf_keras 2.20.1.
    """
    return list(optimizer._model_variables_moving_average)


def counter(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """What an optimizer counts; `iterations` divides it by the micro-steps of its own accumulation.

    Checked on Keras 3.15.1.
    """
    return optimizer._iterations


def has_schedule(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the learning rate is none that can be set. Checked on Keras 3.15.1."""
    return callable(optimizer._learning_rate)


def let_optimizers_wrap_training() -> None:
    """Makes Keras's trainer offer each training step to the optimizer, from now on.

    An optimizer that has ``wrap_training`` (or, if it has not, the one inside a LossScaleOptimizer)
    is given the model, its ``train_step`` and what makes a training function of a step; it returns
    the training function. One that has ``before_evaluation`` is told of each step of `evaluate`.
    Others are not affected. Checked on Keras 3.7.0 and 3.15.1, where ``make_train_function`` calls
    ``_make_function(self.train_step)``, and ``make_test_function`` likewise.
    """

    def offering(original: Callable[..., Any]) -> Callable[..., object]:
        def make_function(
            model: keras.Model, step_function: Callable[..., object]
        ) -> Callable[..., object]:
            optimizer = getattr(model, "optimizer", None)
            before_evaluation = getattr(optimizer, "before_evaluation", None)
            if not hasattr(optimizer, "wrap_training"):
                optimizer = getattr(optimizer, "inner_optimizer", None)
            wrap = getattr(optimizer, "wrap_training", None)
            if wrap is not None and step_function == model.train_step:
                return wrap(model, step_function, lambda step: original(model, step))
            function = original(model, step_function)
            if before_evaluation is None or step_function != model.test_step:
                return function

            def evaluate(iterator: object) -> object:
                before_evaluation()
                return function(iterator)

            return evaluate

        return make_function

    replace(TensorFlowTrainer, "_make_function", offering)


def call_in_training(model: keras.Model, x: object) -> Any:
    """``model(x, training=True)`` for a model that takes ``training``, as its ``train_step`` calls.

    Checked on Keras 3.15.1.
    """
    return model(x, training=True) if model._call_has_training_arg else model(x)


def trained_loss(
    model: keras.Model, x: object, y: object, y_pred: object, sample_weight: object
) -> tf.Tensor:
    """The loss of a model's `compute_loss`, not divided by the replicas.

    What ``train_step`` takes between the forward and the backward pass. Checked on Keras 3.15.1.
    """
    loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
    if hasattr(keras_loss, "unscale_loss_for_distribution"):  # Keras 3.8
        loss = keras_loss.unscale_loss_for_distribution(loss)
    return loss


def track_loss(model: keras.Model, x: object, loss: tf.Tensor) -> None:
    """Notes a loss in a model's ``loss`` metric, as ``train_step``. Checked on Keras 3.15.1."""
    first = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
    model._loss_tracker.update_state(loss, sample_weight=tf.shape(first)[0])


def compiled_loss(
    model: keras.Model,
    y: object,
    y_pred: object,
    sample_weight: object,
    value: Callable[..., tf.Tensor],
) -> tf.Tensor | None:
    """The loss that a model was compiled with, its parts computed by another function.

    It is called as ``value(loss, y, y_pred, sample_weight)`` for every output with a loss; which
    loss, weight and labels belong to which output is left to Keras. The result is the weighted sum
    of the values, `None` if there is no loss. Checked on Keras 3.15.1.
    """
    compiled = model._compile_loss
    if compiled is None:
        return None
    if not compiled.built:
        with tf.init_scope():
            keras_backend.compute_output_spec(compiled, *_symbolic((y, y_pred, sample_weight)))
    parts = [
        part._replace(loss=functools.partial(value, part.loss)) for part in compiled._flat_losses
    ]
    other = object.__new__(type(compiled))
    # The metrics are those of the model's own, which takes scalars.
    vars(other).update(vars(compiled), _flat_losses=parts, _metrics=[None] * len(parts))
    return other(y, y_pred, sample_weight)


def _symbolic(structure: Any) -> Any:
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else keras.KerasTensor(leaf.shape, leaf.dtype), structure
    )


def build_by_shapes(model: keras.Model, x: object) -> None:
    """Creates the variables of a model that is not built yet, from the shapes of its inputs.

    Under a strategy Keras's trainer has done so before the first step; on one device it leaves it
    to the step. Checked on Keras 3.15.1.
    """
    if all(layer.built for layer in model._flatten_layers()):
        return
    with tf.init_scope():
        keras_backend.compute_output_spec(model, _symbolic(x), training=False)


# -- fit on several workers ------------------------------------------------------------------------


def on_several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy has replicas in other processes, which run the same program."""
    return isinstance(
        strategy, tf.distribute.MultiWorkerMirroredStrategy
    ) and strategy.num_replicas_in_sync > len(strategy.extended.worker_devices)


class _TwoWorkers(tf.distribute.MultiWorkerMirroredStrategy):
    """What Keras's trainer takes for a strategy of two workers; notes how values are reduced.

    It starts no server and no operation: a real strategy can be made only before those.
    """

    num_replicas_in_sync = 2
    extended = types.SimpleNamespace(_in_multi_worker_mode=lambda: True, worker_devices=("",))

    def __init__(self) -> None:
        self.axes: list[int | None] = []

    def scope(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def reduce(self, reduce_op: object, value: _Value, axis: int | None = None) -> _Value:
        self.axes.append(axis)
        return value

    def experimental_local_results(self, value: _Value) -> tuple[_Value, ...]:
        return (value,)


def _builds_from_reduced_batch() -> bool:
    """Whether Keras reduces a batch over workers to see its shapes, which fails."""
    for numbers in ((0, 0), (0,)):  # of a batch, the first and the last; one before Keras 3.11
        strategy = _TwoWorkers()
        model = types.SimpleNamespace(
            _distribute_strategy=strategy,
            distribute_strategy=strategy,
            steps_per_execution=1,
            _symbolic_build=lambda **_: None,
        )
        batches = iter([per_replica([object()])])
        with contextlib.suppress(ValueError):  # other numbers
            TensorFlowTrainer._maybe_symbolic_build(model, iterator=[(*numbers, batches)])
            return bool(strategy.axes)
    raise ValueError("the trainer's epoch iterator")


def _reduces_scalars_along_an_axis() -> bool:
    """Whether Keras averages logs over workers along an axis that a scalar does not have."""
    strategy = _TwoWorkers()
    keras_trainer.reduce_per_replica(per_replica([object()]), strategy, "auto")
    return strategy.axes != [None]


def mend_trainer_on_several_workers() -> None:
    """Mends, from now on, what keeps `fit` and `evaluate` of Keras from several workers.

    Only what is found wrong is touched (https://github.com/keras-team/keras/issues/20585). Trained
    with on Keras 3.7.0 and TensorFlow 2.16.2, Keras 3.15.1 and TensorFlow 2.20.0 and 2.21.0; both
    faults are found in Keras 3.8.0 to 3.13.0 too.

    Raises:
        AttributeError, TypeError, ValueError: Keras's trainer is not what is known here.
    """
    builds, reduces = _builds_from_reduced_batch(), _reduces_scalars_along_an_axis()
    if builds:
        symbolic_build = TensorFlowTrainer._maybe_symbolic_build

        @functools.wraps(symbolic_build)
        def build(
            model: keras.Model, iterator: Iterable[Any] | None = None, data_batch: object = None
        ) -> None:
            strategy = model._distribute_strategy
            if iterator is not None and on_several_workers(strategy):
                if model.steps_per_execution != 1:  # they fail under MirroredStrategy, too
                    raise ValueError(
                        "`fit` and `evaluate` on several workers need `steps_per_execution=1`. "
                        f"Received: steps_per_execution={model.steps_per_execution!r}"
                    )
                *_, batches = next(iter(iterator))
                # Shapes and dtypes are all that is wanted, and any replica's part has them.
                data_batch = keras.tree.map_structure(
                    lambda value: strategy.experimental_local_results(value)[0], next(batches)
                )
                iterator = None
            symbolic_build(model, iterator=iterator, data_batch=data_batch)

        TensorFlowTrainer._maybe_symbolic_build = build
    if reduces:
        reduce_per_replica = keras_trainer.reduce_per_replica

        @functools.wraps(reduce_per_replica)
        def reduce(values: object, strategy: tf.distribute.Strategy, reduction: str) -> object:
            if reduction != "auto" or not on_several_workers(strategy):
                return reduce_per_replica(values, strategy, reduction)
            return keras.tree.map_structure(
                lambda value: (
                    strategy.reduce("MEAN", value, axis=None)
                    if isinstance(value, (tf.Tensor, tf.distribute.DistributedValues))
                    else value
                ),
                values,
            )

        keras_trainer.reduce_per_replica = reduce


_WRITING = {
    keras.callbacks.ModelCheckpoint: ("_save_model", ("filepath",)),
    keras.callbacks.BackupAndRestore: (
        "_save_model",
        (
            "backup_dir",
            "_weights_path",
            "_training_metadata_path",
            "_prev_weights_path",
            "_prev_training_metadata_path",
        ),
    ),
    keras.callbacks.CSVLogger: ("on_train_begin", ("filename",)),
}
"""Which method of a callback opens files, and which attributes say where."""


_elsewhere: list[str] = []
"""The temporary folder that a callback writes to now, with a slash."""


def path_asked_for(path: str) -> str:
    """What a path would be if the callback that writes were the chief's."""
    return path.removeprefix(_elsewhere[-1]) if _elsewhere else path


def let_callbacks_write_once(
    is_chief: Callable[[tf.distribute.Strategy], bool],
    check_backup: Callable[[tf.distribute.Strategy, str, list[int]], None],
    wait: Callable[[tf.distribute.Strategy], object],
) -> None:
    """Makes Keras's callbacks on several workers leave what they write to one of them.

    The others write as well, since reading a variable may take all workers, but to folders that are
    removed. Checked on Keras 3.7.0 and 3.15.1.

    Args:
        is_chief: Whether this is the worker that writes, by the strategy.
        check_backup: Called by all workers before they restore a backup, with the strategy, the
            folder, and whether there are weights (0 or 1) and of which epoch.
        wait: Waits until all workers have called it, given the strategy.

    Raises:
        AttributeError: Keras's callbacks are not what is known here.
    """

    def writes_elsewhere(model: keras.Model) -> bool:
        strategy = model.distribute_strategy
        return on_several_workers(strategy) and not is_chief(strategy)

    def elsewhere(original: Callable[..., object], names: Sequence[str]) -> Callable[..., object]:
        def write(callback: keras.callbacks.Callback, *args: Any, **kwargs: Any) -> object:
            if not writes_elsewhere(callback.model):
                return original(callback, *args, **kwargs)
            paths = {name: getattr(callback, name) for name in names}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    _elsewhere.append(f"{folder}/")
                    for name, path in paths.items():
                        setattr(callback, name, f"{folder}/{path}")
                        os.makedirs(os.path.dirname(f"{folder}/{path}"), exist_ok=True)
                    return original(callback, *args, **kwargs)
                finally:
                    vars(callback).update(paths)
                    _elsewhere.pop()

        return write

    def restoring(original: Callable[..., object]) -> Callable[..., object]:
        def restore(callback: keras.callbacks.BackupAndRestore) -> None:
            strategy = callback.model.distribute_strategy
            if on_several_workers(strategy):
                epoch, path = -1, callback._training_metadata_path
                if tf.io.gfile.exists(path):
                    with tf.io.gfile.GFile(path) as file:
                        epoch = json.loads(file.read())["epoch"]
                found = int(tf.io.gfile.exists(callback._weights_path))
                check_backup(strategy, callback.backup_dir, [found, epoch])
            original(callback)

        return restore

    def deleting(original: Callable[..., object]) -> Callable[..., object]:
        def delete(
            callback: keras.callbacks.BackupAndRestore, logs: dict[str, float] | None = None
        ) -> None:
            strategy = callback.model.distribute_strategy
            if on_several_workers(strategy):
                wait(strategy)  # for what others write beside it
            if not writes_elsewhere(callback.model):
                original(callback, logs)

        return delete

    def logging(original: Callable[..., object]) -> Callable[..., object]:
        def set_model(callback: keras.callbacks.TensorBoard, model: keras.Model) -> None:
            if writes_elsewhere(model):
                callback._folder = tempfile.TemporaryDirectory()
                callback.log_dir = callback._folder.name
            original(callback, model)

        return set_model

    backup, board = keras.callbacks.BackupAndRestore, keras.callbacks.TensorBoard
    for cls, (method, names) in _WRITING.items():
        replace(cls, method, functools.partial(elsewhere, names=names))
    replace(backup, "_load_model", restoring)
    replace(backup, "on_train_end", deleting)
    replace(board, "set_model", logging)


def replace(
    owner: type | types.ModuleType,
    name: str,
    wrapper: Callable[[Callable[..., Any]], Callable[..., object]],
) -> None:
    """Replaces a method of a class's own, or a module's function, by what is made of it, once."""
    original = vars(owner)[name]
    if getattr(original, "replaced", False):
        return
    replaced: Any = functools.wraps(original)(wrapper(original))
    replaced.replaced = True
    setattr(owner, name, replaced)
