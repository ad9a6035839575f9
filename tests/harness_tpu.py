"""TPUStrategy without a TPU: what it traces, and what its replicas would compute.

Variables of devices that do not exist fall back to the CPU, and `strategy.run` inside a
`tf.function` traces TPUStrategy's own replica context, variables and reductions. Nothing of that
can run; `emulated` runs the same Python code eagerly instead, a thread for each replica. Checked on
TensorFlow 2.20.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tensorflow as tf
from harness import Run
from tensorflow.python.distribute import tpu_strategy, tpu_util, tpu_values
from tensorflow.python.ops import control_flow_util
from tensorflow.python.tpu.ops import tpu_ops

from benchmarks.tpu_check._compat import tpu_strategy_of


class _TracedError(Exception):
    """Ends a call that would go on to run what was traced."""


def traced_by(
    strategy: tf.distribute.TPUStrategy, function: Callable[..., Any], *args: Any
) -> tf.Graph:
    """The graph in which a call traces a replica function, the first. Nothing runs."""
    extended, graphs = strategy.extended, []

    def tpu_run(*run_args: Any) -> Any:
        type(extended).tpu_run(extended, *run_args)
        graphs.append(tf.compat.v1.get_default_graph())
        raise _TracedError

    extended.tpu_run = tpu_run
    try:
        with contextlib.suppress(_TracedError):
            function(*args)
    finally:
        del extended.tpu_run
    assert graphs, "nothing was run on the replicas"
    return graphs[0]


class _Sum:
    """`cross_replica_sum` for threads."""

    def __init__(self, replicas: int):
        self._barrier = threading.Barrier(replicas, timeout=60)
        self._values: list[Any] = [None] * replicas

    def __call__(self, replica: int, value: tf.Tensor) -> tf.Tensor:
        self._values[replica] = value
        self._barrier.wait()
        total = tf.add_n(list(self._values))
        self._barrier.wait()
        return total

    def abort(self) -> None:
        self._barrier.abort()


@contextlib.contextmanager
def _patched(replica_of_thread: threading.local, reduce: _Sum) -> Iterator[None]:
    replica = functools.partial(getattr, replica_of_thread, "number", None)
    handle, enclosing = tpu_values.TPUVariableMixin.handle, tpu_util.enclosing_tpu_context
    in_xla = control_flow_util.GraphOrParentsInXlaContext

    def own_handle(variable: Any) -> Any:
        number = replica()
        return handle.fget(variable) if number is None else variable._values[number].handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_values.TPUVariableMixin, "handle", property(own_handle))
        patch.setattr(
            tpu_util, "enclosing_tpu_context", lambda: enclosing() if replica() is None else True
        )
        patch.setattr(
            control_flow_util,
            "GraphOrParentsInXlaContext",
            lambda graph: in_xla(graph) if replica() is None else True,
        )
        patch.setattr(
            tpu_ops,
            "cross_replica_sum",
            lambda value, *_: reduce(replica(), tf.convert_to_tensor(value)),
        )
        # By which TPUStrategy gives all what the first one writes; here they write the same.
        patch.setattr(tpu_ops, "all_to_all", lambda values, **_: values)
        yield


def emulated(
    strategy: tf.distribute.TPUStrategy,
    replica_step: Callable[..., Any],
    per_replica: Sequence[Sequence[Any]],
) -> None:
    """Runs a step that was traced before (which made the variables), eagerly.

    Each thread is in a replica context of TPUStrategy, reads and writes its replica's copies of
    variables, and sums over the threads.

    Args:
        strategy: The strategy.
        replica_step: What `strategy.run` would be given.
        per_replica: For each replica its arguments.
    """
    own, reduce, errors = threading.local(), _Sum(len(per_replica)), []

    def run(number: int) -> None:
        own.number = number
        try:
            with strategy.scope(), tpu_strategy._TPUReplicaContext(strategy, tf.constant(number)):
                replica_step(*per_replica[number])
        except BaseException as error:
            errors.append(error)
            reduce.abort()

    with _patched(own, reduce):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(per_replica))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        broken = threading.BrokenBarrierError
        raise next((e for e in errors if not isinstance(e, broken)), errors[0])


class TPURun(Run):
    """`Run` under TPUStrategy: the step is traced before its first run, which `emulated` does."""

    packed = True

    def _strategy_of(self, replicas: int) -> tf.distribute.Strategy:
        return tpu_strategy_of(replicas, self.packed)

    def micro_step(self, per_replica: Sequence[Sequence[Any]]) -> None:
        """One call, with ``[replica][layer]`` gradients."""
        if not self.traces:
            self.graph = self._step.get_concrete_function(per_replica[0]).graph
        emulated(self.strategy, self._replica_step, [[layers] for layers in per_replica])


def recipe_step(task: Any, params: Any, batch: Any) -> Any:
    """A task's training step, as tf-models' trainer runs it, traced with a replica's batch."""
    from official.core import train_utils

    strategy = tpu_strategy_of(2)
    with strategy.scope():
        model = task.build_model()
        optimizer = train_utils.create_optimizer(task, params)
        metrics = task.build_metrics(training=True)

    @tf.function
    def step(batch: Any) -> None:
        strategy.run(
            lambda batch: task.train_step(batch, model, optimizer, metrics=metrics), args=(batch,)
        )

    return step.get_concrete_function(batch)
