"""Tasks that take each replica's batch in parts: gradient accumulation within one training step."""

import contextlib
import copy
from collections.abc import Iterable
from typing import Any

import tensorflow as tf
import tf_keras
from official.core import config_definitions
from official.modeling import optimization
from tf_keras.optimizers import Optimizer

from tf_lbopt import _validation
from tf_lbopt.aggregation.sparse import added
from tf_lbopt.aggregation.sub_batches import split
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.optimizers.extrapolation import Extrapolation
from tf_lbopt.rules.clip import scale
from tf_lbopt.rules.norms import Gradient
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
        TypeError, ValueError: `sub_batches` is no positive integer.
        ValueError: The optimizer is one of this package and is to be wrapped by what takes legacy
            optimizers only.
    """

    task_config: config_definitions.TaskConfig
    loss: str

    def __init__(self, params: config_definitions.TaskConfig, *args: object, **kwargs: object):
        _validation.integer("task.sub_batches", params.sub_batches, low=1)
        super().__init__(params, *args, **kwargs)  # type: ignore[call-arg]

    def create_optimizer(
        self,
        optimizer_config: optimization.OptimizationConfig,
        runtime_config: config_definitions.RuntimeConfig | None = None,
        dp_config: object = None,
    ) -> Optimizer:
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

    def train_step(
        self,
        inputs: object,
        model: tf_keras.Model,
        optimizer: Optimizer,
        *args: object,
        **kwargs: object,
    ) -> dict[str, Any]:
        """One update by the task's own steps on the parts of a replica's batch."""
        step = super().train_step  # type: ignore[misc]
        number = self.task_config.sub_batches
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        accumulates = _accumulates(inner, number)
        if number == 1:
            with _block(inner, model, inputs, 0, accumulates):
                return step(inputs, model, optimizer, *args, **kwargs)
        # A task that does not divide its loss by the replicas sums gradients over them, and so over
        # the parts.
        summed = getattr(self.task_config, "scale_loss", True) is False
        stand_in = _StandIn(optimizer, number, accumulates, summed)
        logs: list[dict[str, Any]] = []
        for index, part in enumerate(split(inputs, number, "task.sub_batches")):
            # Without the wait all parts would be in memory together.
            with tf.control_dependencies(stand_in.latest):
                part = tf.nest.map_structure(tf.identity, part)
            with _block(inner, model, part, index, accumulates):
                logs.append(step(part, model, stand_in, *args, **kwargs))
            if stand_in.calls != index + 1:
                raise ValueError(
                    f"task.sub_batches={number} needs a task whose `train_step` calls "
                    f"`apply_gradients` of its optimizer once; that of {type(self).__name__} "
                    f"called it {stand_in.calls - index} times."
                )
        losses = [tf.convert_to_tensor(log[self.loss]) for log in logs]
        return {**logs[-1], self.loss: tf.add_n(losses) / number}


class _StandIn:
    """Stands for an optimizer while the parts are traced; for all but the update it is that.

    Args:
        optimizer: If it accumulates, to a mean, it is given the gradients of each part; any other
            those of all parts in one call.
        number: Of parts.
        accumulates: Whether it does.
        summed: Whether the task takes the sum of all parts for their mean.
    """

    def __init__(self, optimizer: Optimizer, number: int, accumulates: bool, summed: bool):
        self.calls = 0
        self.latest: list[tf.Tensor] = []
        self._optimizer = optimizer
        self._number = number
        self._accumulates = accumulates
        self._summed = summed
        self._totals: list[Gradient | None] = []

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # tasks ask whether it is a LossScaleOptimizer
        return type(self._optimizer)

    def __getattr__(self, name: str) -> object:
        return getattr(self._optimizer, name)

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Gradient | None, tf.Variable]], **kwargs: object
    ) -> object:
        gradients, variables = map(list, zip(*grads_and_vars, strict=True))
        self.calls += 1
        self.latest = [getattr(g, "values", g) for g in gradients if g is not None]
        factor = self._number if self._summed else 1.0
        if not self._accumulates:
            totals = self._totals or [None] * len(gradients)
            gradients = self._totals = [added(pair) for pair in zip(totals, gradients, strict=True)]
            if self.calls < self._number:
                return None
            factor /= self._number
        return self._optimizer.apply_gradients(
            [(_scaled(g, factor), v) for g, v in zip(gradients, variables, strict=True)], **kwargs
        )


def _block(
    optimizer: Optimizer, model: tf_keras.Model, inputs: object, part: int, accumulates: bool
) -> contextlib.AbstractContextManager[None]:
    """What the step of one part must be taken in."""
    if isinstance(optimizer, Extrapolation):
        optimizer.prepare_model(model, inputs)
        return optimizer.extrapolated(model.trainable_variables, part)
    if isinstance(optimizer, Algorithm) and accumulates:
        return optimizer.micro_step(part)
    return contextlib.nullcontext()


def _accumulates(optimizer: Optimizer, number: int) -> bool:
    """Whether an optimizer takes the parts' gradients one by one.

    Raises:
        ValueError: It does, but not as many of them.
    """
    if isinstance(optimizer, Extrapolation):
        steps = optimizer.gradient_accumulation_steps
        if optimizer.sub_batches != number or (number > 1 and steps is not None):
            raise ValueError(
                f"An extrapolated optimizer must have sub_batches=task.sub_batches={number} and no "
                f"gradient_accumulation_steps. Received: sub_batches={optimizer.sub_batches}, "
                f"gradient_accumulation_steps={steps}"
            )
        return True
    if number == 1:
        return False
    steps = getattr(optimizer, "gradient_accumulation_steps", None)
    if steps not in (None, number):
        raise ValueError(
            f"`gradient_accumulation_steps` of the optimizer must be None or task.sub_batches="
            f"{number}. Received: gradient_accumulation_steps={steps}"
        )
    return steps == number


def _scaled(gradient: Gradient | None, factor: float) -> Gradient | None:
    if gradient is None or factor == 1:
        return gradient
    return scale(gradient, tf.cast(factor, gradient.dtype))
