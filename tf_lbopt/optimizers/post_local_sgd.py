"""Post-local SGD for Keras 3: synchronous at first, then local steps and averages of the weights.

Each replica's own weights are in variables of their own, and come into the model's only within a
step. Which kind of step is made, and when weights are averaged, is decided in Python between steps,
so that the graph of a local step is free of collectives.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_lbopt import _compat, _validation
from tf_lbopt.aggregation.pipeline import prepared
from tf_lbopt.aggregation.replica_state import ReplicaState
from tf_lbopt.aggregation.replicas import bundle, on_each_replica, sum_over_replicas
from tf_lbopt.optimizers.algorithm import build_at_first_call, without_missing
from tf_lbopt.optimizers.around import AroundOptimizer, require_new_and_plain
from tf_lbopt.optimizers.base import LargeBatchOptimizer
from tf_lbopt.optimizers.extrapolation import Extrapolation
from tf_lbopt.optimizers.local_state import LocalState
from tf_lbopt.optimizers.origin import StepsInBlocks, TrainingStep
from tf_lbopt.optimizers.trained import Gradients, Variable, tensorflow_variable
from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.norms import Gradient, all_finite, compute_dtype, norms
from tf_lbopt.rules.rule import OWN_GRADIENT
from tf_lbopt.rules.writer import Writer


@keras.saving.register_keras_serializable(package="tf_lbopt")
class PostLocalSGD(StepsInBlocks, AroundOptimizer):
    """Post-local SGD: synchronous for `start` updates, then local steps, averaged now and then.

    The first `start` updates are the inner optimizer's. After that every replica d takes the inner
    optimizer's steps on its own weights and slots, with the gradient of its own share of the batch:
    for momentum SGD

        v_d ← β v_d − η g_d(x_d),  x_d ← x_d + v_d

    at the learning rate that the inner optimizer's schedule gives for `iterations`, which counts
    all updates; every `period` updates x_d ← (1/k) Σ x_d over the k replicas. Nothing of the size
    of the weights is exchanged in between. Slots stay each replica's own.

    Around `ExtrapSGD` the first phase is extrapolated SGD. In the local phase the past gradients
    are left out, and a step is Nesterov's on the replica's own x, v and g (the combination of the
    paper's Table 2; Algorithm 2 in its appendix is not at hand, this is how section 5.2 and
    Algorithm 1 are read): g_d is taken at x_d + β v_d if `nesterov`, else at x_d;
    v_d ← β v_d − η ρ (g_d + λ x_d), with the trust ratio ρ of x_d and g_d + λ x_d if
    `trust_coefficient` is set; x_d ← x_d + v_d. Around `ExtrapAdam` it is Adam's step.

    Model variables hold the last average whenever Python has control, also after an error or
    interrupt in mid-step, and are then equal on all replicas. `fit` averages at its end. Before
    that `tf_lbopt.callbacks.EndPeriod` does, before validation and at the end of each epoch, and
    in a training loop of your own `end_period`; that is the end of a period, and the next one has
    `period` updates again. `evaluate` in mid-period sees the last average and so does what is
    saved; a warning says so once, and how many steps are missing. (`predict`, `export`,
    `get_weights` and HDF5 files of whole models are not noticed.)

    Files and a `tf.train.Checkpoint` that are written in mid-period store the last average and all
    that is each replica's own, so that training resumes exactly on as many replicas; on others it
    goes on from the last average, with a warning. Weights that are loaded or set in between are
    what all replicas go on from, and the period begins anew (with a warning where it was `fit` that
    found them changed: a callback that writes weights after every batch would end no period). To be
    seen as such they must differ from the last average.

    A gradient that is not finite discards the update on all replicas in the first phase. In the
    local phase the replica that has it leaves out its step, while `iterations` goes on; it is
    counted in `skipped_updates` when weights are averaged. A replica whose weights have become
    NaN or Inf (by an update that overflows) goes back to the last average, without slots, and
    counts as one more. Squares of gradients that overflow and a learning rate that is none (NaN,
    negative) count as gradients that are not finite. Around a stock optimizer a step that overflows
    is made: in the first phase, and on a single replica, it leaves Inf or NaN in the weights.

    How this differs from others: the authors' own code keeps each replica's momentum from the first
    update on (here the first phase has the one momentum of synchronous training, from which all
    replicas start), and averages when the count of all updates is a multiple of H (here after every
    H local updates, counted from `start`). PyTorch's averager averages after the first local step
    already.

    On a single replica there is nothing to average: there this is the inner optimizer at all
    times, without a local phase.

    `fit` needs nothing but `compile`; in the local phase it reads a few counters between steps and
    so waits for each step to end. `steps_per_execution` must be 1. For custom training loops see
    `step`. Each replica needs memory for two further copies of the trained weights.

    Args:
        inner_optimizer: Any optimizer of `tf_lbopt` or `keras.optimizers` that needs no statistics
            over sub-batches and is not around another, not yet built, with its learning rate or
            schedule, momentum, weight decay and exclusions. Clipping, `use_ema`,
            `loss_scale_factor`, `gradient_accumulation_steps` and `sub_batches` > 1 are not
            supported.
        start: After how many updates the local phase begins, ≥ 0.
        period: H ≥ 1, the number of local updates from one average to the next.
        average_momentum: Whether slots (momentum, moments) are averaged with the weights. Defaults
            to `False`.
        name: The optimizer's name. Defaults to the class's, made unique.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range; the inner
            optimizer needs statistics, is around another, is built, was created outside of the
            strategy's scope or has a setting that is not supported; a LossScaleOptimizer is
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
    batch_can_grow = False
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
        if isinstance(inner_optimizer, LargeBatchOptimizer):
            self.skipped_updates = inner_optimizer.skipped_updates
        self._updates_since_average = self._add_counter("updates_since_average")
        self._local = LocalState(
            self._strategy, self.iterations, self.skipped_updates, self._updates_since_average
        )
        self._warned_of_lost_updates = False
        _compat.let_optimizers_wrap_training()

    # -- the inner optimizer -----------------------------------------------------------------------

    @property
    def variables(self) -> list[keras.Variable]:
        """The inner optimizer's variables and its own counters."""
        inner = list(self.inner_optimizer.variables)
        counters = [self.skipped_updates, self._updates_since_average]
        return [*inner, *(own for own in counters if not any(own is v for v in inner))]

    def expect_loss_scaling(self, right_across_replicas: bool) -> None:
        """Refuses a wrapper that scales the loss."""
        del right_across_replicas
        raise ValueError(
            "PostLocalSGD does not support loss scaling: a LossScaleOptimizer can not be put "
            "around it, nor `loss_scale_factor` set. Use the dtype policy 'mixed_bfloat16', which "
            "needs none, in the place of 'mixed_float16'."
        )

    def watch_squared_norms(self, rows: int, of_examples: bool = False) -> None:
        """Refused: in a local step nothing of the gradients is summed over the replicas."""
        raise ValueError(
            "GradientNoiseScale needs an optimizer that sums gradients over the replicas in every "
            "update: measure with the inner optimizer alone. Received: PostLocalSGD"
        )

    def _create_variables(self, variables: list[Variable]) -> None:
        super()._create_variables(variables)
        inner = self.inner_optimizer
        inner.build(variables)
        rate = inner.learning_rate  # of what it keeps in floating point all else is slots
        slots = [
            tensorflow_variable(variable)
            for variable in inner.variables
            if variable is not rate and tf.as_dtype(variable.dtype).is_floating
        ]
        alone = self._strategy.num_replicas_in_sync == 1
        self._local.create([] if alone else self.trained.targets, slots)

    # -- which kind of step ------------------------------------------------------------------------

    @property
    def is_local(self) -> bool:
        """Whether the next update is a local step; to be read before each update.

        Raises:
            ValueError: A period is over but the weights were not averaged, or the last step ended
                in an error.
        """
        local = self._next_is_local()
        if local and self._local.steps() >= self.period:
            raise ValueError(
                f"The period={self.period} updates since the last average are made: call "
                "`optimizer.end_update()` after each update, outside of `tf.function`"
            )
        if local and self.built and self._local.origin.moved().any():
            raise ValueError(
                "The last local step ended in an error: call `optimizer.recover()` before the next"
            )
        return local

    def _next_is_local(self) -> bool:
        self._local.settle()
        if self._strategy.num_replicas_in_sync == 1:
            return False
        if self._local.count_of(self._local.iterations) >= self.start:
            self._local.apart = True
            return True
        if self._local.apart:  # `iterations` was set back
            self.end_period()
            self._local.unite()
        return False

    def end_update(self) -> None:
        """Averages the weights if a period is over; a custom loop calls it after each update."""
        if self._local.steps() >= self.period:
            self.end_period()

    def end_period(self) -> None:
        """Averages the weights now, if replicas have taken local steps since the last average.

        The next period has `period` updates again. `fit` does this at its end, and before that
        with `tf_lbopt.callbacks.EndPeriod`; a custom loop calls it before it uses the weights.

        Raises:
            ValueError: Called inside a `tf.function`.
        """
        if tf.inside_function():
            raise ValueError(
                "Whether weights are to be averaged is decided between steps. Expected: "
                "`end_update` and `end_period` called outside of `tf.function`"
            )
        self._local.settle()
        if self.built and self._local.steps():
            self._local.apart = True
            with self._strategy.scope():
                self._averaging()

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Averages the weights, at the end of `fit`.

        Args:
            var_list: The variables that are trained.
        """
        super().finalize_variable_values(var_list)
        self.end_period()

    # -- custom training loops ---------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, variables: Sequence[Variable] | None = None, *, local: bool) -> Iterator[None]:
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
                another such block; or the update is not made in the block itself, but in a
                condition, loop or `tf.function` inside it.
        """
        local = _validation.boolean("local", local) and self._strategy.num_replicas_in_sync > 1
        with self._in_block("step", local=local) as block:
            variables = build_at_first_call(self, variables, "variables")
            if local:
                self._on_each_replica(self._local.enter)
            inner = self.inner_optimizer
            if isinstance(inner, Extrapolation):
                with inner.extrapolated(variables, noisy=not local):
                    yield
            else:
                yield
            if local and not block.applied:
                self._on_each_replica(self._local.origin.restore)

    def recover(self) -> None:
        """Puts the average back after a step that ended in an error. `fit` does this by itself."""
        with tf.init_scope():
            if not self.built:
                return
            if isinstance(self.inner_optimizer, Extrapolation):
                self.inner_optimizer.recover()
            self._local.recover()

    # -- Keras's trainer ---------------------------------------------------------------------------

    def wrap_training(
        self,
        model: keras.Model,
        train_step: TrainingStep,
        make_function: Callable[[TrainingStep], TrainingStep],
    ) -> TrainingStep:
        """Makes `fit`'s training function; see `Extrapolation.wrap_training`.

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
        def synchronous_step(data: object) -> object:
            with self._in_block("step"):
                return train_step(data)

        @tf.autograph.experimental.do_not_convert
        def local_step(data: object) -> object:
            with self.step(model.trainable_variables, local=True):
                return train_step(data)

        inner = self.inner_optimizer
        if isinstance(inner, Extrapolation):
            synchronous = inner.wrap_training(model, synchronous_step, make_function)
        else:
            synchronous = make_function(synchronous_step)
        local = make_function(local_step)

        def training(iterator: object) -> object:
            self.end_update()  # an interrupt may have come between a step and this
            function = local if self._next_is_local() else synchronous
            before = self._local.steps()
            logs = function(iterator)
            self._warn_of_lost_updates(before)
            self.end_update()
            return logs

        return self._recovering(training)

    def before_evaluation(self) -> None:
        """Warns in mid-period; see `_compat.let_optimizers_wrap_training`."""
        self._local.warn_if_behind("evaluated")

    def _warn_of_lost_updates(self, before: int) -> None:
        """Warns once if weights were written in mid-period, of which ``before`` updates were."""
        if self._warned_of_lost_updates or before < 1 or self._local.steps() != 1:
            return
        self._warned_of_lost_updates = True
        warnings.warn(
            "Weights were changed between two local steps of PostLocalSGD: all replicas go on from "
            f"them, and the replicas' own updates since the last average ({before}) are lost. A "
            "callback that changes weights after every batch keeps the local phase from training: "
            "let it do so at the end of an epoch, or set period=1.",
            stacklevel=2,
        )

    # -- the update --------------------------------------------------------------------------------

    def _prepared_update(
        self, grads: Gradients, variables: Sequence[Variable], *args: Any, **kwargs: Any
    ) -> Callable[[], tf.Tensor]:
        block = self._block_of_update(
            "step",
            "PostLocalSGD must know before a step whether it is local. `fit` and "
            "`train_on_batch` see to it; in a custom training loop take gradients, and call "
            "`apply_gradients` once, in `with optimizer.step(variables, local=...):` in the "
            "replica function. Received: gradients from outside of such a block",
        )
        block.applied = True
        inner = self.inner_optimizer
        ours = isinstance(inner, LargeBatchOptimizer)
        update_by = inner._prepared_update if ours else super()._prepared_update
        if not block.local:
            return update_by(grads, variables, *args, **kwargs)
        pairs = without_missing(grads, variables)
        variables = [variable for _, variable in pairs]
        targets = [tensorflow_variable(variable) for variable in variables]
        dtypes = [compute_dtype(target.dtype) for target in targets]
        own = prepared([gradient for gradient, _ in pairs], targets, dtypes)
        before = [tf.identity(c) for c in (self._local.iterations, self._local.skipped_updates)]
        own = self._merge(self._own_gradients, *own)
        # The synchronous update, but that nothing is summed, of the weights that are in the model.
        update = update_by(own, variables, summed=True)

        def update_and_leave() -> tf.Tensor:
            finite = update()
            self._on_each_replica(self._local.leave, *before)
            return finite

        return update_and_leave

    def _own_gradients(
        self, strategy: tf.distribute.Strategy, *gradients: Gradient
    ) -> list[Gradient]:
        """The gradients of each replica's own mean loss.

        Not before all replicas have theirs: an error in one leaves all as they are.
        """
        replicas = strategy.num_replicas_in_sync
        everywhere = tf.nest.flatten(
            [strategy.experimental_local_results(gradient) for gradient in gradients],
            expand_composites=True,
        )

        def ready(*own: Gradient) -> list[Gradient]:
            with tf.control_dependencies(everywhere):
                return [scale(gradient, tf.cast(replicas, gradient.dtype)) for gradient in own]

        return bundle(on_each_replica(strategy, self._local.iterations, ready, *gradients))

    # -- averaging ---------------------------------------------------------------------------------

    @functools.cached_property
    def _averaging(self) -> Callable[[], None]:
        @tf.autograph.experimental.do_not_convert
        def average() -> None:
            # In a replica function, the only place where a TPU has the replicas' own copies.
            self._strategy.run(lambda: self._merge(self._average_replicas))

        # Not a `tf.function` itself, which a SavedModel of the model would take for its own.
        return functools.partial(tf.function(average))

    def _average_replicas(self, strategy: tf.distribute.Strategy) -> None:
        """One packed all-reduce (for each dtype); in the cross-replica context."""
        state = self._local
        slots = state.slots if self.average_momentum else []

        def contribution() -> list[tf.Tensor]:
            state.adopt()
            finite = all_finite(norms([tf.convert_to_tensor(w) for w in state.weights]))
            tf.cond(finite, lambda: tf.constant(True), state.give_up)
            values = [
                tf.cast(variable.read_value(), compute_dtype(variable.dtype))
                for variable in (*state.weights, *slots)
            ]
            return [*values, tf.cast(state.skipped.read_value(), tf.float32)]

        own = bundle(on_each_replica(strategy, state.iterations, contribution))
        targets = [*state.targets, *slots]
        totals = sum_over_replicas(strategy, own, [*targets, state.iterations])

        def write(*local: tf.Tensor) -> list[tf.Tensor]:
            *sums, skipped = local

            def average() -> tf.Tensor:
                for variable, total in zip(targets, sums, strict=True):
                    mean = total / strategy.num_replicas_in_sync
                    variable.assign(tf.cast(mean, variable.dtype))
                self._constrain(Writer(), range(len(state.targets)), state.targets)
                return tf.constant(True)

            # Not weights that were set in mid-period, which all replicas have by now.
            tf.cond(tf.equal(state.since_average, 0), lambda: tf.constant(False), average)
            state.skipped_updates.assign_add(tf.cast(skipped, tf.int64))
            state.skipped.assign(0)
            state.since_average.assign(0)
            return [tf.constant(True)]

        on_each_replica(strategy, state.iterations, write, *totals)

    # -- configuration and state -------------------------------------------------------------------

    def get_config(self) -> dict[str, object]:
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


def _check_inner(inner: object) -> None:
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(
            "`inner_optimizer` must be an optimizer of tf_lbopt or keras.optimizers, of Keras 3. "
            f"Received: inner_optimizer={_validation.shown(inner)}"
        )
    received = f"Received: {type(inner).__name__}"
    needed = set(getattr(inner, "statistics", ())) - {OWN_GRADIENT}
    if needed or hasattr(inner, "inner_optimizer") or hasattr(inner, "optimizers"):
        raise ValueError(
            "`inner_optimizer` must need nothing but a gradient: optimizers with statistics over "
            "sub-batches, and those around others, are not supported in local steps. "
            f"{received}"
        )
    # A local step can not do these, or not without mixing up the replicas.
    require_new_and_plain(
        inner, "is not supported in local steps: the `inner_optimizer` must not have it"
    )
    if getattr(inner, "sub_batches", 1) > 1:
        raise ValueError(
            "`sub_batches` > 1 is not supported in local steps: a replica takes its batch as one. "
            f"{received} with sub_batches={inner.sub_batches!r}"
        )
