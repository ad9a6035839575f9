"""What the extrapolated optimizers have in common: gradients taken beside the weights.

Model variables hold x_t whenever Python has control. Within a training step each replica moves its
own copies to its own point, takes its gradient there, and puts x_t back before the update; x_t is
kept as it was instead of being computed back, so that replicas stay equal to the last bit.

Here is what belongs to no framework; the adapters `ExtrapolatedOptimizer` of Keras 3
(`tf_lbopt.optimizers.extrapolated`) and tf_keras (`tf_lbopt.tf_keras.extrapolated`) have the rest.
"""

import abc
import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.aggregation.accumulation import Accumulation, MicroStep
from tf_lbopt.aggregation.replica_state import ReplicaState
from tf_lbopt.aggregation.replicas import on_each_replica, replica_number
from tf_lbopt.aggregation.sparse import merge_repeated_indices
from tf_lbopt.aggregation.sub_batches import split
from tf_lbopt.optimizers.algorithm import Algorithm, build_at_first_call
from tf_lbopt.optimizers.exclusion import path_of, tensorflow_variable
from tf_lbopt.rules.norms import Gradient, compute_dtype
from tf_lbopt.rules.rule import OWN_GRADIENT, Parameters, dense
from tf_lbopt.rules.writer import Writer

_logger = logging.getLogger(__name__)


class _Active:
    """One block of `Extrapolation.extrapolated`."""

    def __init__(self, optimizer: "Extrapolation", variables: Sequence[Any]):
        self.keys = {optimizer._var_key(variable) for variable in variables}
        self.applied = False
        self.graph = _current_graph()


def _current_graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


# Blocks of `extrapolated` that are open, by optimizer and replica.
_active: dict[tuple[int, int], _Active] = {}


class _Home:
    """Where the weights come back to: x_t of every variable, and which are not there now.

    A class of its own, so that no checkpoint has these variables.
    """

    def __init__(self, origins: list[tf.Variable], away: tf.Variable):
        self.origins = origins
        self.away = away


class _Layers:
    """What is known of a model's layers: by variable, its kind of filter. In no checkpoint."""

    def __init__(self, model: Any = None, kinds: Mapping[Any, str] | None = None):
        self.kinds = kinds or {}
        self._model = None if model is None else weakref.ref(model)

    def are_of(self, model: Any) -> bool:
        return self._model is not None and self._model() is model


class ExtrapolationAdapter(abc.ABC):
    """What an adapter of a framework provides for `Extrapolation`, beside what it does anyway."""

    @abc.abstractmethod
    def _let_wrap_training(self) -> None:
        """Makes the framework's trainer offer its training step to `wrap_training`."""

    @abc.abstractmethod
    def _build_model(self, model: Any, data: Any) -> None:
        """Creates the variables of a model that is not built yet, given a batch of its data."""

    @abc.abstractmethod
    def _kinds_of_filters(self, model: Any) -> dict[Any, str]:
        """By `_var_key`, which variables are an ``embedding`` or a ``depthwise`` kernel."""

    @abc.abstractmethod
    def _value_of(self, schedule: Any) -> tf.Tensor:
        """What a schedule, as `_schedule` returned it, says of the coming update."""

    @abc.abstractmethod
    def _serialized(self, schedule: Any) -> Any:
        """A schedule as `get_config` has it."""

    def _check_wrapper(self) -> None:  # noqa: B027  # not every framework has such a wrapper
        """Raises if what is wrapped around the optimizer leaves out updates."""


class Extrapolation(ExtrapolationAdapter, Algorithm):
    """Mix-in, placed before a base, whose gradients are taken at extrapolated weights.

    A subclass says how a replica's weights are moved: `move`. Of its arguments
    ``extrapolation_rate`` (γ̂, or ``None`` for the learning rate over k) and ``sub_batches`` (in how
    many parts each replica takes its batch) are those of this class.
    """

    statistics = (OWN_GRADIENT,)

    extrapolation_rate: Any
    sub_batches: int

    def _set_up(self, values: dict[str, Any]) -> None:
        values["extrapolation_rate"] = self._rate_or_schedule(values["extrapolation_rate"])
        super()._set_up(values)
        if self.sub_batches > 1:
            self._accumulation = Accumulation(
                self._strategy,
                self.sub_batches * (self.gradient_accumulation_steps or 1),
                self.statistics,
                parts=self.sub_batches,
            )
        keeps_past = self.keeps_past()
        self._past = _PastGradients(self._strategy, self.sub_batches) if keeps_past else None
        self._layers = _Layers()
        self._let_wrap_training()

    def keeps_past(self) -> bool:
        """Whether past gradients are needed."""
        return True

    # -- the rate ----------------------------------------------------------------------------------

    def past_of(self, own: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        """What is kept of a sub-batch's gradient until the next update."""
        del mean
        return own

    @property
    def points(self) -> int:
        """k: at how many points gradients are taken, replicas times `sub_batches`."""
        return self._strategy.num_replicas_in_sync * self.sub_batches

    def current_extrapolation_rate(self) -> tf.Tensor:
        """γ̂ of the current update, a float scalar."""
        rate = self.extrapolation_rate
        if rate is None:
            return self._read_learning_rate() / self.points
        if callable(rate):
            return self._value_of(rate)
        return tf.convert_to_tensor(rate, tf.float32)

    # -- variables ---------------------------------------------------------------------------------

    def _create_variables(self, variables: list[Any]) -> None:
        super()._create_variables(variables)
        # Not among the optimizer's variables: between steps they hold nothing worth saving.
        self._home = _Home(
            [self._untracked(variable, variable.dtype) for variable in variables],
            tf.Variable([False] * len(variables), trainable=False, name="extrapolated"),
        )
        if self._past is not None:
            for part in range(self.sub_batches):
                for index, variable in enumerate(variables):
                    dtype = compute_dtype(variable.dtype).name
                    self._past.variables[part, index] = self._untracked(variable, dtype)
            self._past.load_pending()

    def _untracked(self, variable: Any, dtype: str) -> tf.Variable:
        with self._strategy.extended.colocate_vars_with(tensorflow_variable(variable)):
            return tf.Variable(
                tf.zeros(variable.shape, dtype), trainable=False, name="extrapolation"
            )

    # -- moving there and back ---------------------------------------------------------------------

    @contextlib.contextmanager
    def extrapolated(
        self, variables: Sequence[Any] | None = None, sub_batch: int = 0
    ) -> Iterator[None]:
        """Within this block a replica's weights are at the point where its gradient is to be taken.

        `fit` does this by itself. A custom training loop takes its gradients and calls
        `apply_gradients` in the block, in the replica function:

            def replica_step(x, y):
                with optimizer.extrapolated(model.trainable_variables):
                    with tf.GradientTape() as tape:
                        loss = ...      # the replica's share of it, as for `apply`
                    gradients = tape.gradient(loss, model.trainable_variables)
                    optimizer.apply_gradients(zip(gradients, model.trainable_variables))

        Args:
            variables: What is going to be trained; by default all that the optimizer was built
                with.
            sub_batch: Which of `sub_batches` parts this is, from 0; they come in turn.

        Raises:
            ValueError: Called in the cross-replica context, for unknown variables, for a part that
                does not exist, or within another such block; or the update is not made in the
                block itself, but in a condition, loop or `tf.function` inside it.
        """
        variables = self._to_be_moved(variables, sub_batch)
        active = _Active(self, variables)
        self._in_replica(self._depart, variables, sub_batch)
        key = id(self), replica_number()
        _active[key] = active
        try:
            with self._in_micro_step(MicroStep(sub_batch, self.sub_batches)):
                yield
        except BaseException:
            if tf.executing_eagerly():
                self.recover()
            raise
        finally:
            del _active[key]
        if not active.applied:
            self._in_replica(self._return, variables)

    def _to_be_moved(self, variables: Sequence[Any] | None, sub_batch: int) -> list[Any]:
        if not 0 <= sub_batch < self.sub_batches:
            raise ValueError(
                f"`sub_batch` must be from 0 to {self.sub_batches - 1}, as sub_batches="
                f"{self.sub_batches}. Received: sub_batch={sub_batch!r}"
            )
        if self._block() is not None:
            raise ValueError(
                "`extrapolated` blocks can not be nested. Received: a block in a block"
            )
        given = build_at_first_call(self, variables, "variables")
        variables = list(self._trainable_variables) if given is None else given
        self._known_indices(variables)
        return variables

    def _in_replica(self, cross_replicas: Callable[..., None], *args: Any) -> None:
        context = tf.distribute.get_replica_context()
        if context is None:
            raise ValueError(
                "Weights are extrapolated on each replica. Expected: `extrapolated` inside the "
                "function given to `strategy.run`. Received: a call in the cross-replica context "
                "(directly under `strategy.scope()`)."
            )
        # An object of this replica's own: one that replicas share would not be per replica.
        number = tf.identity(tf.cast(context.replica_id_in_sync_group, tf.int32))
        context.merge_call(
            lambda strategy, replica: cross_replicas(strategy, replica, *args), args=(number,)
        )

    def _depart(
        self, strategy: tf.distribute.Strategy, replica: Any, variables: list[Any], sub_batch: int
    ) -> None:
        indices = self._known_indices(variables)
        rate = self.current_extrapolation_rate()

        def move(replica: tf.Tensor, rate: tf.Tensor) -> list[tf.Tensor]:
            targets = [tensorflow_variable(self._trainable_variables[index]) for index in indices]
            copies = [
                self._home.origins[index].assign(target, read_value=False)
                for index, target in zip(indices, targets, strict=True)
            ]
            # An error in mid-step is recovered from by these copies, so they must be whole.
            with tf.control_dependencies([copy for copy in copies if copy is not None]):
                moved = [index in indices for index in range(len(self._home.origins))]
                away = self._home.away.assign(moved, read_value=False)
            with tf.control_dependencies([] if away is None else [away]):
                point = replica * self.sub_batches + sub_batch
                for index in indices:
                    past = None if self._past is None else self._past.variables[sub_batch, index]
                    self.move(index, past, rate, point)
            return [tf.constant(True)]

        on_each_replica(strategy, tensorflow_variable(self._iterations), move, replica, rate)

    @abc.abstractmethod
    def move(self, index: int, past: tf.Variable | None, rate: tf.Tensor, point: tf.Tensor) -> None:
        """Moves one variable, in place, on a replica; a subclass defines it.

        Args:
            index: Of the variable.
            past: What was kept of this sub-batch's past gradient, or ``None``.
            rate: γ̂.
            point: The number of the sub-batch, from 0 to k − 1.
        """

    def _return(self, strategy: tf.distribute.Strategy, replica: Any, variables: list[Any]) -> None:
        del replica
        indices = self._known_indices(variables)

        def put_back() -> list[tf.Tensor]:
            assigned = [
                tensorflow_variable(self._trainable_variables[index]).assign(
                    self._home.origins[index].read_value(), read_value=False
                )
                for index in indices
            ]
            with tf.control_dependencies([a for a in assigned if a is not None]):
                self._home.away.assign([False] * len(self._home.origins), read_value=False)
            return [tf.constant(True)]

        on_each_replica(strategy, tensorflow_variable(self._iterations), put_back)

    def recover(self) -> None:
        """Puts x_t back after a step that ended in an error. `fit` does this by itself."""
        with tf.init_scope():
            if not self.built:
                return
            copies = self._strategy.experimental_local_results(self._home.away)
            away = np.any([copy.numpy() for copy in copies], axis=0)
            for index in map(int, np.flatnonzero(away)):
                variable = tensorflow_variable(self._trainable_variables[index])
                _assign_copies(self._strategy, variable, self._home.origins[index])
            for copy in copies:
                copy.assign(np.zeros_like(away))

    # -- the update --------------------------------------------------------------------------------

    def _prepared_update(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],
        loss_scale: Callable[[], tf.Tensor] | None = None,
        after: Callable[[tf.Tensor], None] | None = None,
        summed: bool = False,
    ) -> Callable[[], tf.Tensor]:
        active = self._block()
        self._check_wrapper()
        if active is None or active.applied:
            raise ValueError(
                f"{type(self).__name__} needs gradients that were taken at extrapolated weights. "
                "`fit` and `train_on_batch` see to it; in a custom training loop take them, and "
                "call `apply_gradients` once, in `with optimizer.extrapolated(variables):` in the "
                "replica function. Received: gradients from outside of such a block"
            )
        if active.graph is not _current_graph():
            # The way back is part of the update: a branch not taken would leave the weights away.
            raise ValueError(
                f"{type(self).__name__} must be applied in the `with optimizer.extrapolated(...):` "
                "block itself. Put the block inside the `tf.function` (the condition, the loop). "
                "Received: gradients from a `tf.function`, condition or loop inside the block"
            )
        not_moved = [v for v in variables if self._var_key(v) not in active.keys]
        if not_moved:
            raise ValueError(
                "`extrapolated` must be given all variables that are trained. "
                f"Received gradients also of {_validation.listed(map(path_of, not_moved))}"
            )
        # A gradient may be a variable itself, which is about to change.
        grads = [tf.identity(g) if _is_variable(g) else g for g in grads]
        moved = [v for v in self._trainable_variables if self._var_key(v) in active.keys]
        self._in_replica(self._return, moved)
        active.applied = True
        return super()._prepared_update(grads, variables, loss_scale, after, summed)

    def _block(self) -> _Active | None:
        return _active.get((id(self), replica_number()))

    def _write_beyond_rule(
        self,
        writer: Writer,
        parameters: Parameters,
        means: list[Gradient],
        own: list[list[Gradient]],
    ) -> None:
        super()._write_beyond_rule(writer, parameters, means, own)
        if self._past is None:
            return
        for part, own_gradients in enumerate(own):
            for index, gradient, mean in zip(parameters.indices, own_gradients, means, strict=True):
                past = self.past_of(dense(merge_repeated_indices(gradient)), dense(mean))
                writer.assign(self._past.variables[part, index], past)

    def prepare_model(self, model: Any, data: Any) -> None:
        """Makes sure that a model has variables to be moved, and finds out what its layers are.

        For random noise, whose size is that of a filter; without this, variables' names must do.

        Args:
            model: The model.
            data: A batch of its inputs, or a tuple that begins with them.
        """
        if not self._layers.are_of(model):
            self._build_model(model, data)
            self._layers = _Layers(model, self._kinds_of_filters(model))

    # -- the framework's trainer -------------------------------------------------------------------

    def wrap_training(
        self,
        model: Any,
        train_step: Callable[[Any], Any],
        make_function: Callable[[Callable[[Any], Any]], Callable[[Any], Any]],
    ) -> Callable[[Any], Any]:
        """Makes `fit`'s training function, once for every one that the framework makes.

        Args:
            model: The model.
            train_step: Its `train_step`.
            make_function: Makes a training function of a step.
        """

        @tf.autograph.experimental.do_not_convert
        def step(data: Any) -> Any:
            self.prepare_model(model, data)
            logs = None
            for part, own in enumerate(split(data, self.sub_batches, "sub_batches")):
                with self.extrapolated(model.trainable_variables, part):
                    logs = train_step(own)
            return logs

        function = make_function(step)

        def recovering(iterator: Any) -> Any:
            try:
                return function(iterator)
            except BaseException:
                self.recover()
                raise

        return recovering

    # -- configuration and state -------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        rate = self.extrapolation_rate
        rate = self._serialized(rate) if callable(rate) else rate
        return {**super().get_config(), "extrapolation_rate": rate}

    def _replica_states(self) -> dict[str, ReplicaState]:
        past = {} if self._past is None else {"past_gradients": self._past}
        return super()._replica_states() | past


class _PastGradients(ReplicaState):
    """What each replica keeps of its last gradients, a variable for each part and variable."""

    def __init__(self, strategy: tf.distribute.Strategy, parts: int):
        super().__init__(strategy)
        self._parts = parts
        self.variables: dict[tuple[int, int], tf.Variable] = {}

    def state(self) -> dict[str, tf.Variable] | None:
        if not self.variables:
            return None
        return {f"{part}.{index}": v for (part, index), v in self.variables.items()}

    def header(self) -> dict[str, Any] | None:
        return {"parts": self._parts}

    def accept(self, header: Mapping[str, Any]) -> bool:
        return header["parts"] == self._parts

    def lost(self, header: Mapping[str, Any]) -> None:
        _logger.warning(
            "The checkpoint has the past gradients of %d replicas with sub_batches=%d; here there "
            "are %d replicas and sub_batches=%d. They start empty: the next update is made without "
            "extrapolation by them, nothing else changes.",
            header["replicas"], header["parts"], self._strategy.num_replicas_in_sync, self._parts,
        )  # fmt: skip


def _assign_copies(
    strategy: tf.distribute.Strategy, target: tf.Variable, source: tf.Variable
) -> None:
    for copy, value in zip(
        strategy.experimental_local_results(target),
        strategy.experimental_local_results(source),
        strict=True,
    ):
        copy.assign(value.read_value())


def _is_variable(gradient: Any) -> bool:
    return isinstance(gradient, (keras.Variable, tf.Variable))
