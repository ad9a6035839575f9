"""Post-local SGD for Keras 3: synchronous at first, then local steps and averages of the weights.

In the local phase model variables hold the last average whenever Python has control. Each
replica's own weights are in a variable of their own and come into the model's only within a step.
Which kind of step is made, and when weights are averaged, is decided in Python between steps, so
that the graph of a local step is free of collectives.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.aggregation.replica_state import ReplicaState
from tf_lbopt.aggregation.replicas import (
    bundle,
    on_each_replica,
    replica_context_of,
    replica_number,
    sum_over_replicas,
)
from tf_lbopt.optimizers.algorithm import build_at_first_call, without_missing
from tf_lbopt.optimizers.around import AroundOptimizer, stock_update
from tf_lbopt.optimizers.exclusion import tensorflow_variable
from tf_lbopt.optimizers.extrap_sgd import ExtrapSGD
from tf_lbopt.optimizers.local_state import LocalState, count_of
from tf_lbopt.rules.bounds import is_rate
from tf_lbopt.rules.extrapolation import apply_extrapolation
from tf_lbopt.rules.norms import all_finite, compute_dtype, norms
from tf_lbopt.rules.rule import OWN_GRADIENT, Parameters, Step, Update
from tf_lbopt.rules.writer import Writer

# What a local step can not do, or not without mixing up the replicas.
_REFUSED = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


class _Block:
    """One block of `PostLocalSGD.step`."""

    def __init__(self, local: bool):
        self.local = local
        self.applied = False


# Blocks of `step` that are open, by optimizer and replica.
_open: dict[tuple[int, int], _Block] = {}


@keras.saving.register_keras_serializable(package="tf_lbopt")
class PostLocalSGD(AroundOptimizer):
    """Post-local SGD: synchronous for `start` updates, then local steps, averaged now and then.

    The first `start` updates are the inner optimizer's. After that every replica d takes steps on
    its own weights, with the gradient of its own share of the batch and its own momentum,

        v_d ← β v_d − η g_d(x_d),  x_d ← x_d + v_d          (for `keras.optimizers.SGD`)

    at the learning rate that the inner optimizer's schedule gives for `iterations`, which counts
    all updates; every `period` updates x_d ← (1/k) Σ x_d over the k replicas. Nothing of the size
    of the weights is exchanged in between. Momentum stays each replica's own.

    Around `ExtrapSGD` the first phase is extrapolated SGD. In the local phase the past gradients
    are left out, and a step is Nesterov's on the replica's own x, v and g (the combination of the
    paper's Table 2; Algorithm 2 in its appendix is not at hand, this is how section 5.2 and
    Algorithm 1 are read): g_d is taken at x_d + β v_d if `nesterov`, else at x_d;
    v_d ← β v_d − η ρ (g_d + λ x_d), with the trust ratio ρ of x_d and g_d + λ x_d if
    `trust_coefficient` is set; x_d ← x_d + v_d.

    Model variables hold the last average whenever Python has control, also after an error or
    interrupt in mid-step, and are then equal on all replicas. `evaluate`, `predict`, saving and
    exporting the model or its weights and the end of an epoch in `fit` (before validation and
    callbacks) average first, and that is the end of a period: the next one has `period` updates
    again. A `tf.train.Checkpoint` that is written in between stores the last average and all that
    is each replica's own, so that training resumes exactly on as many replicas; on others it goes
    on from the last average, with a warning. Weights that are loaded or set in between are what
    all replicas go on from, and the period begins anew (with a warning where it was `fit` that
    found them changed: a callback that writes weights after every batch would end no period).

    A gradient that is not finite discards the update on all replicas in the first phase. In the
    local phase the replica that has it leaves out its step, while `iterations` goes on; it is
    counted in `skipped_updates` when weights are averaged. A replica whose weights have become
    NaN or Inf (by an update that overflows) goes back to the last average, without momentum, and
    counts as one more. Squares of gradients that overflow and a learning rate that is none (NaN,
    negative) count as gradients that are not finite. Around a stock optimizer a step that overflows
    is made: in the first phase, and on a single replica, it leaves Inf or NaN in the weights.

    How this differs from other implementations: the authors' own keeps each replica's momentum
    from the first update on, before the switch too (here the first phase has the one momentum of
    synchronous training, from which all replicas start), and averages when the count of all updates
    is a multiple of H (here after every H local updates, counted from `start`). PyTorch's averager
    averages after the first local step already.

    On a single replica there is nothing to average: there this is the inner optimizer at all
    times, without a local phase.

    `fit` needs nothing but `compile`; in the local phase it reads a few counters between steps and
    so waits for each step to end. `steps_per_execution` must be 1. For custom training loops see
    `step`. Each replica needs memory for two further copies of the trained weights.

    Args:
        inner_optimizer: A `keras.optimizers.SGD` or `ExtrapSGD`, not yet built, with its learning
            rate or schedule, momentum, weight decay and exclusions. Clipping, `use_ema`,
            `loss_scale_factor`, `gradient_accumulation_steps` and `sub_batches` > 1 are not
            supported.
        start: After how many updates the local phase begins, ≥ 0.
        period: H ≥ 1, the number of local updates from one average to the next.
        average_momentum: Whether momentum is averaged with the weights. Defaults to `False`.
        name: The optimizer's name. Defaults to the class's, made unique.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the inner
            optimizer is of another kind, overrides `update_step`, is built, was created outside of
            the strategy's scope or has a setting that is not supported; a LossScaleOptimizer is
            put around this one (Keras does so under the policy "mixed_float16"; "mixed_bfloat16"
            needs none).

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, use_bias=False)])
        >>> model.set_weights([np.ones([2, 1])])
        >>> optimizer = PostLocalSGD(keras.optimizers.SGD(0.1, momentum=0.9), start=1, period=4)
        >>> model.compile(optimizer=optimizer, loss="mse")
        >>> x, y = np.eye(2), np.zeros([2, 1])
        >>> _ = model.fit(x, y, batch_size=2, epochs=3, verbose=0)
        >>> [round(float(w), 4) for w in model.get_weights()[0].ravel()]
        [0.486, 0.486]

    References:
        Lin, Stich, Patel, Jaggi 2020, "Don't Use Large Mini-Batches, Use Local SGD"
        (arXiv:1808.07217); Lin, Kong, Stich, Jaggi 2020, "Extrapolation for Large-batch Training
        in Deep Learning" (arXiv:2006.05720), section 5.2 and Table 2.
    """

    # It uses the replicas' own gradients: what gives an optimizer only their mean is refused.
    statistics = (OWN_GRADIENT,)
    steps_of_its_own = True

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        start: int,
        period: int,
        average_momentum: bool = False,
        name: str | None = None,
    ):
        _check_inner(inner_optimizer)
        start = _validation.integer("start", start, low=0)
        period = _validation.integer("period", period, low=1)
        average_momentum = _validation.boolean("average_momentum", average_momentum)
        super().__init__(inner_optimizer, name=name)
        self.start = start
        self.period = period
        self.average_momentum = average_momentum
        # One set of counters: the schedule's updates are those that decide about the phase.
        self._iterations = inner_optimizer._iterations
        if isinstance(inner_optimizer, ExtrapSGD):
            self.skipped_updates = inner_optimizer.skipped_updates
        self._updates_since_average = self._add_counter("updates_since_average")
        self._warned = False
        self._local = LocalState(
            self._strategy,
            self._updates_since_average,
            lambda: self._made() > self.start,
        )
        _compat.let_optimizers_wrap_training()
        _compat.tell_optimizers_of_weights()

    # -- the inner optimizer -----------------------------------------------------------------------

    @property
    def variables(self) -> list[keras.Variable]:
        """The inner optimizer's variables and its own counters."""
        inner = list(self.inner_optimizer.variables)
        if isinstance(self.inner_optimizer, ExtrapSGD):
            return [*inner, self._updates_since_average]
        return [*inner, self.skipped_updates, self._updates_since_average]

    def expect_loss_scaling(self, right_across_replicas: bool) -> None:
        """Refuses a wrapper that scales the loss."""
        del right_across_replicas
        raise ValueError(
            "PostLocalSGD does not support loss scaling: a LossScaleOptimizer can not be put "
            "around it, nor `loss_scale_factor` set. Use the dtype policy 'mixed_bfloat16', which "
            "needs none, in the place of 'mixed_float16'."
        )

    def _create_variables(self, variables: list[Any]) -> None:
        super()._create_variables(variables)
        inner = self.inner_optimizer
        inner.build(variables)
        if isinstance(inner, ExtrapSGD):
            momenta = inner._slots.get("momentum", [])
        else:
            momenta = inner.momentums
        self._local.create(
            [tensorflow_variable(variable) for variable in self._trainable_variables],
            [tensorflow_variable(momentum) for momentum in momenta],
        )

    # -- which kind of step ------------------------------------------------------------------------

    @property
    def is_local(self) -> bool:
        """Whether the next update is a local step; to be read before each update.

        Raises:
            ValueError: A period is over but the weights were not averaged, or the last step ended
                in an error.
        """
        local = self._next_is_local()
        if local and self._local.updates() >= self.period:
            raise ValueError(
                f"The period={self.period} updates since the last average are made: call "
                "`optimizer.end_update()` after each update, outside of `tf.function`"
            )
        if local and self._local.is_away():
            raise ValueError(
                "The last local step ended in an error: call `optimizer.recover()` before the next"
            )
        return local

    def _next_is_local(self) -> bool:
        self._local.settle()
        if self._strategy.num_replicas_in_sync == 1:
            return False
        if self._made() >= self.start:
            self._local.momenta_differ = True
            return True
        if self._local.momenta_differ:  # `iterations` was set back
            self.end_period()
            self._local.unite_momenta()
        return False

    def _made(self) -> int:
        """How many updates were made."""
        return count_of(self._strategy, tensorflow_variable(self._iterations))

    def end_update(self) -> None:
        """Averages the weights if a period is over; a custom loop calls it after each update."""
        if self._local.updates() >= self.period:
            self.end_period()

    def end_period(self) -> None:
        """Averages the weights now, if replicas have taken local steps since the last average.

        The next period has `period` updates again. `evaluate`, `predict`, saving and `fit`'s end of
        an epoch do this by themselves; a custom loop calls it before it uses the weights.

        Raises:
            ValueError: Called inside a `tf.function`.
        """
        if tf.inside_function():
            raise ValueError(
                "Whether weights are to be averaged is decided between steps. Expected: "
                "`end_update` and `end_period` called outside of `tf.function`"
            )
        self._local.settle()
        if self.built and self._local.updates():
            with self._strategy.scope():
                self._averaging()

    def before_reading_weights(self) -> None:
        """Called when the weights are used; see `_compat.tell_optimizers_of_weights`."""
        self.end_period()

    def after_writing_weights(self) -> None:
        """Called when weights were loaded; see `_compat.tell_optimizers_of_weights`."""
        if self.built:
            self._local.restart()

    # -- custom training loops ---------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, variables: Sequence[Any] | None = None, *, local: bool) -> Iterator[None]:
        """Within this block a replica takes its gradient and applies it.

        `fit` does this by itself. A custom training loop has one trace for each kind of step:

            @tf.function
            def train_step(x, y, local):
                def replica_step(x, y):
                    with optimizer.step(model.trainable_variables, local=local):
                        with tf.GradientTape() as tape:
                            loss = loss_fn(y, model(x, training=True))  # a keras.losses.Loss
                        gradients = tape.gradient(loss, model.trainable_variables)
                        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
                strategy.run(replica_step, args=(x, y))

            for x, y in data:
                train_step(x, y, local=optimizer.is_local)
                optimizer.end_update()
            optimizer.end_period()          # before the weights are used

        The loss is the replica's mean divided by the number of replicas. A Keras `Loss` object
        divides by itself; with a function divide by `strategy.num_replicas_in_sync`.

        After an error in `train_step`, `recover` puts the average back.

        Args:
            variables: What is going to be trained; by default all that the optimizer was built
                with.
            local: Whether the step is local: `is_local`, read outside of the `tf.function`.

        Raises:
            TypeError: `local` is no Python boolean.
            ValueError: Called in the cross-replica context, unbuilt without variables, or within
                another such block.
        """
        local = _validation.boolean("local", local)
        if (id(self), replica_number()) in _open:
            raise ValueError("`step` blocks can not be nested. Received: a block in a block")
        variables = build_at_first_call(self, variables, "variables")
        if local and self._strategy.num_replicas_in_sync > 1:
            with self._departed():
                yield
        elif isinstance(self.inner_optimizer, ExtrapSGD):
            with self.inner_optimizer.extrapolated(variables), self._marked(local=False):
                yield
        else:
            with self._marked(local=False):
                yield

    @contextlib.contextmanager
    def _departed(self) -> Iterator[None]:
        self._merge(self._depart)
        try:
            with self._marked(local=True) as block:
                yield
        except BaseException:
            if tf.executing_eagerly():
                self.recover()
            raise
        if not block.applied:
            self._merge(self._return)

    @contextlib.contextmanager
    def _marked(self, local: bool) -> Iterator[_Block]:
        key = id(self), replica_number()
        _open[key] = block = _Block(local)
        try:
            yield block
        finally:
            del _open[key]

    def recover(self) -> None:
        """Puts the average back after a step that ended in an error. `fit` does this by itself."""
        with tf.init_scope():
            if not self.built:
                return
            if isinstance(self.inner_optimizer, ExtrapSGD):
                self.inner_optimizer.recover()
            self._local.recover(
                [tensorflow_variable(v) for v in self._trainable_variables],
                tensorflow_variable(self._iterations),
            )

    def wrap_training(
        self,
        model: keras.Model,
        train_step: Callable[[Any], Any],
        make_function: Callable[[Callable[[Any], Any]], Callable[[Any], Any]],
    ) -> Callable[[Any], Any]:
        """Makes `fit`'s training function; see `_compat.let_optimizers_wrap_training`.

        Args:
            model: The model.
            train_step: Its `train_step`.
            make_function: Makes a training function of a step.

        Raises:
            ValueError: The model is compiled with `steps_per_execution` > 1.
        """
        if model.steps_per_execution != 1:
            raise ValueError(
                "PostLocalSGD decides between steps which kind the next one is: "
                "`steps_per_execution` must be 1. "
                f"Received: steps_per_execution={model.steps_per_execution!r}"
            )

        @tf.autograph.experimental.do_not_convert
        def synchronous_step(data: Any) -> Any:
            with self._marked(local=False):
                return train_step(data)

        @tf.autograph.experimental.do_not_convert
        def local_step(data: Any) -> Any:
            with self.step(model.trainable_variables, local=True):
                return train_step(data)

        inner = self.inner_optimizer
        if isinstance(inner, ExtrapSGD):
            synchronous = inner.wrap_training(model, synchronous_step, make_function)
        else:
            synchronous = make_function(synchronous_step)
        local = make_function(local_step)

        def training(iterator: Any) -> Any:
            self.end_update()  # an interrupt may have come between a step and this
            function = local if self._next_is_local() else synchronous
            before = self._local.updates()
            try:
                logs = function(iterator)
                self._warn_of_lost_updates(before)
                self.end_update()
            except BaseException:
                self.recover()
                raise
            return logs

        return training

    def _warn_of_lost_updates(self, before: int) -> None:
        """Warns once if weights were written in mid-period, of which ``before`` updates were."""
        if self._warned or before < 1 or self._local.updates() != 1:
            return
        self._warned = True
        warnings.warn(
            "Weights were changed between two local steps of PostLocalSGD: all replicas go on from "
            f"them, and the replicas' own updates since the last average ({before}) are lost. A "
            "callback that changes weights after every batch keeps the local phase from training: "
            "let it do so at the end of an epoch, or set period=1.",
            stacklevel=2,
        )

    # -- the update --------------------------------------------------------------------------------

    def _prepared_update(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],
        loss_scale: Callable[[], tf.Tensor] | None = None,
        after: Callable[[tf.Tensor], None] | None = None,
        summed: bool = False,
    ) -> Any:
        block = _open.get((id(self), replica_number()))
        if block is None or block.applied:
            raise ValueError(
                "PostLocalSGD must know before a step whether it is local. `fit` and "
                "`train_on_batch` see to it; in a custom training loop take gradients, and call "
                "`apply_gradients` once, in `with optimizer.step(variables, local=...):` in the "
                "replica function. Received: gradients from outside of such a block"
            )
        block.applied = True
        if not block.local:
            if isinstance(self.inner_optimizer, ExtrapSGD):
                return self.inner_optimizer._prepared_update(grads, variables, loss_scale, after)
            return super()._prepared_update(grads, variables, loss_scale, after, summed)
        self._known_indices(variables)
        pairs = without_missing(grads, variables)
        indices = self._known_indices([variable for _, variable in pairs])
        replicas = self._strategy.num_replicas_in_sync
        own = [_own_gradient(g, tensorflow_variable(v), replicas) for g, v in pairs]
        return lambda: self._merge(
            lambda strategy, *gradients: self._update_locally(strategy, indices, gradients), *own
        )

    def _merge(self, cross_replicas: Callable[..., Any], *args: Any) -> Any:
        return replica_context_of(self._strategy).merge_call(cross_replicas, args=args)

    def _depart(self, strategy: tf.distribute.Strategy) -> None:
        def move() -> list[tf.Tensor]:
            targets = [tensorflow_variable(v) for v in self._trainable_variables]
            self._local.depart(targets)
            inner = self.inner_optimizer
            if isinstance(inner, ExtrapSGD) and inner.nesterov:
                for index, target in enumerate(targets):
                    (velocity,) = inner._slots_of([index]).get("momentum", [None])
                    apply_extrapolation(target, velocity, None, 0.0, inner.momentum)
            return [tf.constant(True)]

        on_each_replica(strategy, tensorflow_variable(self._iterations), move)

    def _return(self, strategy: tf.distribute.Strategy) -> None:
        def put_back() -> list[tf.Tensor]:
            self._put_back()
            return [tf.constant(True)]

        on_each_replica(strategy, tensorflow_variable(self._iterations), put_back)

    def _put_back(self) -> list[Any]:
        return self._local.put_back([tensorflow_variable(v) for v in self._trainable_variables])

    def _update_locally(
        self, strategy: tf.distribute.Strategy, indices: Sequence[int], gradients: Sequence[Any]
    ) -> tf.Tensor:
        anchor = tensorflow_variable(self._iterations)
        gradient_norms = on_each_replica(
            strategy, anchor, lambda *local: [norms(local)], *gradients
        )
        everywhere = list(gradient_norms[0])
        rate = self._read_learning_rate()

        def update(rate: tf.Tensor, *local: tf.Tensor) -> list[tf.Tensor]:
            *own, own_norms = local
            # Not before all replicas have their gradients: an error in one leaves all as they are.
            with tf.control_dependencies(everywhere):
                finite = all_finite(own_norms)
            computed = self._local_update(indices, own, own_norms, rate)
            sound = finite & computed.sound

            def write(where: tf.Tensor | None = None) -> tf.Tensor:
                writer = Writer(where)
                computed.write(writer)
                return writer.complete()

            if _compat.in_xla_context():
                written = write(sound)
            else:
                written = tf.cond(sound, write, lambda: tf.constant(False))
            self._local.skipped.assign_add(tf.cast(~written, tf.int64))
            with tf.control_dependencies([written]):
                back = self._put_back()
            with tf.control_dependencies(back):
                tensorflow_variable(self._iterations).assign_add(1)
                self._local.count()
            return [finite]

        (finite,) = on_each_replica(
            strategy, anchor, update, rate, *gradients, *bundle(gradient_norms)
        )
        return finite[0]

    def _local_update(
        self,
        indices: Sequence[int],
        gradients: Sequence[tf.Tensor],
        gradient_norms: tf.Tensor,
        rate: tf.Tensor,
    ) -> Update:
        """One step of a replica, whose model variables are at the point of the gradient."""
        inner = self.inner_optimizer
        if not isinstance(inner, ExtrapSGD):
            variables = [self._trainable_variables[index] for index in indices]
            targets = [tensorflow_variable(variable) for variable in variables]
            stock = stock_update(inner, gradients, gradient_norms, variables)

            def write(writer: Writer) -> None:
                stock.write(writer)
                self._constrain(writer, indices, targets)
                for index, target in zip(indices, targets, strict=True):
                    writer.assign(self._local.weights[index], target.read_value())

            return Update(stock.sound & is_rate(rate), write)
        variables = [self._trainable_variables[index] for index in indices]
        parameters = Parameters(
            indices=indices,
            variables=[self._local.weights[index] for index in indices],
            gradients=gradients,
            gradient_norms=gradient_norms,
            norm_bounds=gradient_norms,
            slots=inner._slots_of(indices),
            decayed=[inner.decays(variable) for variable in variables],
            adapted=[inner.adapts(variable) for variable in variables],
        )
        update = inner.rule().update(parameters, Step(rate, tf.convert_to_tensor(self._iterations)))

        def write_parameters(writer: Writer) -> None:
            update.write(writer)
            self._constrain(writer, indices, parameters.variables)

        return Update(update.sound & is_rate(rate), write_parameters)

    # -- averaging ---------------------------------------------------------------------------------

    @functools.cached_property
    def _averaging(self) -> Callable[[], None]:
        # Not a `tf.function` itself, which a SavedModel of the model would take for its own.
        return functools.partial(tf.function(self._average))

    @tf.autograph.experimental.do_not_convert
    def _average(self) -> None:
        # In a replica function, the only place where a TPU has the replicas' own copies.
        self._strategy.run(lambda: self._merge(self._average_replicas))

    def _average_replicas(self, strategy: tf.distribute.Strategy) -> None:
        """One packed all-reduce (for each dtype); in the cross-replica context."""
        state = self._local
        anchor = tensorflow_variable(self._iterations)
        targets = [tensorflow_variable(v) for v in self._trainable_variables]
        momenta = state.momenta if self.average_momentum else []

        def contribution() -> list[tf.Tensor]:
            finite = all_finite(norms([tf.convert_to_tensor(w) for w in state.weights]))
            tf.cond(finite, lambda: tf.constant(True), state.give_up)
            values = [
                tf.cast(variable.read_value(), compute_dtype(variable.dtype))
                for variable in (*state.weights, *momenta)
            ]
            return [*values, tf.cast(state.skipped.read_value(), tf.float32)]

        own = bundle(on_each_replica(strategy, anchor, contribution))
        totals = sum_over_replicas(strategy, own, [*targets, *momenta, anchor])

        def write(*local: tf.Tensor) -> list[tf.Tensor]:
            *sums, skipped = local
            for variable, total in zip((*targets, *momenta), sums, strict=True):
                mean = total / strategy.num_replicas_in_sync
                variable.assign(tf.cast(mean, variable.dtype))
            self._constrain(Writer(), range(len(targets)), targets)
            counter = tensorflow_variable(self.skipped_updates)
            counter.assign_add(tf.cast(skipped, counter.dtype))
            state.begin_period()
            return [tf.constant(True)]

        on_each_replica(strategy, anchor, write, *totals)

    # -- configuration and state -------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, for Keras serialization."""
        return {
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "start": self.start,
            "period": self.period,
            "average_momentum": self.average_momentum,
            "name": self.name,
        }

    def _replica_states(self) -> dict[str, ReplicaState]:
        return super()._replica_states() | {"local_state": self._local}


def _own_gradient(gradient: Any, variable: tf.Variable, replicas: int) -> tf.Tensor:
    """The gradient of a replica's own mean loss, dense; what arrives is that by the replicas.

    An object of the replica's own, as `merge_call` wants it.
    """
    dtype = compute_dtype(variable.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        gradient = tf.math.unsorted_segment_sum(
            tf.cast(gradient.values, dtype), gradient.indices, variable.shape[0]
        )
    return tf.cast(gradient, dtype) * replicas


def _check_inner(inner: Any) -> None:
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(
            "`inner_optimizer` must be a keras.optimizers.SGD, of Keras 3, or a "
            "tf_lbopt.ExtrapSGD. "
            f"Received: inner_optimizer={_validation.shown(inner)}"
        )
    received = f"Received: {type(inner).__name__}"
    if not isinstance(inner, (keras.optimizers.SGD, ExtrapSGD)):
        raise ValueError(
            "`inner_optimizer` must be a keras.optimizers.SGD or a tf_lbopt.ExtrapSGD: local steps "
            f"are not supported for other optimizers. {received}"
        )
    if isinstance(inner, keras.optimizers.SGD) and (
        type(inner).update_step is not keras.optimizers.SGD.update_step
    ):
        raise ValueError(
            "`inner_optimizer` must not override `update_step`, which local steps do not call. "
            "(tf_lbopt.ExtrapSGD with extrapolation_rate=0.0 is SGD with coupled weight decay.) "
            f"{received}"
        )
    if inner.built:
        raise ValueError(f"`inner_optimizer` must not be built yet. {received}, built")
    for name in _REFUSED:
        if getattr(inner, name, None):
            raise ValueError(
                f"`{name}` is not supported in local steps: the `inner_optimizer` must not have "
                f"it. {received} with {name}={getattr(inner, name)!r}"
            )
    if getattr(inner, "sub_batches", 1) > 1:
        raise ValueError(
            "`sub_batches` > 1 is not supported in local steps: a replica takes its batch as one. "
            f"{received} with sub_batches={inner.sub_batches!r}"
        )
