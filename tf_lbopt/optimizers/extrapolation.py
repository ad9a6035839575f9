"""What the extrapolated optimizers have in common: gradients taken beside the weights.

Here is what belongs to no framework; the adapters `ExtrapolatedOptimizer` of Keras 3
(`tf_lbopt.optimizers.extrapolated`) and tf_keras (`tf_lbopt.tf_keras.extrapolated`) have the rest.
"""

import abc
import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from tf_lbopt import _validation
from tf_lbopt.aggregation.accumulation import Accumulation, MicroStep
from tf_lbopt.aggregation.replica_state import Header, ReplicaState
from tf_lbopt.aggregation.sparse import merge_repeated_indices
from tf_lbopt.aggregation.sub_batches import split
from tf_lbopt.optimizers.algorithm import Algorithm, build_at_first_call
from tf_lbopt.optimizers.hyperparameters import Arguments
from tf_lbopt.optimizers.origin import Origin, StepsInBlocks, TrainingStep, variable_like
from tf_lbopt.optimizers.trained import Gradients, Variable, path_of
from tf_lbopt.rules.extrapolation import apply_extrapolation
from tf_lbopt.rules.norms import Gradient, compute_dtype
from tf_lbopt.rules.rule import OWN_GRADIENT, Parameters, dense
from tf_lbopt.rules.writer import Writer

_logger = logging.getLogger(__name__)

Model: TypeAlias = Any  # of one of the frameworks


class ExtrapolationAdapter(abc.ABC):
    """What an adapter of a framework provides for `Extrapolation`, beside what it does anyway."""

    @abc.abstractmethod
    def _let_wrap_training(self) -> None:
        """Makes the framework's trainer offer its training step to `wrap_training`."""

    @abc.abstractmethod
    def _build_model(self, model: Model, data: object) -> None:
        """Creates the variables of a model that is not built yet, given a batch of its data."""

    @abc.abstractmethod
    def _kinds_of_filters(self, model: Model) -> dict[str, str]:
        """By `_compat.key_of`, the kinds of `filter_axes` that variables are, where no kernels.

        Raises:
            ValueError: By `refuse_layer`, a layer writes its own weights.
        """

    def refuse_layer(self, layer: Any) -> None:
        """Raises for a layer that writes trainable weights when it is called."""
        raise ValueError(
            f"{type(self).__name__} can not train a layer that writes its own trainable weights: "
            "it takes gradients at other weights and puts the weights back. Expected: no "
            f"{type(layer).__name__}. Received: a model with the layer {layer.name!r}"
        )

    @abc.abstractmethod
    def _serialized(self, schedule: Callable[..., tf.Tensor]) -> object:
        """A schedule as `get_config` has it."""


class Extrapolation(StepsInBlocks, ExtrapolationAdapter, Algorithm):
    """Mix-in, placed before a base, whose gradients are taken at ``x − γ̂ ζ + β v``.

    A subclass says what ζ is, by `noise_of`, and v, by `look_ahead`. Of its arguments
    ``extrapolation_rate`` (γ̂, or ``None`` for the learning rate over k) and ``sub_batches`` (in how
    many parts each replica takes its batch) are those of this class.
    """

    statistics = (OWN_GRADIENT,)
    batch_can_grow = False

    extrapolation_rate: Any
    sub_batches: int

    def _set_up(self, values: Arguments) -> None:
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
        # By model, what is known of the filters of its variables.
        self._filters: weakref.WeakKeyDictionary[Model, dict[str, str]] = (
            weakref.WeakKeyDictionary()
        )
        self._let_wrap_training()

    def keeps_past(self) -> bool:
        """Whether past gradients are needed."""
        return True

    @abc.abstractmethod
    def noise_of(self, index: int, past: tf.Variable | None, point: tf.Tensor) -> tf.Tensor:
        """ζ of one variable, on a replica; a subclass defines it.

        Args:
            index: Of the variable.
            past: What was kept of this sub-batch's past gradient, or ``None``.
            point: The number of the sub-batch, from 0 to k − 1.
        """

    def look_ahead(self, index: int) -> tuple[tf.Variable | None, float]:
        """What β v is of one variable, as v and β; ``None`` for v = 0."""
        del index
        return None, 0.0

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
        if hasattr(rate, "get_config"):  # a schedule, of one of the frameworks
            return tf.convert_to_tensor(rate(self.iterations))
        return tf.convert_to_tensor(rate() if callable(rate) else rate, tf.float32)

    def _create_variables(self, variables: list[Variable]) -> None:
        super()._create_variables(variables)
        self._origin = Origin(self._strategy, self.trained.targets)
        if self._past is not None:
            self._past.create(self.trained.targets)

    # -- the block ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def extrapolated(
        self,
        variables: Sequence[Variable] | None = None,
        sub_batch: int = 0,
        noisy: bool = True,
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
            noisy: Whether ζ is taken; without it the point is x + β v, as in the local steps of
                `PostLocalSGD`.

        Raises:
            ValueError: Called in the cross-replica context, for unknown variables, for a part that
                does not exist, or within another such block; or the update is not made in the
                block itself, but in a condition, loop or `tf.function` inside it.
        """
        if not 0 <= sub_batch < self.sub_batches:
            raise ValueError(
                f"`sub_batch` must be from 0 to {self.sub_batches - 1}, as sub_batches="
                f"{self.sub_batches}. Received: sub_batch={sub_batch!r}"
            )
        given = build_at_first_call(self, variables, "variables")
        variables = self.trained.variables if given is None else given
        indices = self._known_indices(variables)
        with (
            self._in_block("extrapolated", indices) as block,
            self._in_micro_step(MicroStep(sub_batch, self.sub_batches)),
        ):
            replica = tf.distribute.get_replica_context()
            number = 0 if replica is None else replica.replica_id_in_sync_group
            # An object of this replica's own: one that they share would not be per replica.
            point = tf.identity(tf.cast(number, tf.int32)) * self.sub_batches + sub_batch
            self._on_each_replica(functools.partial(self._move, indices, sub_batch, noisy), point)
            yield
            if not block.applied:
                self._on_each_replica(lambda: self._origin.restore(indices))

    def _move(self, indices: list[int], sub_batch: int, noisy: bool, point: tf.Tensor) -> None:
        """Moves weights to where a sub-batch's gradient is taken, on one replica."""
        rate = self.current_extrapolation_rate() if noisy else tf.constant(0.0)
        with tf.control_dependencies(self._origin.save(indices)), self._origin.left(indices):
            for index in indices:
                past = None if self._past is None else self._past.variables[sub_batch, index]
                noise = self.noise_of(index, past, point) if noisy else None
                velocity, momentum = self.look_ahead(index)
                apply_extrapolation(self.trained.targets[index], velocity, noise, rate, momentum)

    def recover(self) -> None:
        """Puts x_t back after a step that ended in an error. `fit` does this by itself."""
        with tf.init_scope():
            if self.built:
                self._origin.recover()

    # -- the update --------------------------------------------------------------------------------

    def _prepared_update(
        self, grads: Gradients, variables: Sequence[Variable], *args: Any, **kwargs: Any
    ) -> Callable[[], tf.Tensor]:
        block = self._block_of_update(
            "extrapolated",
            f"{type(self).__name__} needs gradients that were taken at extrapolated weights. "
            "`fit` and `train_on_batch` see to it; in a custom training loop take them, and "
            "call `apply_gradients` once, in `with optimizer.extrapolated(variables):` in the "
            "replica function. Received: gradients from outside of such a block",
        )
        indices = self._known_indices(variables)
        not_moved = [v for v, n in zip(variables, indices, strict=True) if n not in block.indices]
        if not_moved:
            raise ValueError(
                "`extrapolated` must be given all variables that are trained. "
                f"Received gradients also of {_validation.listed(map(path_of, not_moved))}"
            )
        # A gradient may be a variable itself, which is about to change.
        grads = [tf.identity(g) if isinstance(g, Variable) else g for g in grads]
        self._on_each_replica(lambda: self._origin.restore(block.indices))
        block.applied = True
        return super()._prepared_update(grads, variables, *args, **kwargs)

    def _write_own(
        self,
        writer: Writer,
        parameters: Parameters,
        means: list[Gradient],
        own: list[list[Gradient]],
    ) -> None:
        if self._past is None:
            return
        for part, own_gradients in enumerate(own):
            for index, gradient, mean in zip(parameters.indices, own_gradients, means, strict=True):
                past = self.past_of(dense(merge_repeated_indices(gradient)), dense(mean))
                writer.assign(self._past.variables[part, index], past)

    # -- the framework's trainer -------------------------------------------------------------------

    def prepare_model(self, model: Model, data: object) -> None:
        """Makes sure that a model has variables to be moved, and finds out what its layers are.

        For random noise, whose size is that of a filter; without this, variables' names must do.
        `fit` and the recipes call it.

        Args:
            model: The model.
            data: A batch of its inputs, or a tuple that begins with them.

        Raises:
            ValueError: A layer (`SpectralNormalization`) writes its own weights.
        """
        if model not in self._filters:
            self._build_model(model, data)
            self._filters[model] = self._kinds_of_filters(model)

    def wrap_training(
        self,
        model: Model,
        train_step: TrainingStep,
        make_function: Callable[[TrainingStep], TrainingStep],
    ) -> TrainingStep:
        """Makes `fit`'s training function, once for every one that the framework makes.

        Args:
            model: The model.
            train_step: Its `train_step`.
            make_function: Makes a training function of a step.
        """

        @tf.autograph.experimental.do_not_convert
        def step(data: object) -> object:
            self.prepare_model(model, data)
            logs = None
            for part, own in enumerate(split(data, self.sub_batches, "sub_batches")):
                with self.extrapolated(model.trainable_variables, part):
                    logs = train_step(own)
            return logs

        return self._recovering(make_function(step))

    # -- configuration and state -------------------------------------------------------------------

    def get_config(self) -> dict[str, object]:
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

    def create(self, targets: Sequence[tf.Variable]) -> None:
        """Makes the variables, and restores what was loaded before."""
        self.variables = {
            (part, index): variable_like(self._strategy, target, compute_dtype(target.dtype))
            for part in range(self._parts)
            for index, target in enumerate(targets)
        }
        self.load_pending()

    def state(self) -> dict[str, tf.Variable] | None:
        if not self.variables:
            return None
        return {f"{part}.{index}": v for (part, index), v in self.variables.items()}

    def header(self) -> Header:
        return {"parts": self._parts}

    def accept(self, header: Header) -> bool:
        return header["parts"] == self._parts

    def lost(self, header: Header) -> None:
        _logger.warning(
            "The checkpoint has the past gradients of %d replicas with sub_batches=%d; here there "
            "are %d replicas and sub_batches=%d. They start empty: the next update is made without "
            "extrapolation by them, nothing else changes.",
            header["replicas"], header["parts"], self._strategy.num_replicas_in_sync, self._parts,
        )  # fmt: skip
