"""What every optimizer is before it belongs to a framework.

What an optimizer computes is its rule (`tf_lbopt.rules`); how gradients reach it is the pipeline
(`tf_lbopt.aggregation`). Here are the variables, the update, the exclusions and the state; what
knows the constructor, the variables and the saving of one framework is an adapter:
`tf_lbopt.optimizers.base.LargeBatchOptimizer` for Keras 3, and that of `tf_lbopt.tf_keras.base`.
"""

import abc
import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from tf_lbopt import _compat, _validation
from tf_lbopt.aggregation.accumulation import Accumulation, MicroStep
from tf_lbopt.aggregation.pipeline import Pipeline, Sums, prepared
from tf_lbopt.aggregation.replica_state import ReplicaState
from tf_lbopt.aggregation.replicas import (
    OfReplica,
    inside_scope,
    once_for_all_replicas,
    replica_context_of,
    sum_over_replicas,
)
from tf_lbopt.aggregation.sparse import divide, merge_repeated_indices
from tf_lbopt.optimizers import saved_state
from tf_lbopt.optimizers.declared import Declared
from tf_lbopt.optimizers.exclusion import Exclusion, listed
from tf_lbopt.optimizers.hyperparameters import Arguments, LearningRate
from tf_lbopt.optimizers.squared_norms import SquaredNorms, WithSquaredNorms
from tf_lbopt.optimizers.trained import Gradients, Trained, Variable, path_of, tensorflow_variable
from tf_lbopt.rules.bounds import is_rate, squares_fit
from tf_lbopt.rules.clip import clip, scale
from tf_lbopt.rules.gsnr import SubBatchStatistics
from tf_lbopt.rules.norms import Gradient, all_finite, norms, widest
from tf_lbopt.rules.rule import (
    MEAN_NORM,
    MEAN_SQUARED_NORM,
    Parameters,
    Rule,
    Step,
    add_decay,
    dense,
)
from tf_lbopt.rules.writer import Writer

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Optimizer = TypeVar("_Optimizer", bound="Algorithm")

_micro_steps: OfReplica[MicroStep] = OfReplica()
"""Which micro-step is being traced, where that is known."""


@dataclasses.dataclass(frozen=True)
class Common:
    """What the parts of an update have in common.

    Attributes:
        step: The rate and the number of the update.
        finite: Whether all gradients are finite.
        sound: Whether that and the rate allow the update.
        scaled_by: The factor in the gradients, or ``None`` for 1.
        divisor: What the sums of the gradients are divided by, or ``None`` for 1.
        mean_norms: [n], the norms of all mean gradients.
        squared_norms: Those of the sub-batches' gradients, or ``None`` where nobody asks.
        norms_of_adapted: As in `Parameters`.
        with_decay: As there.
    """

    step: Step
    finite: tf.Tensor
    sound: tf.Tensor
    scaled_by: tf.Tensor | None
    divisor: tf.Tensor | None
    mean_norms: tf.Tensor
    squared_norms: SquaredNorms | None
    norms_of_adapted: tf.Tensor | None = None
    with_decay: tuple[list[Gradient], tf.Tensor] | None = None


class Algorithm(WithSquaredNorms, Declared, saved_state.SavedState, abc.ABC):
    """Base of all optimizers, which belongs to no framework.

    An adapter of a framework stands behind it in the line of inheritance, in front of the
    framework's optimizer, and defines the methods of the section "what an adapter provides".
    """

    gradient_accumulation_steps: int | None
    weight_decay: float | None
    skipped_updates: Variable
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None

    # Of the framework's optimizer.
    built: bool
    iterations: Variable

    reduction = staticmethod(sum_over_replicas)
    """How the replicas' gradients become one."""
    batch_can_grow: ClassVar[bool] = True
    """Whether `accumulation_steps` can be set, under accumulation."""

    trained: Trained
    """The variables that it was built with; there is none before `build`."""

    def _set_up(self, values: Arguments) -> None:
        framework = {name: values.pop(name) for name in self.common_arguments}
        jit_update = framework.pop("jit_compile")
        self._start(self._rate_or_schedule(values.pop("learning_rate", 0.0)), framework)
        self._jit_update = jit_update
        decay, adaptation = "exclude_from_weight_decay", "exclude_from_layer_adaptation"
        self._decay_exclusion = Exclusion(decay, values.pop(decay, None))
        self._adaptation_exclusion = Exclusion(adaptation, values.pop(adaptation, None))
        # `weight_decay` is among them: the framework's base class would apply it a second time,
        # decoupled.
        for name, value in values.items():
            setattr(self, name, value)
        self.skipped_updates = self._add_counter("skipped_updates")
        self._strategy = tf.distribute.get_strategy()
        if self.statistics or self.gradient_accumulation_steps:
            self._check_strategy()
        self._let_checkpoints_say_whose()
        self._accumulation = (
            Accumulation(
                self._strategy,
                self.gradient_accumulation_steps,
                self.statistics,
            )
            if self.gradient_accumulation_steps
            else None
        )

    def _check_strategy(self) -> None:
        # Workers of the latter are no replicas to it: it says that it has one.
        kinds = (
            tf.distribute.experimental.CentralStorageStrategy,
            tf.distribute.ParameterServerStrategy,
        )
        if isinstance(self._strategy, kinds):
            raise ValueError(
                f"{type(self).__name__} keeps something for each replica (statistics of the "
                "sub-batches, or accumulated gradients), which needs a strategy with a copy of the "
                "variables on each, such as MirroredStrategy. Received: "
                f"{type(self._strategy).__name__}, gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}"
            )

    def own_slots(self) -> tuple[str, ...]:
        """The slots that it keeps with the current hyper-parameters."""
        return self.rule().slot_names()

    # -- what an adapter provides ------------------------------------------------------------------

    @abc.abstractmethod
    def _start(self, learning_rate: LearningRate, arguments: Arguments) -> None:
        """Calls the framework's constructor; sets `gradient_accumulation_steps`.

        Args:
            learning_rate: A float, or what `_schedule` has returned.
            arguments: Values of the `common_arguments`.
        """

    @abc.abstractmethod
    def _schedule(self, learning_rate: LearningRate) -> LearningRate:
        """What the framework takes as a learning rate that is no number."""

    @abc.abstractmethod
    def _add_counter(self, name: str) -> Variable:
        """A new integer variable among the framework's optimizer variables."""

    @abc.abstractmethod
    def _add_slot(self, variable: Variable, name: str) -> Variable:
        """A new variable like a trainable one, in the dtype of the arithmetic on it."""

    @abc.abstractmethod
    def _build_framework(self, variables: list[Variable]) -> None:
        """The framework's own part of `build`."""

    @abc.abstractmethod
    def _read_learning_rate(self) -> tf.Tensor:
        """The rate of the update that is being made, in the cross-replica context."""

    # -- variables ---------------------------------------------------------------------------------

    def build(self, variables: Sequence[Variable]) -> None:
        """Creates the slots (and accumulators) for a list of trainable variables.

        Raises:
            ValueError: The variables live under another strategy than the optimizer, or are
                overwritten by their gradients (float8 scales).
        """
        if self.built:
            return
        variables = list(variables)
        for variable in variables:
            self._check_trainable(variable)
        with inside_scope(self._strategy):
            self._create_variables(variables)

    def _create_variables(self, variables: list[Variable]) -> None:
        self._build_framework(variables)
        slots: dict[str, list[tf.Variable]] = {name: [] for name in self.own_slots()}
        targets = [tensorflow_variable(variable) for variable in variables]
        for variable, target in zip(variables, targets, strict=True):
            with self._strategy.extended.colocate_vars_with(target):
                for name, of_all in slots.items():
                    of_all.append(tensorflow_variable(self._add_slot(variable, name)))
        self._decay_exclusion.build(variables)
        self._adaptation_exclusion.build(variables)
        self.trained = Trained(
            variables,
            targets,
            slots,
            decayed=[self.decays(variable) for variable in variables],
            adapted=[self.adapts(variable) for variable in variables],
            iterations=tensorflow_variable(self.iterations),
            skipped_updates=tensorflow_variable(self.skipped_updates),
            on_gpu=any(":GPU:" in target.device for target in targets),
        )
        if self._accumulation is not None:
            # The last of all: without accumulation the others have the same places.
            self._pending_micro_steps = self._add_counter("pending_micro_steps")
            self._accumulation.micro_step = tensorflow_variable(self._pending_micro_steps)
            if self.batch_can_grow and self._accumulation.grows:
                self._accumulation.let_grow()

    def _check_trainable(self, variable: Variable) -> None:
        check_floating(self, variable)
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                f"{type(self).__name__} can not train variables that are overwritten by their "
                f"gradients (float8 scales). Received: {path_of(variable)}"
            )
        if not self._strategy.extended.variable_created_in_scope(tensorflow_variable(variable)):
            raise ValueError(
                f"{type(self).__name__} must be created under the strategy of the variables that "
                "it trains: call its constructor inside `with strategy.scope():`. Received: the "
                f"variable {path_of(variable)}, which was not created under the optimizer's "
                f"strategy ({type(self._strategy).__name__})."
            )

    # -- the update --------------------------------------------------------------------------------

    def _prepared_update(
        self,
        grads: Gradients,
        variables: Sequence[Variable],
        loss_scale: Callable[[], tf.Tensor] | None = None,
        after: Callable[[tf.Tensor], None] | None = None,
        summed: bool = False,
    ) -> Callable[[], tf.Tensor]:
        """Prepares the update by this replica's gradients.

        Args:
            grads: One per variable: dense, ``tf.IndexedSlices`` or ``None``.
            variables: Variables that the optimizer was built with.
            loss_scale: Reads the factor in the gradients, on each replica; ``None`` for 1.
            after: Told on each replica, once per update, whether the gradients were finite.
            summed: Whether the gradients are sums over the replicas already.

        Returns:
            What makes the update, or adds to the accumulators, when all replicas call it. It
            returns whether the gradients were finite; true before an update is due.

        Raises:
            ValueError: Not called in a replica context of the optimizer's strategy, or with a
                variable twice.
        """
        known = self._known_indices(variables)
        if len(set(known)) < len(known):
            twice = next(
                v for v, index in zip(variables, known, strict=True) if known.count(index) > 1
            )
            raise ValueError(
                "Each variable must be given once (what two models share is among the variables of "
                f"both). Received: {path_of(twice)} more than once"
            )
        pairs = without_missing(grads, variables)
        if len(pairs) < len(known):
            known = self._known_indices([variable for _, variable in pairs])
        context = replica_context_of(self._strategy)
        trained = self.trained
        targets = [trained.targets[index] for index in known]
        compiles = trained.on_gpu if self._jit_update == "auto" else self._jit_update
        update = self._compiled if compiles else self._update_on_replica
        pipeline = Pipeline(
            strategy=self._strategy,
            indices=known,
            variables=targets,
            paths=[
                path if getattr(variable, "trainable", True) else None
                for path, variable in zip(trained.paths, trained.variables, strict=True)
            ],
            anchor=trained.iterations,
            statistics=self.statistics,
            micro_step=self._micro_step(),
            accumulation=self._accumulation,
            summed=summed,
            prepare=self._read_learning_rate,
            reduction=self.reduction,
            update=functools.partial(update, known, loss_scale, after),
        )
        own = prepared(
            [gradient for gradient, _ in pairs],
            targets,
            [trained.dtypes[index] for index in known],
        )
        own_norms = self._gradient_norms([variable for _, variable in pairs], loss_scale)
        own_squares = None
        if self._watch_of_norms is not None or MEAN_SQUARED_NORM in self.statistics:
            own = [merge_repeated_indices(gradient) for gradient in own]
            scaled_by = 1.0 if loss_scale is None else loss_scale()
            own_squares = self._own_squares(known, own, scaled_by)
        return functools.partial(
            context.merge_call, pipeline.run, args=(own, own_norms, own_squares)
        )

    def _compiled(
        self,
        known: Sequence[int],
        loss_scale: Callable[[], tf.Tensor] | None,
        after: Callable[[tf.Tensor], None] | None,
        anchor: tf.Variable,
        learning_rate: tf.Tensor,
        sums: Sums,
    ) -> list[tf.Tensor]:
        """The update on one replica as one program that XLA compiles, or as one and a part beside.

        Not where all is compiled already, nor where it runs eagerly: a program for each update.
        """
        update = functools.partial(self._update_on_replica, known, loss_scale, after, anchor)
        if tf.executing_eagerly() or _compat.in_xla_context() or _compat.in_tpu_replica():
            return update(learning_rate, sums)
        sparse = [n for n, total in enumerate(sums.totals) if isinstance(total, tf.IndexedSlices)]
        if not sparse or self._jit_update is True:
            return _program(update)(learning_rate, _dense(sums))
        if len(sparse) == len(known) or not self.rule().separable:
            return update(learning_rate, sums)
        return self._update_in_two_parts(known, loss_scale, after, sparse, learning_rate, sums)

    def _update_on_replica(
        self,
        known: Sequence[int],
        loss_scale: Callable[[], tf.Tensor] | None,
        after: Callable[[tf.Tensor], None] | None,
        anchor: tf.Variable,
        learning_rate: tf.Tensor,
        sums: Sums,
    ) -> list[tf.Tensor]:
        """The update on one replica: tensors and variables, no communication.

        Compiled by XLA it has no condition: what is written is ``where(sound, new, old)``.
        """
        del anchor
        sums = _merged(sums)
        rule = self.rule()
        clips = (self.clipnorm, self.clipvalue, self.global_clipnorm) != (None, None, None)
        as_it_is = loss_scale is None and self._accumulation is None and not clips
        compiled = _compat.in_xla_context()
        beside: dict[str, Any] = {}
        if compiled:  # without conditions, norms are taken where they are used
            of_totals = norms(sums.totals)
        else:
            of_totals, beside = self._norms_together(rule, known, sums.totals, as_it_is)
        common = self._common(known, learning_rate, sums, of_totals, loss_scale)
        common = dataclasses.replace(common, **beside)
        judged, write = self._planned(rule, known, sums, common)
        sound = common.sound & judged
        complete = write(sound) if compiled else tf.cond(sound, write, lambda: tf.constant(False))
        return self._finished(common, sound, complete, after)

    def _norms_together(
        self, rule: Rule, known: Sequence[int], totals: Sequence[Gradient], as_it_is: bool
    ) -> tuple[tf.Tensor, dict[str, Any]]:
        """All norms that an update will take, as far as they can be told before it.

        What is computed together has one condition (`tf_lbopt.rules.norms`).

        Args:
            rule: With the present hyper-parameters.
            known: For each gradient the number of its variable.
            totals: The sums of the gradients.
            as_it_is: Whether the rule is given these, neither divided nor clipped.

        Returns:
            [n], the norms of the totals, and `Common.norms_of_adapted` and `with_decay`.
        """
        targets = [self.trained.targets[index] for index in known]
        weights, with_decay, lengthened = [], [], []
        if rule.takes_weight_norms:
            adapted = [self.trained.adapted[index] for index in known]
            weights = list(itertools.compress(targets, adapted))
        if rule.takes_norms_with_decay and as_it_is:
            decayed = [self.trained.decayed[index] for index in known]
            with_decay = add_decay(totals, targets, decayed, self.weight_decay or 0.0)
            lengthened = list(itertools.compress(with_decay, decayed))
        found = norms([*totals, *weights, *lengthened])
        end = len(totals) + len(weights)
        return found[: len(totals)], {
            "norms_of_adapted": found[len(totals) : end] if weights else None,
            "with_decay": (with_decay, found[end:]) if lengthened else None,
        }

    def _update_in_two_parts(
        self,
        known: Sequence[int],
        loss_scale: Callable[[], tf.Tensor] | None,
        after: Callable[[tf.Tensor], None] | None,
        sparse: Sequence[int],
        learning_rate: tf.Tensor,
        sums: Sums,
    ) -> list[tf.Tensor]:
        """The same, but that XLA compiles the part of the dense gradients.

        Args:
            known: For each gradient the number of its variable.
            loss_scale: As in `_prepared_update`.
            after: As there.
            sparse: The places of sparse gradients among them.
            learning_rate: η.
            sums: Of all gradients.
        """
        sums = _merged(sums)
        rest = [place for place in range(len(known)) if place not in sparse]
        parts = [sums.at(rest), sums.at(sparse)]
        found = [_program(norms)(parts[0].totals), norms(parts[1].totals)]
        dtype = widest([part.dtype for part in found])
        joined = tf.concat([tf.cast(part, dtype) for part in found], 0)
        total_norms = tf.gather(joined, np.argsort([*rest, *sparse]))
        common = self._common(known, learning_rate, sums, total_norms, loss_scale)
        numbers = [known[place] for place in sparse]
        others = [n for n in range(len(self.trained.targets)) if n not in numbers]
        rule = self.rule()
        sparse_judged, write_sparse = self._planned(
            rule, numbers, parts[1], common, sparse, numbers
        )

        @_program
        def compiled() -> tuple[tf.Tensor, tf.Tensor]:
            indices = [known[place] for place in rest]
            judged, write = self._planned(rule, indices, parts[0], common, rest, others)
            sound = common.sound & sparse_judged & judged
            return sound, write(sound)

        sound, complete = compiled()
        complete &= tf.cond(sound, write_sparse, lambda: tf.constant(False))
        return self._finished(common, sound, complete, after)

    def _common(
        self,
        known: Sequence[int],
        learning_rate: tf.Tensor,
        sums: Sums,
        total_norms: tf.Tensor,
        loss_scale: Callable[[], tf.Tensor] | None,
    ) -> Common:
        finite = all_finite(total_norms)
        if sums.norms is not None:  # others may have computed these
            finite &= all_finite(sums.norms)
        # The mean gradient of the loss itself: without the loss scale, over all micro-steps.
        divisor = scaled_by = None if loss_scale is None else loss_scale()
        steps: tf.Tensor | float = 1.0
        if self._accumulation is not None:
            steps = self._accumulation.divisor()
            divisor = steps if scaled_by is None else steps * scaled_by
        squared_norms = None
        if sums.squares is not None:
            scale_of_sums = 1.0 if scaled_by is None else scaled_by
            squared_norms = self._squared_norms(
                known, sums.squares, total_norms, scale_of_sums, steps
            )
        return Common(
            step=Step(learning_rate, tf.convert_to_tensor(self.trained.iterations)),
            finite=finite,
            sound=finite & is_rate(learning_rate),
            scaled_by=scaled_by,
            divisor=divisor,
            mean_norms=(
                total_norms
                if divisor is None
                else total_norms / tf.cast(divisor, total_norms.dtype)
            ),
            squared_norms=squared_norms,
        )

    def _planned(
        self,
        rule: Rule,
        indices: Sequence[int],
        sums: Sums,
        common: Common,
        places: Sequence[int] | None = None,
        averaged: Sequence[int] | None = None,
    ) -> tuple[tf.Tensor, Callable[..., tf.Tensor]]:
        """Computes an update, or a part of it, up to what is decided from norms.

        Args:
            rule: With the present hyper-parameters.
            indices: For each gradient the number of its variable.
            sums: Of the part's gradients.
            common: What the parts have in common.
            places: Of the part's gradients among all; ``None`` if these are all.
            averaged: The numbers of the variables whose averages it writes; ``None`` for all.

        Returns:
            Whether it can be made, a boolean scalar; and what writes it, given the argument of a
            `Writer`, and returns whether all was written.
        """
        trained, divisor = self.trained, common.divisor
        base = getattr(rule, "base", rule)  # of VRGD
        momentum = getattr(base, "momentum", 0.0) if "momentum" in base.slots else 0.0
        if momentum and "momentum" not in trained.slots:
            raise ValueError(
                "`momentum` was 0 when the optimizer was built, so that it has no variables for "
                f"it. Expected: 0, or a new optimizer. Received: momentum={momentum}"
            )
        means = sums.totals if divisor is None else [divide(g, divisor) for g in sums.totals]
        mean_norms = common.mean_norms
        if places is not None:
            dtype = widest([mean.dtype for mean in means])
            mean_norms = tf.cast(tf.gather(mean_norms, places), dtype)
        gradients, gradient_norms = clip(
            means,
            mean_norms,
            self.clipnorm,
            self.clipvalue,
            self.global_clipnorm,
            common.mean_norms,
        )
        sound = tf.constant(True)
        statistics = None
        if sums.deviations is not None:
            # The deviations contain the loss scale; and the mean that makes the update counts a
            # sub-batch without gradients as zero, that from which they deviate leaves it out.
            factor = self._replicas() * tf.math.reciprocal_no_nan(sums.live)
            factor = factor if divisor is None else factor * divisor
            statistics = SubBatchStatistics(means, sums.deviations, sums.live, factor)
            unit = tf.cast(tf.maximum(factor, 1.0), mean_norms.dtype)
            sound = squares_fit(mean_norms * unit, [gradient.dtype for gradient in gradients])
        parameters = Parameters(
            indices=indices,
            variables=[trained.targets[index] for index in indices],
            gradients=gradients,
            gradient_norms=gradient_norms,
            norm_bounds=gradient_norms,
            slots={name: [of[index] for index in indices] for name, of in trained.slots.items()},
            decayed=[trained.decayed[index] for index in indices],
            adapted=[trained.adapted[index] for index in indices],
            statistics=statistics,
            norms_of_adapted=common.norms_of_adapted,
            with_decay=common.with_decay,
            mean_norms=(
                self._mean_norms(sums, mean_norms, common.scaled_by)
                if MEAN_NORM in self.statistics
                else None
            ),
        )
        update = rule.update(parameters, common.step)

        def write(where: tf.Tensor | None = None) -> tf.Tensor:
            writer = Writer(where)
            update.write(writer)
            self._constrain(writer, indices, parameters.variables)
            if sums.own:
                self._write_own(writer, parameters, means, self._own_means(sums, divisor))
            if self.use_ema:
                self._average(writer, common.step, averaged)
            return writer.complete()

        return sound & update.sound, write

    def _finished(
        self,
        common: Common,
        made: tf.Tensor,
        complete: tf.Tensor,
        after: Callable[[tf.Tensor], None] | None,
    ) -> list[tf.Tensor]:
        """Counts an update, whether it was made or not, and whether all of it was written."""
        self.trained.iterations.assign_add(tf.cast(made, self.trained.iterations.dtype))
        self.trained.skipped_updates.assign_add(tf.cast(~complete, tf.int64))
        if self._accumulation is not None:
            self._accumulation.finish()
        if self._watch_of_norms is not None and common.squared_norms is not None:
            self._watch_of_norms.note(common.squared_norms, made)
        if after is not None:
            after(common.finite)
        return [common.finite]

    def _mean_norms(
        self, sums: Sums, norms_of_means: tf.Tensor, scaled_by: tf.Tensor | None
    ) -> tf.Tensor:
        """[n], the means over the live sub-batches of the norms of the loss's own gradients."""
        if sums.norms is None:
            return norms_of_means
        factor = self._replicas() * tf.math.reciprocal_no_nan(sums.live)
        factor = factor if scaled_by is None else factor / scaled_by
        return tf.cast(sums.norms * tf.cast(factor, sums.norms.dtype), norms_of_means.dtype)

    def _own_means(self, sums: Sums, divisor: tf.Tensor | None) -> list[list[Gradient]]:
        """Of each of this replica's own sub-batches the mean gradient: of its own loss."""
        parts = 1 if self._accumulation is None else self._accumulation.parts
        factor = float(self._replicas() * parts)
        if divisor is None and factor == 1.0:
            return list(sums.own)
        factor = factor if divisor is None else factor / divisor
        return [
            [scale(merge_repeated_indices(g), tf.cast(factor, g.dtype)) for g in of_part]
            for of_part in sums.own
        ]

    def _replicas(self) -> int:
        return tf.distribute.get_strategy().num_replicas_in_sync

    def _write_own(
        self,
        writer: Writer,
        parameters: Parameters,
        means: list[Gradient],
        own: list[list[Gradient]],
    ) -> None:
        """Writes what an optimizer keeps of a replica's own gradients: by default nothing.

        Args:
            writer: By which the rule has written.
            parameters: What it was given.
            means: The mean gradients before clipping.
            own: For each of this replica's sub-batches its own.
        """

    def _constrain(
        self, writer: Writer, indices: Sequence[int], targets: Sequence[tf.Variable]
    ) -> None:
        """Applies the variables' constraints to what holds their weights."""
        for index, target in zip(indices, targets, strict=True):
            constraint = getattr(self.trained.variables[index], "constraint", None)
            if constraint is not None:
                writer.assign(target, constraint(tf.convert_to_tensor(target)))

    def _average(self, writer: Writer, step: Step, numbers: Sequence[int] | None) -> None:
        """Writes the averages of the weights of these variables, or of all."""
        count = step.index
        due: tf.Tensor | None = None
        if self.ema_overwrite_frequency:
            due = tf.cast(count + 1, tf.int32) % self.ema_overwrite_frequency == 0
        pairs = self._weights_and_averages()
        pairs = pairs if numbers is None else [pairs[number] for number in numbers]
        momentum = {
            dtype: tf.where(count == 0, tf.zeros([], dtype), tf.constant(self.ema_momentum, dtype))
            for dtype in {average.dtype for _, average in pairs}
        }
        for variable, average in pairs:
            old = momentum[average.dtype]
            mean = old * average + (1 - old) * tf.cast(variable, average.dtype)
            writer.assign(average, mean)
            if due is not None:
                weights = tf.convert_to_tensor(variable)
                writer.assign(variable, tf.where(due, tf.cast(mean, weights.dtype), weights))

    @contextlib.contextmanager
    def micro_step(self, number: int) -> Iterator[None]:
        """Within this block, on a replica, gradients are those of this micro-step of an update.

        For a training step that takes all micro-steps of an update: the update is traced once, with
        the last of them. Without this block each could be the last.

        Args:
            number: From 0 to `gradient_accumulation_steps` - 1.

        Raises:
            ValueError: There is no such micro-step, the block is in another one, or
                `accumulation_steps` was set to another number.
        """
        steps = self.gradient_accumulation_steps or 1
        if not 0 <= number < steps:
            raise ValueError(
                f"`number` must be from 0 to {steps - 1}, as gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}. Received: number={number!r}"
            )
        if self._micro_step() != MicroStep():
            raise ValueError(
                "`micro_step` must be the outermost block: the parts of a micro-step are within "
                f"it. Received: micro_step({number}) within another block"
            )
        if self._accumulation is not None:
            if self.accumulation_steps != steps:
                raise ValueError(
                    "`micro_step` needs as many micro-steps as `gradient_accumulation_steps` says, "
                    f"which is {steps}. Received: accumulation_steps={self.accumulation_steps}"
                )
            self._accumulation.counted = True
        with self._in_micro_step(MicroStep(number, steps)):
            yield

    def _in_micro_step(self, micro_step: MicroStep) -> contextlib.AbstractContextManager[None]:
        """Within this block gradients are those of this one, in that of the block around it."""
        return _micro_steps.left(self, micro_step.within(self._micro_step()))

    def _micro_step(self) -> MicroStep:
        return _micro_steps.get(self) or MicroStep()

    # -- a batch that grows ------------------------------------------------------------------------

    @property
    def accumulation_steps(self) -> int:
        """How many micro-steps an update has that begins now.

        That is `gradient_accumulation_steps`, or what was assigned since, by Python and between
        training steps: an int ≥ 1. It is in force from the next update on; the one under way, if
        there is one, keeps its own. Nothing is traced anew. A number that was assigned is saved
        with the state, and in force again when that is loaded, whatever the constructor was given.
        On several workers each has to assign the same at the same time.

        In training steps that were traced before the number is a constant, unless the optimizer was
        made with `gradient_accumulation_steps=1` or `let_batch_grow` was called. The callbacks
        `BatchSizeSchedule` and `BatchSizeWarmup` of `tf_lbopt.callbacks` do so in `fit`.

        The mean gradient is over as many micro-steps as the update has, and so are the statistics
        of sub-batches. The learning rate stays as it is; these callbacks can scale it.

        Raises:
            TypeError, ValueError: What is assigned is no integer ≥ 1, or leaves an optimizer that
                estimates a variance with a single sub-batch; the optimizer does not accumulate
                (`gradient_accumulation_steps=1` does), is an extrapolated one, or was traced with
                another number as a constant, as in blocks of `micro_step`.
        """
        return self._assigned_steps() or self.gradient_accumulation_steps or 1

    @accumulation_steps.setter
    def accumulation_steps(self, steps: int) -> None:
        steps = _validation.integer("accumulation_steps", steps, low=1)
        received = f"Received: accumulation_steps={steps}"
        self._check_can_grow(f"{received}, ")
        if tf.inside_function():
            raise ValueError(
                "`accumulation_steps` must be set between training steps, by Python. "
                f"{received} in a function that is traced"
            )
        self._assign_steps(steps)

    def let_batch_grow(self) -> bool:
        """Lets training steps that are traced from now on have any number of micro-steps.

        That number is `accumulation_steps`, read from a variable. Without it the number is a
        constant, of which XLA makes a faster update. Steps that were traced before this call must
        not be used any more.

        Returns:
            Whether it was a constant until now.

        Raises:
            ValueError: The optimizer does not accumulate, or is an extrapolated one.
        """
        self._check_can_grow("Received: ")
        assert self._accumulation is not None
        fixed = not self._accumulation.grows or self._accumulation.counted
        self._accumulation.grows = True
        if self.built:
            self._accumulation.let_grow()
        return fixed

    @property
    def pending_micro_steps(self) -> int:
        """How many micro-steps of the update under way are made; 0 between updates."""
        if self._pending_micro_steps is None:
            return 0
        return int(tensorflow_variable(self._pending_micro_steps).numpy())

    def _assigned_steps(self) -> int:
        return 0 if self._accumulation is None else self._accumulation.assigned

    def _restore_assigned_steps(self, steps: int) -> None:
        if self._accumulation is not None and self.batch_can_grow:
            if steps:
                self._assign_steps(steps)
            else:
                self._accumulation.assign_steps(0)

    def _check_can_grow(self, received: str) -> None:
        if self._accumulation is None or not self.batch_can_grow:
            raise ValueError(
                f"`accumulation_steps` of this {type(self).__name__} can not be changed. Expected: "
                "an optimizer that was made with `gradient_accumulation_steps` (1 begins with "
                "batches as they come), not extrapolated, and no PostLocalSGD. "
                f"{received}gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )

    def _assign_steps(self, steps: int) -> None:
        accumulation = self._accumulation
        assert accumulation is not None
        if accumulation.counted and steps != self.gradient_accumulation_steps:
            raise ValueError(
                "`accumulation_steps` can not be changed any more: training steps were traced in "
                f"which it is {self.gradient_accumulation_steps}, a constant. Expected: an "
                "optimizer made with `gradient_accumulation_steps=1`, or `let_batch_grow()` before "
                "the first step, and no blocks of `micro_step` (nor a recipe's `sub_batches`). "
                f"Received: accumulation_steps={steps}"
            )
        self._check_sub_batches(steps)
        accumulation.assign_steps(steps)
        if not accumulation.counted:
            self.let_batch_grow()

    def _check_sub_batches(self, steps: int) -> None:
        """Raises, or warns, if so many micro-steps make too few sub-batches; by default neither."""

    def _known_indices(self, variables: Sequence[Variable]) -> list[int]:
        indices = []
        for variable in variables:
            index = self.trained.numbers.get(_compat.key_of(variable))
            if index is None:
                raise ValueError(
                    f"Unknown variable: {path_of(variable)}. {type(self).__name__} can only be "
                    "called for the variables it was built with; create a new optimizer for others."
                )
            indices.append(index)
        return indices

    def _gradient_norms(
        self, variables: Sequence[Variable], loss_scale: Callable[[], tf.Tensor] | None
    ) -> tf.Tensor | None:
        """[n], what stands for the norms of this replica's gradients in the mean norm.

        In the units of the gradients; `None` for the norms themselves.
        """
        del variables, loss_scale
        return None

    def _warn_of_no_update(self) -> None:
        """Warns at the end of a `fit` all of whose batches are still in the accumulators."""
        accumulation = self._accumulation
        if accumulation is None or not accumulation.accumulators:
            return
        updates = accumulation.take_finished()
        pending = int(accumulation.micro_step.numpy())
        if pending and not updates:
            warnings.warn(
                "`fit` ended before an update was due, and the weights are as they were: a batch "
                f"is one micro-step, and {pending} of accumulation_steps="
                f"{self.accumulation_steps} are made. They are part of the next update.",
                stacklevel=3,
            )

    def _weights_and_averages(self) -> list[tuple[tf.Variable, tf.Variable]]:
        return [
            (target, tensorflow_variable(average))
            for target, average in zip(self.trained.targets, _compat.averages(self), strict=True)
        ]

    def _begin_averages(self) -> None:
        """Makes averages the weights as long as no update was made, which then makes them so."""
        if int(self.trained.iterations.numpy()) == 0:
            with inside_scope(self._strategy):
                for variable, average in self._weights_and_averages():
                    average.assign(tf.cast(tf.convert_to_tensor(variable), average.dtype))

    def _put_averages(self, variables: Sequence[Variable]) -> None:
        """Puts their averages into the place of these variables, outside of replicas."""
        self._begin_averages()
        pairs = self._weights_and_averages()
        with inside_scope(self._strategy):
            for variable, average in (pairs[i] for i in self._known_indices(variables)):
                variable.assign(tf.cast(tf.convert_to_tensor(average), variable.dtype))

    # -- exclusions --------------------------------------------------------------------------------

    def exclude_from_weight_decay(
        self, var_list: Sequence[Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from weight decay, in Keras's way; kept by `get_config`.

        Args:
            var_list: Variables.
            var_names: Regexes that are searched for in the variables' own names (not paths).

        Raises:
            ValueError: The optimizer is built already.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay()` must be called before the optimizer is built."
            )
        for variable in listed("var_list", var_list):
            if isinstance(variable, str):
                raise TypeError(
                    "`var_list` must be a list of variables; names go into `var_names`. "
                    f"Received an entry of type str: {_validation.shown(variable)}"
                )
            self._decay_exclusion.add(variable)
        for name in listed("var_names", var_names):
            self._exclude_name(name)
        self._decay_exclusion.given = True

    def _exclude_name(self, pattern: str) -> None:
        self._decay_exclusion.add_name(pattern)

    def decays(self, variable: Variable) -> bool:
        """Whether weight decay applies to a variable."""
        return variable not in self._decay_exclusion

    def adapts(self, variable: Variable) -> bool:
        """Whether layer-wise adaptation, if the optimizer has it, applies to a variable."""
        if not self._adaptation_exclusion.given:
            return self.decays(variable)
        return variable not in self._adaptation_exclusion

    # -- configuration and state -------------------------------------------------------------------

    def _rate_or_schedule(self, learning_rate: LearningRate) -> LearningRate:
        # A dictionary is a serialized schedule, inside from_config.
        if callable(learning_rate) or isinstance(learning_rate, dict):
            return self._schedule(learning_rate)
        return learning_rate

    @classmethod
    def from_config(
        cls: type[_Optimizer], config: Arguments, custom_objects: dict[str, type] | None = None
    ) -> _Optimizer:
        """The optimizer that `get_config` describes."""
        # A copy: the framework's writes a schedule that it makes into its argument.
        config = {cls.former_names.get(name, name): value for name, value in config.items()}
        return super().from_config(config, custom_objects)  # type: ignore[misc]

    def get_config(self) -> Arguments:
        """The arguments that make an equal optimizer, for Keras serialization."""
        config = super().get_config()  # type: ignore[misc]  # the framework's
        config.update(self.hyperparameters(), jit_compile=self._jit_update)
        exclusions = (self._decay_exclusion, self._adaptation_exclusion)
        parameters = self._declared_signature().parameters
        if "weight_decay" not in parameters:  # the framework's base class has it
            config.pop("weight_decay", None)
        config.update({e.argument: e.config() for e in exclusions if e.argument in parameters})
        return config

    def set_weights(self, weights: Sequence[ArrayLike]) -> None:
        """Sets all `variables`. Gradients that are accumulated belong to the former ones."""
        super().set_weights(weights)  # type: ignore[misc]  # the framework's
        self.drop_accumulated()

    def drop_accumulated(self) -> None:
        """Makes the next micro-step the first of an update."""
        if self._accumulation is not None and self._accumulation.accumulators:
            self._accumulation.reset()

    def _replica_states(self) -> dict[str, ReplicaState]:
        """What differs from replica to replica, by the name under which it is saved."""
        return {} if self._accumulation is None else {"accumulation": self._accumulation}


def check_floating(optimizer: object, variable: Variable) -> None:
    """Raises if an optimizer is to train a variable of integers, booleans or complex numbers.

    Raises:
        TypeError: It is.
    """
    dtype = tf.as_dtype(variable.dtype)
    if not dtype.is_floating:
        raise TypeError(
            f"{type(optimizer).__name__} trains variables of real floating-point numbers. "
            f"Received: {path_of(variable)}, of dtype {dtype.name}"
        )


def build_at_first_call(
    optimizer: Any, variables: Iterable[Variable] | None, argument: str
) -> list[Variable] | None:
    """Builds an optimizer that is not built yet for the variables of a call.

    Args:
        optimizer: Of the framework.
        variables: What the call was given.
        argument: The name by which it was given them.

    Returns:
        The variables that the call was given, or ``None``.

    Raises:
        ValueError: It was given none, and is the first.
    """
    given = None if variables is None else list(variables)
    if not optimizer.built:
        if given is None:
            raise ValueError(
                f"`{argument}` must be given to the first call, or the optimizer built before by "
                "`optimizer.build(trainable_variables)`. Received: None"
            )
        once_for_all_replicas(lambda: optimizer.build(given))
    return given


def _merged(sums: Sums) -> Sums:
    """With sparse totals that have no repeated indices."""
    totals = [
        merge_repeated_indices(total) if isinstance(total, tf.IndexedSlices) else total
        for total in sums.totals
    ]
    return sums._replace(totals=totals)


def _dense(sums: Sums) -> Sums:
    """With dense gradients, and deviations of all their elements, not of the rows looked up."""
    deviations = sums.deviations
    if deviations is not None:
        sums = _merged(sums)  # of which they have the rows
        deviations = [
            tf.IndexedSlices(rows, total.indices, total.dense_shape)
            if isinstance(total, tf.IndexedSlices)
            else rows
            for total, rows in zip(sums.totals, deviations, strict=True)
        ]
    return tf.nest.map_structure(dense, sums._replace(deviations=deviations))


def _program(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function as one program that XLA compiles."""
    return tf.function(function, jit_compile=True, autograph=False)


def without_missing(
    grads: Gradients, variables: Sequence[Variable]
) -> list[tuple[Gradient, Variable]]:
    """The pairs of a gradient and its variable; warns of variables without one.

    Raises:
        ValueError: None has one.
    """
    pairs = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
    if not pairs:
        raise ValueError(
            "No gradients provided for any variable: all of `grads` are None. "
            f"Received variables: {_validation.listed(map(path_of, variables))}"
        )
    missing = [path_of(v) for g, v in zip(grads, variables, strict=True) if g is None]
    if missing:
        warnings.warn(
            f"Gradients do not exist for variables {_validation.listed(missing)}; they are left "
            "unchanged.",
            stacklevel=4,
        )
    return pairs
