"""Tasks that take each replica's batch in parts: gradient accumulation within one training step."""

import abc
import contextlib
import copy
import numbers
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from tf_lbopt.aggregation.sparse import added
from tf_lbopt.aggregation.sub_batches import split
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.optimizers.extrapolation import Extrapolation
from tf_lbopt.rules.clip import scale
from tf_lbopt.tfm.configs import REGISTRATIONS


class SubBatchTask:
    """Comes before a task's class and splits its training step into `task_config.sub_batches`.

    A replica's batch is taken in as many equal parts, one after the other, each by the task's own
    `train_step`; there is one update. The weights are those of as many times the replicas, but for
    what belongs to a replica's forward pass: BatchNormalization normalizes every part by itself, as
    a replica does, and moves its averages once for every part, and random numbers are others.
    Metrics see all parts, the loss that is reported is their mean.

    An optimizer of this package sees each part's gradient, so its statistics are over replicas
    times parts. Any other gets the gradients of all parts in one call of `apply_gradients`.

    An extrapolated optimizer takes every part's gradient at a point of its own; also without parts
    the step is taken in its `extrapolated`. Between steps the model has x, as everywhere.

    The task's `train_step` must call `apply_gradients` of the optimizer that it is given, once.

    Raises:
        ValueError: `sub_batches` is no positive integer, or the optimizer is one of this package
            and is to be wrapped by what takes legacy optimizers only.
    """

    task_config: Any
    loss: str

    def __init__(self, params: Any, *args: Any, **kwargs: Any):
        sub_batches = params.sub_batches
        if (
            isinstance(sub_batches, bool)
            or not isinstance(sub_batches, numbers.Integral)
            or sub_batches < 1
        ):
            raise ValueError(
                "`task.sub_batches` must be an integer >= 1. "
                f"Received: task.sub_batches={sub_batches!r}"
            )
        super().__init__(params, *args, **kwargs)  # type: ignore[call-arg]

    def create_optimizer(
        self,
        optimizer_config: Any,
        runtime_config: Any = None,
        dp_config: Any = None,
    ) -> Any:
        """The task's optimizer; one of this package accumulates over the parts."""
        given = {} if dp_config is None else {"dp_config": dp_config}
        kind = optimizer_config.optimizer.type
        if kind in REGISTRATIONS:
            for name, value in (("ema", optimizer_config.ema), ("dp_config", dp_config)):
                if value is not None:
                    raise ValueError(
                        f"`{name}` of tf-models works with its legacy optimizers only. Expected: "
                        f"none with the optimizer {kind}. Received: {name}={value}"
                    )
            if self.task_config.sub_batches > 1:
                optimizer_config = copy.deepcopy(optimizer_config)
                # No field of the configuration: set by hand, steps would no longer be updates.
                argument = (
                    "sub_batches"
                    if issubclass(REGISTRATIONS[kind].cls, Extrapolation)
                    else "gradient_accumulation_steps"
                )
                vars(optimizer_config.optimizer.get())[argument] = self.task_config.sub_batches
        return super().create_optimizer(  # type: ignore[misc]
            optimizer_config, runtime_config, **given
        )

    def train_step(self, inputs: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """One update by the task's own steps on the parts of a replica's batch."""
        step = super().train_step  # type: ignore[misc]
        number = self.task_config.sub_batches
        accumulates = _accumulates(optimizer, number)
        if number == 1:
            with _in_turn(optimizer, model, inputs, 0, accumulates):
                return step(inputs, model, optimizer, *args, **kwargs)
        # A task that does not divide its loss by the replicas sums gradients over them, and so over
        # the parts.
        summed = getattr(self.task_config, "scale_loss", True) is False
        parts = split(inputs, number, "task.sub_batches")
        logs: list[dict[str, Any]] = []
        collected = _Collected()
        for index, part in enumerate(parts):
            # Without the wait all parts would be in memory together.
            with tf.control_dependencies(collected.latest):
                part = tf.nest.map_structure(tf.identity, part)
            stand_in: Any = (_Passing if accumulates else _Collecting)(
                optimizer, collected, index, number, summed
            )
            with _in_turn(optimizer, model, part, index, accumulates):
                logs.append(step(part, model, stand_in, *args, **kwargs))
            if collected.calls != index + 1:
                raise ValueError(
                    f"task.sub_batches={number} needs a task whose `train_step` calls "
                    f"`apply_gradients` of its optimizer once; that of {type(self).__name__} "
                    f"called it {collected.calls - index} times."
                )
        losses = [tf.convert_to_tensor(log[self.loss]) for log in logs]
        return {**logs[-1], self.loss: tf.add_n(losses) / number}


class _Collected:
    """What one replica has of the parts of its batch so far."""

    def __init__(self) -> None:
        self.gradients: list[Any] = []
        self.latest: list[tf.Tensor] = []
        self.calls = 0


class _StandIn(abc.ABC):
    """Stands for an optimizer while one part is traced; for all but the update it is that."""

    def __init__(
        self, optimizer: Any, collected: _Collected, index: int, number: int, summed: bool
    ):
        self._optimizer = optimizer
        self._collected = collected
        self._index = index
        self._number = number
        self._summed = summed

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # tasks ask whether it is a LossScaleOptimizer
        return type(self._optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], **kwargs: Any) -> Any:
        pairs = list(grads_and_vars)
        self._collected.calls += 1
        self._collected.latest = [
            gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
            for gradient, _ in pairs
            if gradient is not None
        ]
        return self._apply([g for g, _ in pairs], [v for _, v in pairs], kwargs)

    @abc.abstractmethod
    def _apply(self, gradients: list[Any], variables: list[Any], kwargs: dict[str, Any]) -> Any:
        """What becomes of one part's gradients."""


class _Passing(_StandIn):
    """For an optimizer that accumulates, to the mean over the parts, by itself."""

    def _apply(self, gradients: list[Any], variables: list[Any], kwargs: dict[str, Any]) -> Any:
        if self._summed:
            gradients = [_scaled(gradient, self._number) for gradient in gradients]
        return self._optimizer.apply_gradients(zip(gradients, variables, strict=True), **kwargs)


class _Collecting(_StandIn):
    """For an optimizer that knows nothing of parts."""

    def _apply(self, gradients: list[Any], variables: list[Any], kwargs: dict[str, Any]) -> Any:
        so_far = self._collected.gradients or [None] * len(gradients)
        totals = [added(pair) for pair in zip(so_far, gradients, strict=True)]
        self._collected.gradients = totals
        if self._index < self._number - 1:
            return None
        if not self._summed:
            totals = [_scaled(total, 1 / self._number) for total in totals]
        return self._optimizer.apply_gradients(list(zip(totals, variables, strict=True)), **kwargs)


def _in_turn(
    optimizer: Any, model: Any, inputs: Any, part: int, accumulates: bool
) -> contextlib.AbstractContextManager[None]:
    """What the step of one part must be taken in."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(inner, Extrapolation):
        inner.prepare_model(model, inputs)
        return inner.extrapolated(model.trainable_variables, part)
    if isinstance(inner, Algorithm) and accumulates:
        return inner.micro_step(part)
    return contextlib.nullcontext()


def _accumulates(optimizer: Any, number: int) -> bool:
    """Whether an optimizer takes the parts' gradients one by one.

    Raises:
        ValueError: It does, but not as many of them.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(inner, Extrapolation):
        steps = inner.gradient_accumulation_steps
        if inner.sub_batches != number or (number > 1 and steps is not None):
            raise ValueError(
                f"An extrapolated optimizer must have sub_batches=task.sub_batches={number} and no "
                f"gradient_accumulation_steps. Received: sub_batches={inner.sub_batches}, "
                f"gradient_accumulation_steps={steps}"
            )
        return True
    if number == 1:
        return False
    steps = getattr(inner, "gradient_accumulation_steps", None)
    if steps not in (None, number):
        raise ValueError(
            f"`gradient_accumulation_steps` of the optimizer must be None or task.sub_batches="
            f"{number}. Received: gradient_accumulation_steps={steps}"
        )
    return steps == number


def _scaled(gradient: Any, factor: float) -> Any:
    return None if gradient is None else scale(gradient, tf.cast(factor, gradient.dtype))
