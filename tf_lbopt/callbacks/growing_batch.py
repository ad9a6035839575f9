"""What the callbacks that change the batch size have in common."""

import abc
import logging

import keras
import numpy as np

from tf_lbopt import _compat, _validation
from tf_lbopt.callbacks.common import Logs, without_loss_scale
from tf_lbopt.optimizers.algorithm import Algorithm
from tf_lbopt.schedules import linear_scaling, sqrt_scaling

_logger = logging.getLogger(__name__)

_RULES = {"linear": linear_scaling, "sqrt": sqrt_scaling}


class GrowingBatch(keras.callbacks.Callback, abc.ABC):
    """Assigns `accumulation_steps` of the optimizer between training steps.

    Args:
        learning_rate_rule: `"linear"`, `"sqrt"` or `None`.
    """

    def __init__(self, learning_rate_rule: str | None):
        super().__init__()
        if learning_rate_rule is not None:
            _validation.choice("learning_rate_rule", learning_rate_rule, tuple(_RULES))
        self.learning_rate_rule = learning_rate_rule
        self._due: int | None = None
        # For how many micro-steps there is nothing to do.
        self._wait = 0.0

    @abc.abstractmethod
    def wanted(self, updates: int, steps: int) -> int:
        """How many micro-steps an update is to have from now on.

        Args:
            updates: How many are made.
            steps: How many micro-steps they have now.
        """

    @abc.abstractmethod
    def next_change(self, updates: int) -> float:
        """After how many updates, more than these, `wanted` may be another."""

    def on_train_begin(self, logs: Logs = None) -> None:
        """Looks at the optimizer, and assigns what is due from its next update on."""
        optimizer = self._accumulating()
        if self.learning_rate_rule is not None and _compat.has_schedule(self._with_rate()):
            raise ValueError(
                f"`learning_rate_rule` must be None with a learning rate that is a schedule or a "
                "callable: it is a function of the number of the update, and can contain the rule. "
                f"Received: learning_rate_rule={self.learning_rate_rule!r} and a "
                f"{type(optimizer).__name__} with a schedule"
            )
        self._due = None
        if optimizer.let_batch_grow():
            self.model.make_train_function(force=True)
        self._look()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Assigns what is due."""
        self._wait -= getattr(self.model, "steps_per_execution", 1)
        if self._wait <= 0:
            self._look()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Adds the number in force to the logs."""
        if logs is not None:
            logs["accumulation_steps"] = self._accumulating().accumulation_steps

    def on_train_end(self, logs: Logs = None) -> None:
        """Says what could not be assigned."""
        if self._due is not None:
            _logger.warning(
                "%s could not assign accumulation_steps=%d: under `learning_rate_rule` it does so "
                "between updates, and no update ended between two executions of the training step.",
                type(self).__name__, self._due,
            )  # fmt: skip

    def _look(self) -> None:
        # Reading counters waits for the step that is under way, so this is not done at every batch.
        optimizer = self._accumulating()
        updates, steps = int(optimizer.iterations.numpy()), optimizer.accumulation_steps
        pending = optimizer.pending_micro_steps
        if self._due is None:
            self._due = self.wanted(updates, steps)
        if self._due != steps and not (self.learning_rate_rule and pending):
            optimizer.accumulation_steps = self._due
            if self.learning_rate_rule is not None:
                outer = self._with_rate()
                rate = float(np.asarray(outer.learning_rate))
                outer.learning_rate = _RULES[self.learning_rate_rule](rate, steps, self._due)
            steps = self._due
        if self._due == steps:
            self._due = None
            # At least so many micro-steps; skipped updates do not count.
            rest = self.next_change(updates) - updates
            self._wait = rest * steps if not pending else (rest - 1) * steps + 1

    def _with_rate(self) -> keras.optimizers.Optimizer:
        """The optimizer that the learning rate belongs to."""
        optimizer = self.model.optimizer
        while hasattr(optimizer, "inner_optimizer"):
            optimizer = optimizer.inner_optimizer
        return optimizer

    def _accumulating(self) -> Algorithm:
        inner = without_loss_scale(self.model)
        if (
            not isinstance(inner, Algorithm)
            or inner.gradient_accumulation_steps is None
            or not inner.batch_can_grow
        ):
            raise ValueError(
                f"{type(self).__name__} needs an optimizer of tf_lbopt that accumulates and is "
                "not extrapolated: `gradient_accumulation_steps=1` begins with batches as they "
                f"come. Received: {type(inner).__name__}, gradient_accumulation_steps="
                f"{getattr(inner, 'gradient_accumulation_steps', None)}"
            )
        return inner
