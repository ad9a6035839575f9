"""Several worker processes that train together: who writes, and what all must agree on.

`TF_CONFIG` says who they are, as for `tf.distribute.MultiWorkerMirroredStrategy`. All run the same
program in step. tf-models leaves two things open. After a restart only the chief (the first worker)
restores, since the others keep their checkpoints in folders of their own; and a signal reaches one
of them only. So here workers exchange a few numbers where all come by.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from official_recipes.common.flag_parsing import FlagValueError

if TYPE_CHECKING:
    import tensorflow as tf

ENVIRONMENT = "TF_CONFIG"
MULTI_WORKER = "multi_worker_mirrored"
"""What tf-models calls the strategy, in `runtime.distribution_strategy`."""

_TRAINING_JOBS = ("chief", "worker")
_CHIEF_STAYS_S = 1.0  # after the others: with it goes the service that watches over all
_NAME_BYTES = 256  # of a checkpoint, without its folder
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the first one wins


class ClusterError(ValueError):
    """`TF_CONFIG` can not be used."""

    def __init__(self, expected: str, received: object):
        super().__init__(f"{ENVIRONMENT}: expected {expected}, received {received}")


class WorkerLostError(RuntimeError):
    """Another worker is lost."""


@dataclass(frozen=True)
class Cluster:
    """This process among those that train together.

    Attributes:
        size: How many there are; 1 without others.
        index: Which one this is; 0 is the chief.
    """

    size: int = 1
    index: int = 0

    @property
    def chief(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0


def cluster_from_environment() -> Cluster:
    """What `TF_CONFIG` says.

    Raises:
        ClusterError: It is no JSON of TensorFlow's form, or this process is none of the workers.
    """
    text = os.environ.get(ENVIRONMENT, "").strip()
    expected = 'JSON as {"cluster": {"worker": ["host:port", ...]}, "task": {"type": ..., ...}}'
    try:
        config = json.loads(text or "{}")
        jobs = config.get("cluster") or {}
        sizes = [len(jobs.get(job, ())) for job in _TRAINING_JOBS]
        if sum(sizes) < 2:
            return Cluster()
        task = config["task"]
        job, index = task["type"], int(task["index"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(expected, repr(text)) from error
    if job not in _TRAINING_JOBS or not 0 <= index < len(jobs.get(job, ())):
        raise ClusterError(f"a task among {dict(jobs)}", task)
    return Cluster(sum(sizes), index + (sizes[0] if job == "worker" else 0))


def check_alone() -> None:
    """Checks that this process is to train alone, as the recipes on Keras 3 do.

    Raises:
        ClusterError: `TF_CONFIG` cannot be used, or names several workers.
    """
    cluster = cluster_from_environment()
    if cluster.size > 1:
        raise ClusterError(
            "one worker (the recipes on Keras 3 train in one process, those on tf-models in "
            "several; docs/scaling.md has Keras's fit)",
            f"{cluster.size} workers",
        )


class Workers:
    """The processes of a strategy, this one among them.

    Its methods are called by all workers at the same place, as collectives are.

    Args:
        strategy: The strategy of all.
        cluster: What `cluster_from_environment` returned.
        own_dir: A folder for what this worker must write if that is not to be in the model_dir.
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster, own_dir: str = ""):
        self.cluster = cluster
        self.own_dir = own_dir
        self._strategy = strategy
        self._sums: dict[int, Any] = {}

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every worker's numbers, in the workers' order. All give equally many."""
        if self.cluster.size == 1:
            return [list(numbers)]
        import numpy as np

        own = np.zeros([self.cluster.size, len(numbers)], np.int64)
        own[self.cluster.index] = numbers
        # All replicas of a worker give the same.
        replicas = self._strategy.num_replicas_in_sync // self.cluster.size
        return (self._sum(own) // replicas).tolist()

    def _sum(self, own: Any) -> Any:
        import tensorflow as tf

        if own.shape[1] not in self._sums:

            @tf.function(input_signature=[tf.TensorSpec(own.shape, tf.int64)])
            def total(numbers: tf.Tensor) -> tf.Tensor:
                local = self._strategy.run(tf.identity, args=(numbers,))
                return self._strategy.reduce(tf.distribute.ReduceOp.SUM, local, axis=None)

            self._sums[own.shape[1]] = total
        return self._sums[own.shape[1]](tf.constant(own)).numpy()

    def leave(self, together: bool = True) -> None:
        """Lets the others end as well before the chief does: the last thing that workers do.

        Args:
            together: Wait until all have come here. False where some may not.
        """
        if together:
            self.gather([0])
        if self.cluster.chief:
            time.sleep(_CHIEF_STAYS_S)

    def agreed_signal(self, received: int | None) -> int | None:
        """The signal that any worker has received: SIGINT if there is one, else SIGTERM."""
        flags = self.gather([int(received == number) for number in _SIGNALS])
        for number, counts in zip(_SIGNALS, zip(*flags, strict=True), strict=True):
            if any(counts):
                return number
        return None

    def check_same_params(self, params: Any) -> None:
        """Checks that all workers were given the same parameters.

        Raises:
            FlagValueError: They were not.
        """
        text = json.dumps(params.as_dict(), sort_keys=True, default=str)
        sums = [own for (own,) in self.gather([zlib.crc32(text.encode())])]
        if len(set(sums)) > 1:
            others = [str(index) for index, own in enumerate(sums) if own != sums[0]]
            raise FlagValueError(
                "params_override",
                "the same parameters (and --config_file) on every worker",
                f"others on worker {', '.join(others)} than on worker 0",
            )

    def agreed_checkpoint(self, model_dir: str, latest: str | None) -> str | None:
        """The checkpoint that the chief goes on from, or ``None``.

        Args:
            model_dir: Where the chief has it.
            latest: The chief's latest; of no account on others.

        Raises:
            FlagValueError: Not all workers find it.
        """
        if self.cluster.size == 1:
            return latest
        import tensorflow as tf

        name = os.path.basename(latest or "").encode() if self.cluster.chief else b""
        if len(name) > _NAME_BYTES:
            raise ValueError(f"the name of the checkpoint {latest} is too long")
        chiefs = self.gather([*name, *[0] * (_NAME_BYTES - len(name))])[0]
        agreed = bytes(chiefs).rstrip(b"\0").decode()
        path = os.path.join(model_dir, agreed) if agreed else None
        found = path is None or tf.io.gfile.exists(f"{path}.index")
        missing = [index for index, (there,) in enumerate(self.gather([int(found)])) if not there]
        if missing:
            raise FlagValueError(
                "model_dir",
                "one folder that all workers share",
                f"{model_dir!r}, where worker {', '.join(map(str, missing))} does not find the "
                f"chief's checkpoint {agreed}",
            )
        return path


@contextlib.contextmanager
def losing_workers(model_dir: str) -> Iterator[None]:
    """Says in one line that another worker is gone, which ends a collective operation.

    Raises:
        WorkerLostError: It is.
    """
    import tensorflow as tf

    try:
        yield
    except (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
    ) as error:
        raise WorkerLostError(
            "another worker is gone; the same command on all workers goes on from the last "
            f"checkpoint in {model_dir} ({type(error).__name__})"
        ) from error


def runner_class() -> type:
    """The class of runners for `Workers`: tf-models' own, whose workers all restore one checkpoint.

    Made when called, since it needs TensorFlow.
    """
    import tensorflow as tf
    from official.core import train_lib

    from official_recipes.common.checkpoints import Resumption, begin

    class Manager(tf.train.CheckpointManager):
        """Restores what the workers agree on; writes into its own folder."""

        def __init__(
            self,
            workers: Workers,
            model_dir: str,
            resumption: Resumption,
            *args: Any,
            **kwargs: Any,
        ):
            super().__init__(*args, **kwargs)
            self._workers = workers
            self._model_dir = model_dir
            self._resumption = resumption
            self._steps = kwargs["step_counter"]
            self._agreed: str | None = None

        @property
        def restored(self) -> str | None:
            """What the last restoration found."""
            return self._agreed

        @property
        def resumption(self) -> Resumption:
            """What restores."""
            return self._resumption

        def restore_or_initialize(self) -> str | None:
            latest = tf.train.latest_checkpoint(self._model_dir)
            path = self._workers.agreed_checkpoint(self._model_dir, latest)
            self._agreed = path
            if path is None:
                return super().restore_or_initialize()
            self._resumption.restore(path)
            # Saving is collective: the next one must be due at the same step everywhere.
            self._last_checkpoint_step = int(self._steps.numpy())
            return path

    class Runner(train_lib.OrbitExperimentRunner):
        """Of one worker; who does not write to the model_dir has a folder of its own."""

        def __init__(
            self,
            workers: Workers,
            optimizer_kind: str | None,
            new_optimizer: bool,
            model_dir: str,
            **kwargs: Any,
        ):
            self._workers = workers
            self._read_dir = model_dir
            self._own_dir = workers.own_dir
            self._optimizer_kind = optimizer_kind
            self._new_optimizer = new_optimizer
            super().__init__(
                **kwargs,
                model_dir=self._own_dir or model_dir,
                save_summary=not self._own_dir,
            )

        def _maybe_build_checkpoint_manager(self) -> tf.train.CheckpointManager:
            config, trainer = self.params.trainer, self.trainer
            given = getattr(self.params.task, "init_checkpoint", None)
            return Manager(
                self._workers,
                self._read_dir,
                Resumption(trainer, self._read_dir, self._optimizer_kind, self._new_optimizer),
                trainer.checkpoint,
                directory=self.model_dir,
                max_to_keep=1 if self._own_dir else config.max_to_keep,
                step_counter=trainer.global_step,
                checkpoint_interval=config.checkpoint_interval,
                init_fn=functools.partial(begin, trainer.initialize, given)
                if given
                else trainer.initialize,
            )

    return Runner
