"""A batch size that changes with the number of updates."""

import math
from collections.abc import Mapping

from tf_lbopt import _validation
from tf_lbopt.callbacks.growing_batch import GrowingBatch


class BatchSizeSchedule(GrowingBatch):
    """Changes the number of micro-steps of an update at given updates.

    A batch of the data set is a micro-step; an update is of ``accumulation_steps`` of them on each
    replica, so the batch size is their product with the micro-step's examples. This callback
    assigns the optimizer's `accumulation_steps`; a change traces nothing anew. `fit`'s logs get the
    number in force as ``accumulation_steps`` at the end of every epoch.

    Updates count as in `iterations`, which is saved: the schedule goes on where a training is
    resumed. Discarded updates do not count. Under `steps_per_execution` it is looked at between two
    executions only, so a change may come some updates late.

    The learning rate stays as it is unless `learning_rate_rule` is given: growth of the batch can
    take the place of the rate's decay. By a rule the optimizer's `learning_rate` is multiplied, at
    each change, by (steps after / steps before) or its square root; what it was made with belongs
    to the number of micro-steps it was made with. That is for rates that are numbers, and not
    together with a callback that sets the rate itself (`LearningRateScheduler`). A
    `LearningRateSchedule` is a function of the update and can contain the rule. Weight decay,
    momentum and the decays of moments are never changed.

    Args:
        schedule: By the number of updates made, ≥ 0, how many micro-steps those that follow have,
            ≥ 1. Before the first entry the number is left as it is.
        learning_rate_rule: `"linear"`, `"sqrt"`, or `None` for the same rate. Defaults to `None`.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or outside its range.
        ValueError: When training begins, if the optimizer is none of this package that accumulates
            (`gradient_accumulation_steps=1` is a start) or is extrapolated, or its rate is a
            schedule and there is a rule; when a number is assigned, as `accumulation_steps` says
            (a single sub-batch under VRGD, steps in blocks of `micro_step`).

    Example:
        >>> import keras, tf_lbopt
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile(tf_lbopt.SNGM(0.1, gradient_accumulation_steps=1), loss="mse")
        >>> x, y = keras.ops.ones([16, 2]), keras.ops.ones([16, 1])
        >>> schedule = BatchSizeSchedule({2: 2, 3: 4})
        >>> history = model.fit(x, y, batch_size=2, verbose=0, callbacks=[schedule])
        >>> int(model.optimizer.iterations.numpy()), history.history["accumulation_steps"]
        (4, [4])

    References:
        Smith, Kindermans, Ying, Le 2018, "Don't Decay the Learning Rate, Increase the Batch Size"
        (arXiv:1711.00489).
    """

    def __init__(self, schedule: Mapping[int, int], learning_rate_rule: str | None = None):
        super().__init__(learning_rate_rule)
        if not isinstance(schedule, Mapping):
            expected = "a dictionary of numbers of updates and micro-steps"
            raise _validation.refusal(TypeError, "schedule", expected, schedule)
        if not schedule:
            raise ValueError("`schedule` must have an entry. Received: schedule={}")
        self.schedule = {
            _validation.integer("a key of schedule", update, low=0): _validation.integer(
                f"schedule[{update}]", steps, low=1
            )
            for update, steps in schedule.items()
        }

    def wanted(self, updates: int, steps: int) -> int:
        """What the schedule says after so many updates; ``steps`` before its first entry."""
        begun = [update for update in self.schedule if update <= updates]
        return self.schedule[max(begun)] if begun else steps

    def next_change(self, updates: int) -> float:
        """The next entry's number of updates."""
        return min((update for update in self.schedule if update > updates), default=math.inf)
